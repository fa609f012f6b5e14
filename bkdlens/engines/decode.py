"""Greedy decoding of many interventions on one prompt, identical to plain greedy decoding.

An intervention touches the last prompt token in the prefill only. So for all interventions on a prompt
the keys and values before that token are shared (:mod:`bkdlens.engines.prefix`), and then

1. :func:`run_last_token` runs that one token under every intervention, each from the first layer that
   it touches;
2. :func:`follow` checks a likely answer in one parallel pass, as far as a run would say it itself
   (speculative decoding with a known draft: Leviathan et al. 2023); positions of the answer that an
   intervention has not reached yet are shared with the untouched run;
3. :func:`go_on` decodes token by token, from the first disagreement, what no likely answer explains.

:func:`complete` is the three in order.

A run is a (slot, prompt): slot 0 is the untouched model, the others are interventions in the order of
the first layer that they touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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
Drafts = Sequence[Sequence[int]]  # a likely answer of each prompt; an empty one explains nothing
SPARSE = 0.75  # share of rows still decoding below which the others are dropped
ROOM = 16  # new tokens for which there is room at first; it is doubled when they are not enough


class Completed(NamedTuple):
    """Runs' answers: the first of the drafts that each gives in full (-1 for none), and its tokens."""

    choice: list[int]
    tokens: list[Sequence[int]]


@dataclass(frozen=True, eq=False)
class LastToken:
    """The last prompt token of every run.

    Attributes:
        prefix: what lies before it.
        first: what each run says next, the first token of its answer.
        joins: the layer in which a slot begins to differ from slot 0; -1 for that one.
        layers: the token's own keys by layer, slot by slot. A layer has only the slots that differ from
            slot 0 there, itself included: the others' keys are slot 0's.
    """

    prefix: Prefix
    first: Int[Tensor, "slot prompt"]
    joins: Int[Tensor, " slot"]
    layers: tuple[Keys, ...]

    def past(self, layer: int, slots: Index, prompts: Index) -> Keys:
        """The token's keys of some runs in one layer."""
        n = len(self.prefix)
        reached = len(self.layers[layer].at) // n
        return self.layers[layer].of(torch.where(slots < reached, slots, 0) * n + prompts)


