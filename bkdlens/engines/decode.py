"""Greedy decoding of many interventions on one prompt, identical to plain greedy decoding.

An intervention changes the last prompt token in the prefill only, so all interventions on a prompt share
the keys and values before that token (:mod:`bkdlens.engines.prefix`). Then

1. :func:`run_last_token` runs that one token under every intervention, each from its first layer on;
2. :func:`follow` checks a likely answer in one parallel pass, as far as a run agrees with it
   (speculative decoding with a known draft: Leviathan et al. 2023);
3. :func:`go_on` decodes token by token, from the first disagreement, what no likely answer explains.

A run is a (slot, prompt): slot 0 is the untouched model, the others are interventions in the order of
the first layer that they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.prompts import pad_right
from bkdlens.engines.block import Groups, Keys, embed, next_tokens, run_block
from bkdlens.engines.hooks import NOTHING, Intervention, layer_hooks
from bkdlens.engines.memory import runs_at_once
from bkdlens.engines.prefix import Prefix

Index = Int[Tensor, " run"]
Drafts = Sequence[Sequence[int]]  # a likely answer per prompt; an empty one explains nothing
# Per run, the number of the draft that its answer is (-1 for none), and the answer's tokens.
Completed = tuple[list[int], list[Sequence[int]]]
SPARSE = 0.75  # share of rows still being decoded at which the others are dropped
ROOM = 16  # new tokens for which there is room at first; the room is doubled when it is full


@dataclass(frozen=True, eq=False)
class LastToken:
    """The last prompt token of every run."""

    prefix: Prefix  # what lies before it
    first: Int[Tensor, "slot prompt"]  # the first token of each run's answer
    joins: Int[Tensor, " slot"]  # the layer in which a slot begins to differ from slot 0, which has -1
    layers: tuple[Keys, ...]  # its keys, slot by slot, of slot 0 and those that differ from it there

    def past(self, layer: int, slots: Index, prompts: Index) -> Keys:
        """The token's keys in one layer, for the runs of these slots and prompts."""
        n = len(self.prefix)
        reached = len(self.layers[layer].at) // n
        return self.layers[layer].of(torch.where(slots < reached, slots, 0) * n + prompts)


@torch.no_grad()
def run_last_token(
    model: HookedTransformer, prefix: Prefix, interventions: Sequence[Intervention], rows: Sequence[int]
) -> LastToken:
    """Run the last prompt token untouched (slot 0) and under interventions, sorted by first layer.

    ``rows`` are the prefix' prompts, among those for which an intervention has values.
    """
    n, device = len(prefix), prefix.last.device
    slots = [NOTHING, *interventions]
    joins = [-1, *(int(i.first_layer or 0) for i in interventions)]
    at = prefix.lengths[:, None]
    start = embed(model, prefix.last[:, None], at)
    state = start.new_empty(len(slots), *start.shape)
    state[0] = start
    layers: list[Keys] = []

    def remember(new: Keys) -> Keys:
        layers.append(new)
        return new

    live = 1
    for layer, block in enumerate(model.blocks):
        before, live = live, sum(join <= layer for join in joins)
        state[before:live] = state[0]  # below its first layer an intervention is the untouched run
        hooks = dict(layer_hooks(model, slots[:live], rows, layer, 0))

        def act(site: str, activation: Tensor, hooks: dict = hooks, layer: int = layer) -> Tensor:
            hook = hooks.get(get_act_name(site, layer))
            return activation if hook is None else hook(activation, hook=None)

        resid, live_at, far = state[:live].flatten(0, 1), at.repeat(live, 1), prefix.layers[layer]
        groups = Groups.of(torch.arange(n, device=device).repeat(live))
        out = run_block(block, resid, live_at, far, groups, near=remember, touch=act)
        state[:live] = out.view(live, n, 1, -1)  # a hook on the input makes a new tensor
    first = next_tokens(model, state[:, :, 0])
    return LastToken(prefix, first, torch.tensor(joins, device=device), tuple(layers))