@torch.no_grad()
def run_last_token(
    model: HookedTransformer, prefix: Prefix, interventions: Sequence[Intervention], rows: Sequence[int]
) -> LastToken:
    """Run the last prompt token under nothing (slot 0) and under interventions sorted by first layer.

    ``rows`` are the prefix' prompts among those for which an intervention has values.
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
        hooks = dict(layer_hooks(model, slots[:live], n, layer, 0, rows=rows))

        def act(site: str, activation: Tensor, hooks: dict = hooks, layer: int = layer) -> Tensor:
            hook = hooks.get(get_act_name(site, layer))
            return activation if hook is None else hook(activation, hook=None)

        resid, live_at = state[:live].flatten(0, 1), at.repeat(live, 1)
        groups = Groups.of(torch.arange(n, device=device).repeat(live))
        far = prefix.layers[layer]
        out = run_block(block, resid, live_at, far, groups, near=remember, touch=act)
        state[:live] = out.view(live, n, 1, -1)  # a hook on the input makes another tensor of it
    first = next_tokens(model, state[:, :, 0])
    return LastToken(prefix, first, torch.tensor(joins, device=device), tuple(layers))


@torch.no_grad()
def follow(
    model: HookedTransformer, start: LastToken, answers: Drafts, slots: Index, prompts: Index
) -> tuple[Index, Index]:
    """How many tokens of its prompt's answer each run gives itself, and what it says after these.

    ``slots`` are ascending. What follows a whole answer has no meaning.
    """
    if not len(slots):
        return slots.clone(), slots.clone()
    prefix, device = start.prefix, slots.device
    targets, real = (t.to(device) for t in pad_right(answers, 0))
    # The untouched runs of these prompts come first: the others are their copies below the layer where
    # an intervention begins. ``base`` is where each run's is.
    used, base = prompts.unique(return_inverse=True)
    n = len(used)
    row_slots, row_prompts = torch.cat([torch.zeros_like(used), slots]), torch.cat([used, prompts])
    says = start.first[row_slots, row_prompts][:, None]
    length = targets.shape[1]
    if length > 1:  # else the last prompt token has said all there is
        at = prefix.lengths[row_prompts, None] + torch.arange(1, length, device=device)
        state = torch.empty(*at.shape, model.cfg.d_model, device=device, dtype=model.cfg.dtype)
        state[:n] = embed(model, targets[used, :-1], at[:n])
        live, joins = n, start.joins[slots]
        for layer, block in enumerate(model.blocks):
            # An answer's tokens change where they attend to a changed key of the last prompt token: in
            # the intervention's layer if that changes the layer's input, else in the next. They join
            # in the former, which is right for both.
            before, live = live, n + int((joins <= layer).sum())
            state[before:live] = state[base[before - n : live - n]]
            past = start.past(layer, row_slots[:live], row_prompts[:live])
            groups = Groups.of(row_prompts[:live])
            # In place: what is live of the state is a view of it.
            run_block(block, state[:live], at[:live], prefix.layers[layer], groups, near=past.then)
        says = torch.cat([says, next_tokens(model, state)], dim=1)
    says = says[n:]
    # A run that differs once is on a path of its own: only the tokens before that count.
    agreed = ((says == targets[prompts]) & real[prompts]).long().cumprod(1).sum(1)
    return agreed, says.gather(1, agreed.clamp(max=length - 1)[:, None])[:, 0]


@torch.no_grad()
def go_on(
    model: HookedTransformer,
    start: LastToken,
    slots: Index,
    prompts: Index,
    known: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """All new tokens of runs of which some (at least one) are ``known`` already.

    Rows end with their end-of-sequence token, after ``max_new_tokens``, or where the context is full.
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
    kept = _Kept.of(start, slots[going], prompts[going], tokens.shape[1] + ROOM)
    done = torch.ones(len(going), dtype=torch.long, device=device)  # tokens kept, the prompt's last one
    while True:
        final = kept.extend(model, tokens, done)
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
            kept, done, new, going = kept.of_rows(rows), done[rows], new[rows], alive
        tokens, real = new[:, None], torch.ones_like(new, dtype=torch.bool)[:, None]


@torch.no_grad()
def complete(
    model: HookedTransformer,
    start: LastToken,
    drafts: Sequence[Drafts],
    slots: Index,
    prompts: Index,
    *,
    finish: bool,
    max_new_tokens: int,
    memory_gb: float | None = None,
) -> Completed:
    """Which of the likely answers each run gives in full, and the tokens of its answer.

    Args:
        model: the model.
        start: the runs' last prompt tokens.
        drafts: sets of likely answers, each with one per prompt, an end token included.
        slots: of each run, ascending.
        prompts: of each run.
        finish: decode what no draft explains; otherwise it has no tokens.
        max_new_tokens: where an answer that does not end is cut.
        memory_gb: as in :func:`bkdlens.engines.generate.decode`.
    """
    device, longest = slots.device, start.prefix.layers[0].at.shape[1]
    at_once = partial(runs_at_once, model, longest, memory_gb=memory_gb)
    first = start.first[slots, prompts]
    choice = torch.full_like(slots, -1)
    # Of what no draft explains in full: the draft that goes furthest, how far, and what comes then.
    nearest, agreed, following = torch.full_like(slots, -1), torch.zeros_like(slots), first.clone()
    for number, draft in enumerate(drafts):
        lengths = torch.tensor([len(answer) for answer in draft], device=device)
        begins = torch.tensor([answer[0] if answer else -1 for answer in draft], device=device)
        # The first token is known already, and most runs that say something else differ there.
        likely = ((choice < 0) & (first == begins[prompts])).nonzero()[:, 0]
        for runs in likely.split(at_once(max(1, int(lengths.max())))):
            same, after = follow(model, start, draft, slots[runs], prompts[runs])
            whole = same == lengths[prompts[runs]]
            choice[runs[whole]] = number
            better = ~whole & (same > agreed[runs])
            agreed[runs[better]], following[runs[better]] = same[better], after[better]
            nearest[runs[better]] = number
    tokens: list[Sequence[int]] = [
        drafts[number][p] if number >= 0 else ()
        for number, p in zip(choice.tolist(), prompts.tolist(), strict=True)
    ]
    if finish:
        left = (choice < 0).nonzero()[:, 0]
        left = left[agreed[left].argsort(stable=True)]  # runs of one batch have said about as much
        for runs in left.split(at_once(max(1, max_new_tokens), kept_layers=model.cfg.n_layers)):
            known = [
                [*(drafts[draft][prompt][:n] if n else ()), token]
                for draft, prompt, n, token in zip(
                    *(t[runs].tolist() for t in (nearest, prompts, agreed, following)), strict=True
                )
            ]
            new = go_on(model, start, slots[runs], prompts[runs], known, max_new_tokens)
            for run, answer in zip(runs.tolist(), new, strict=True):
                tokens[run] = answer
    return Completed(choice.tolist(), tokens)