@torch.no_grad()
def follow(
    model: HookedTransformer, start: LastToken, answers: Drafts, slots: Index, prompts: Index
) -> tuple[Index, Index]:
    """How many of its prompt's answer's tokens each run gives itself, and the token that it gives next.

    ``slots`` are ascending. The token after a whole answer has no meaning.
    """
    if not len(slots):
        return slots.clone(), slots.clone()
    prefix, device = start.prefix, slots.device
    targets, real = (t.to(device) for t in pad_right(answers, 0))
    # The untouched runs of these prompts come first: below the layer where an intervention begins, a run
    # is a copy of one of them, at ``base``.
    used, base = prompts.unique(return_inverse=True)
    n = len(used)
    row_slots, row_prompts = torch.cat([torch.zeros_like(used), slots]), torch.cat([used, prompts])
    following = start.first[row_slots, row_prompts][:, None]
    length = targets.shape[1]
    if length > 1:  # else the last prompt token gives all there is
        at = prefix.lengths[row_prompts, None] + torch.arange(1, length, device=device)
        state = torch.empty(*at.shape, model.cfg.d_model, device=device, dtype=model.cfg.dtype)
        state[:n] = embed(model, targets[used, :-1], at[:n])
        live, joins = n, start.joins[slots]
        for layer, block in enumerate(model.blocks):
            # An answer's tokens change where they attend to a changed key of the last prompt token: in
            # the intervention's layer if it changes the layer's input, else in the next. They join in
            # the former, which is correct for both.
            before, live = live, n + int((joins <= layer).sum())
            state[before:live] = state[base[before - n : live - n]]
            past = start.past(layer, row_slots[:live], row_prompts[:live])
            groups = Groups.of(row_prompts[:live])
            # In place: the live part of the state is a view of it.
            run_block(block, state[:live], at[:live], prefix.layers[layer], groups, near=past.then)
        following = torch.cat([following, next_tokens(model, state)], dim=1)
    following = following[n:]
    # A run that differs once is on another path: only the tokens before that count.
    agreed = ((following == targets[prompts]) & real[prompts]).long().cumprod(1).sum(1)
    return agreed, following.gather(1, agreed.clamp(max=length - 1)[:, None])[:, 0]