@dataclass(frozen=True, eq=False)
class _Kept:
    """Keys and values of runs' own tokens by layer, the last prompt token first, with room for more.

    They are written in place, and replaced where the room is full: copying all for every new token
    would cost more than the token.
    """

    prefix: Prefix
    prompts: Index  # of each run
    keys: list[Float[Tensor, "run kv_head place d_head"]]
    values: list[Float[Tensor, "run kv_head place d_head"]]

    @classmethod
    def of(cls, start: LastToken, slots: Index, prompts: Index, room: int) -> _Kept:
        """The last prompt token of some runs, and empty places behind it."""
        past = [start.past(layer, slots, prompts) for layer in range(len(start.layers))]

        def widened(first: Tensor) -> Tensor:
            return torch.cat([first, first.new_zeros(*first.shape[:2], room, first.shape[3])], dim=2)

        keys, values = [widened(p.keys) for p in past], [widened(p.values) for p in past]
        return cls(start.prefix, prompts, keys, values)

    def of_rows(self, rows: Int[Tensor, " row"]) -> _Kept:
        """Some of the runs."""
        keys, values = ([t[rows] for t in side] for side in (self.keys, self.values))
        return _Kept(self.prefix, self.prompts[rows], keys, values)

    def put(self, new: Keys, layer: int, place: tuple, at: Int[Tensor, "run _"]) -> Keys:
        """Write new keys of a layer at their place; all that the runs see of their own, ``at`` where."""
        width = at.shape[1]
        for side, added in ((self.keys, new.keys), (self.values, new.values)):
            if width > side[layer].shape[2]:
                side[layer] = torch.cat([side[layer], torch.zeros_like(side[layer])], dim=2)
            side[layer][place] = added.transpose(1, 2)
        return Keys(self.keys[layer][:, :, :width], self.values[layer][:, :, :width], at)

    def extend(
        self, model: HookedTransformer, tokens: Int[Tensor, "run pos"], done: Index
    ) -> Float[Tensor, "run pos d_model"]:
        """Run more tokens, behind ``done`` tokens of each run's own; the final residual stream."""
        device, lengths = tokens.device, self.prefix.lengths[self.prompts, None]
        column = done[:, None] + torch.arange(tokens.shape[1], device=device)
        # A place that a run has not filled yet lies behind all its queries, which do not see it.
        near_at = lengths + torch.arange(int(column.max()) + 1, device=device)
        place = torch.arange(len(column), device=device)[:, None], slice(None), column
        at, groups = lengths + column, Groups.of(self.prompts)
        resid = embed(model, tokens, at)
        for layer, block in enumerate(model.blocks):
            put = partial(self.put, layer=layer, place=place, at=near_at)
            resid = run_block(block, resid, at, self.prefix.layers[layer], groups, near=put)
        return resid