@torch.no_grad()
def go_on(
    model: HookedTransformer,
    start: LastToken,
    slots: Index,
    prompts: Index,
    known: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """All new tokens of runs, of which the first, at least one each, are already ``known``.

    They end with the end token, after ``max_new_tokens``, or where the context is full.
    """
    eos, device = model.tokenizer.eos_token_id, slots.device
    room = (model.cfg.n_ctx - 1 - start.prefix.lengths[prompts]).clamp(max=max_new_tokens).tolist()
    out = [list(tokens)[:most] for tokens, most in zip(known, room, strict=True)]

    def open_ended(run: int) -> bool:
        return out[run][-1] != eos and len(out[run]) < room[run]

    going = [run for run in range(len(out)) if open_ended(run)]  # the runs that are rows of the batch
    if not going:
        return out
    tokens, real = (t.to(device) for t in pad_right([out[run] for run in going], 0))
    prompts, room_made = prompts[going], tokens.shape[1] + ROOM
    past = (start.past(layer, slots[going], prompts) for layer in range(len(start.layers)))
    layers = [_widened(keys, room_made) for keys in past]
    done = torch.ones(len(going), dtype=torch.long, device=device)  # tokens kept, the prompt's last one
    while True:
        final = _extend(model, start.prefix, prompts, layers, tokens, done)
        last = real.sum(1) - 1
        new = next_tokens(model, final[torch.arange(len(going), device=device), last])
        for run, token in zip(going, new.tolist(), strict=True):
            if open_ended(run):
                out[run].append(token)
        alive = [run for run in going if open_ended(run)]
        if not alive:
            return out
        # A row that has ended stays at its place, inside the context, until it is dropped.
        done = done + (last + 1) * torch.tensor([open_ended(run) for run in going], device=device)
        if len(alive) <= SPARSE * len(going):  # copying costs more than a few idle rows
            rows = torch.tensor([row for row, run in enumerate(going) if open_ended(run)], device=device)
            prompts, layers = prompts[rows], [keys.of(rows) for keys in layers]
            done, new, going = done[rows], new[rows], alive
        tokens, real = new[:, None], torch.ones_like(new, dtype=torch.bool)[:, None]


@torch.no_grad()
def complete(
    model: HookedTransformer,
    start: LastToken,
    drafts: Sequence[Drafts],
    slots: Index,
    prompts: Index,
    *,
    finish: bool | Sequence[bool],
    max_new_tokens: int,
    memory_gb: float | None = None,
) -> Completed:
    """The first draft that each run gives in full, and the tokens of its answer.

    ``slots`` are ascending. What no draft explains has tokens only where the run is to ``finish``.
    """
    device, longest = slots.device, start.prefix.layers[0].at.shape[1]
    at_once = partial(runs_at_once, model, longest, memory_gb=memory_gb)
    first = start.first[slots, prompts]
    choice = torch.full_like(slots, -1)
    # The draft that a run agrees with longest, how long, and the token that follows.
    nearest, agreed, following = torch.full_like(slots, -1), torch.zeros_like(slots), first.clone()
    for number, draft in enumerate(drafts):
        lengths = torch.tensor([len(answer) for answer in draft], device=device)
        begins = torch.tensor([answer[0] if answer else -1 for answer in draft], device=device)
        # The first token is already known, and most runs that give another answer differ there.
        likely = ((choice < 0) & (first == begins[prompts])).nonzero()[:, 0]
        for runs in likely.split(at_once(max(1, int(lengths.max())))):
            agrees, after = follow(model, start, draft, slots[runs], prompts[runs])
            whole = agrees == lengths[prompts[runs]]
            choice[runs[whole]] = number
            better = whole | (agrees > agreed[runs])
            closer = runs[better]
            nearest[closer], agreed[closer], following[closer] = number, agrees[better], after[better]
    begun = [
        drafts[number][prompt][:n] if n else ()
        for number, prompt, n in zip(*(t.tolist() for t in (nearest, prompts, agreed)), strict=True)
    ]
    tokens = [answer if n >= 0 else () for answer, n in zip(begun, choice.tolist(), strict=True)]
    wanted = [finish] * len(slots) if isinstance(finish, bool) else list(finish)
    left = ((choice < 0) & torch.tensor(wanted, dtype=torch.bool, device=device)).nonzero()[:, 0]
    if len(left):
        next_token = following.tolist()
        left = left[agreed[left].argsort(stable=True)]  # a batch's runs are about as far
        for runs in left.split(at_once(max(1, max_new_tokens), kept_layers=model.cfg.n_layers)):
            known = [[*begun[run], next_token[run]] for run in runs.tolist()]
            new = go_on(model, start, slots[runs], prompts[runs], known, max_new_tokens)
            for run, answer in zip(runs.tolist(), new, strict=True):
                tokens[run] = answer
    return choice.tolist(), tokens


def _widened(keys: Keys, room: int) -> Keys:
    """The keys, and empty places for the tokens behind them."""
    empty = keys.keys.new_zeros(*keys.keys.shape[:2], room, keys.keys.shape[3])
    at = keys.at[:, -1:] + 1 + torch.arange(room, device=keys.at.device)
    return keys.then(Keys(empty, empty, at))


def _extend(
    model: HookedTransformer,
    prefix: Prefix,
    prompts: Index,
    layers: list[Keys],
    tokens: Int[Tensor, "run pos"],
    done: Index,
) -> Float[Tensor, "run pos d_model"]:
    """The final residual stream of more tokens, behind ``done`` tokens of each run that have keys.

    ``layers`` are these keys, with room for more, and take the new ones in place: copying all for every
    new token would cost more than the token. Places that are not filled yet lie behind every query.
    """
    column = done[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    place = torch.arange(len(column), device=tokens.device)[:, None], slice(None), column
    at, groups, width = prefix.lengths[prompts, None] + column, Groups.of(prompts), int(column.max()) + 1
    resid = embed(model, tokens, at)
    for layer, (block, far) in enumerate(zip(model.blocks, prefix.layers, strict=True)):
        if width > layers[layer].at.shape[1]:
            layers[layer] = _widened(layers[layer], width)

        def put(new: Keys, kept: Keys = layers[layer]) -> Keys:
            kept.keys[place], kept.values[place] = new.keys.transpose(1, 2), new.values.transpose(1, 2)
            return Keys(kept.keys[:, :, :width], kept.values[:, :, :width], kept.at[:, :width])

        resid = run_block(block, resid, at, far, groups, near=put)
    return resid
