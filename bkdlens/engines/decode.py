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

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.prompts import pad_right
from bkdlens.engines.block import (
    Groups,
    attend,
    attention_out,
    embed,
    finish_block,
    next_tokens,
    post_norm,
    project,
)
from bkdlens.engines.hooks import NOTHING, Intervention, layer_hooks
from bkdlens.engines.memory import runs_at_once
from bkdlens.engines.prefix import Prefix

Index = Int[Tensor, " run"]
Drafts = Sequence[Sequence[int]]
Completed = tuple[list[int], list[Sequence[int]]]
SPARSE = 0.75  # share of rows still decoding below which the others are dropped


@dataclass(frozen=True, eq=False)
class LastToken:
    """The last prompt token of every run: what it says next, and its keys and values by layer.

    ``reached[layer]`` is how many slots differ from slot 0 at the layer's keys, slot 0 included;
    ``keys[layer]`` has only these.
    """

    prefix: Prefix
    first: Int[Tensor, "slot prompt"]
    joins: Int[Tensor, " slot"]
    keys: tuple[Float[Tensor, "_ kv_head 1 d_head"], ...]
    values: tuple[Float[Tensor, "_ kv_head 1 d_head"], ...]

    def past(self, layer: int, slots: Index, prompts: Index) -> tuple[Tensor, Tensor]:
        """Keys and values of some runs, ``[run kv_head 1 d_head]``."""
        n = len(self.prefix)
        reached = len(self.keys[layer]) // n
        at = torch.where(slots < reached, slots, 0) * n + prompts
        return self.keys[layer][at], self.values[layer][at]


@torch.no_grad()
def run_last_token(
    model: HookedTransformer,
    prefix: Prefix,
    interventions: Sequence[Intervention],
    rows: Sequence[int],
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
    keys: list[Tensor] = []
    values: list[Tensor] = []
    live = 1
    for layer, block in enumerate(model.blocks):
        before, live = live, sum(join <= layer for join in joins)
        state[before:live] = state[0]
        hooks = dict(layer_hooks(model, slots[:live], n, layer, 0, rows=rows))

        def apply(site: str, activation: Tensor, hooks: dict = hooks, layer: int = layer) -> Tensor:
            hook = hooks.get(get_act_name(site, layer))
            return activation if hook is None else hook(activation, hook=None)

        resid = apply("resid_pre", state[:live].flatten(0, 1))
        own = at.repeat(live, 1)
        q, k, v = project(block, resid, own)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        keys.append(k)
        values.append(v)
        groups = Groups.of(torch.arange(n, device=device).repeat(live))
        z = attend(
            block.attn, q, k, v, own, prefix.keys[layer], prefix.values[layer], prefix.at, own, groups
        )
        attention = post_norm(block, attention_out(block, apply("z", z)))
        out = finish_block(block, resid, apply("attn_out", attention))
        state[:live] = out.view(live, n, 1, -1)
    first = next_tokens(model, state[:, :, 0])
    return LastToken(prefix, first, torch.tensor(joins, device=device), tuple(keys), tuple(values))


@torch.no_grad()
def follow(
    model: HookedTransformer,
    start: LastToken,
    answers: Sequence[Sequence[int]],
    slots: Index,
    prompts: Index,
) -> tuple[Index, Index]:
    """How many tokens of its prompt's answer each run gives itself, and what it says after these.

    ``slots`` are ascending. What follows a whole answer has no meaning.
    """
    if not len(slots):
        return slots.clone(), slots.clone()
    prefix, device = start.prefix, slots.device
    targets, real = (t.to(device) for t in pad_right(answers, 0))
    used, base = prompts.unique(return_inverse=True)  # untouched runs of these prompts come first
    n = len(used)
    row_slots = torch.cat([torch.zeros_like(used), slots])
    row_prompts = torch.cat([used, prompts])
    said = start.first[row_slots, row_prompts][:, None]
    length = targets.shape[1]
    if length > 1:
        inputs = targets[used, :-1]
        at = prefix.lengths[row_prompts, None] + torch.arange(length, device=device)
        state = torch.empty(
            len(row_slots), length - 1, model.cfg.d_model, device=device, dtype=model.cfg.dtype
        )
        state[:n] = embed(model, inputs, at[:n, 1:])
        live = n
        joins = start.joins[slots]
        for layer, block in enumerate(model.blocks):
            before, live = live, n + int((joins <= layer).sum())
            state[before:live] = state[base[before - n : live - n]]
            q, k, v = project(block, state[:live], at[:live, 1:])
            past = start.past(layer, row_slots[:live], row_prompts[:live])
            k, v = (
                torch.cat([old, new.transpose(1, 2)], dim=2)
                for old, new in zip(past, (k, v), strict=True)
            )
            z = attend(
                block.attn, q, k, v, at[:live], prefix.keys[layer], prefix.values[layer], prefix.at,
                at[:live, 1:], Groups.of(row_prompts[:live]),
            )  # fmt: skip
            attention = post_norm(block, attention_out(block, z))
            state[:live] = finish_block(block, state[:live], attention)
        said = torch.cat([said, next_tokens(model, state)], dim=1)
    said = said[n:]
    wanted, real = targets[prompts], real[prompts]
    agreed = ((said == wanted) & real).long().cumprod(1).sum(1)
    return agreed, said.gather(1, agreed.clamp(max=length - 1)[:, None])[:, 0]


@torch.no_grad()
def go_on(
    model: HookedTransformer,
    start: LastToken,
    slots: Index,
    prompts: Index,
    said: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """All new tokens of runs that have ``said`` some (at least one) already.

    Rows end with their end-of-sequence token, after ``max_new_tokens``, or where the context is full.
    """
    prefix, cfg, device = start.prefix, model.cfg, slots.device
    eos = model.tokenizer.eos_token_id
    room = (cfg.n_ctx - 1 - prefix.lengths[prompts]).clamp(max=max_new_tokens).tolist()
    out = [list(tokens)[:most] for tokens, most in zip(said, room, strict=True)]

    def open_ended(run: int) -> bool:
        return out[run][-1] != eos and len(out[run]) < room[run]

    going = [run for run in range(len(out)) if open_ended(run)]
    tokens, real = pad_right([out[run] for run in going] or [[0]], 0)
    tokens, real = tokens.to(device), real.to(device)
    kept = _Kept.of(start, slots[going], prompts[going], tokens.shape[1])
    done = torch.ones(len(going), dtype=torch.long, device=device)
    alive = list(going)
    while alive:
        final = kept.extend(model, tokens, done)
        new = next_tokens(model, final[torch.arange(len(going), device=device), real.sum(1) - 1])
        for run, token in zip(going, new.tolist(), strict=True):
            if open_ended(run):
                out[run].append(token)
        alive = [run for run in going if open_ended(run)]
        # A row that has ended stays where it is, inside the context, until it is dropped.
        done = done + real.sum(1) * torch.tensor([open_ended(run) for run in going], device=device)
        if alive and len(alive) <= SPARSE * len(going):  # copying costs more than a few idle rows
            rows = torch.tensor([row for row, run in enumerate(going) if open_ended(run)], device=device)
            kept, done, new, going = kept.of_rows(rows), done[rows], new[rows], alive
        tokens, real = new[:, None], torch.ones_like(new, dtype=torch.bool)[:, None]
    return out


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
    """Which of the likely answers each run gives in full (-1 for none), and the tokens of its answer.

    Args:
        model: the model.
        start: the runs' last prompt tokens.
        drafts: sets of likely answers, each with one a prompt, an end token included.
        slots: of each run, ascending.
        prompts: of each run.
        finish: decode what no draft explains; otherwise it has no tokens.
        max_new_tokens: where an answer that does not end is cut.
        memory_gb: as in :func:`bkdlens.engines.generate.decode`.
    """
    device, longest = slots.device, start.prefix.at.shape[1]
    first = start.first[slots, prompts]
    choice, agreed = torch.full_like(slots, -1), torch.zeros_like(slots)
    nearest, following = torch.full_like(slots, -1), first.clone()
    for number, draft in enumerate(drafts):
        lengths = torch.tensor([len(answer) for answer in draft], device=device)
        begins = torch.tensor([answer[0] if answer else -1 for answer in draft], device=device)
        likely = ((choice < 0) & (first == begins[prompts])).nonzero()[:, 0]
        for runs in likely.split(runs_at_once(model, longest, max(1, int(lengths.max())), memory_gb)):
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
        left, layers = (choice < 0).nonzero()[:, 0], model.cfg.n_layers
        left = left[agreed[left].argsort(stable=True)]  # runs of one batch have said about as much
        for runs in left.split(runs_at_once(model, longest, max(1, max_new_tokens), memory_gb, layers)):
            known = zip(*(t[runs].tolist() for t in (nearest, prompts, agreed, following)), strict=True)
            said = [[*(drafts[d][p][:m] if m else ()), token] for d, p, m, token in known]
            new = go_on(model, start, slots[runs], prompts[runs], said, max_new_tokens)
            for run, answer in zip(runs.tolist(), new, strict=True):
                tokens[run] = answer
    return choice.tolist(), tokens


@dataclass(frozen=True, eq=False)
class _Kept:
    """Keys and values of runs' own tokens, the last prompt token first, with room for more."""

    start: LastToken
    prompts: Index
    keys: list[Float[Tensor, "run kv_head place d_head"]]
    values: list[Float[Tensor, "run kv_head place d_head"]]

    @classmethod
    def of(cls, start: LastToken, slots: Index, prompts: Index, more: int) -> _Kept:
        both: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer in range(len(start.keys)):
            for kept, first in zip(both, start.past(layer, slots, prompts), strict=True):
                room = first.new_zeros(*first.shape[:2], more + 16, first.shape[3])
                kept.append(torch.cat([first, room], dim=2))
        return cls(start, prompts, *both)

    def of_rows(self, rows: Int[Tensor, " row"]) -> _Kept:
        """Some of the runs."""
        keys, values = ([t[rows] for t in side] for side in (self.keys, self.values))
        return _Kept(self.start, self.prompts[rows], keys, values)

    def extend(
        self, model: HookedTransformer, tokens: Int[Tensor, "run pos"], done: Index
    ) -> Float[Tensor, "run pos d_model"]:
        """Run more tokens, behind ``done`` tokens of each run's own; the final residual stream."""
        prefix = self.start.prefix
        place = done[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        width = int(place.max()) + 1
        lengths = prefix.lengths[self.prompts, None]
        # A place that a run has not filled yet lies behind all its queries, which do not see it.
        near_at = lengths + torch.arange(width, device=tokens.device)
        at, run = lengths + place, torch.arange(len(tokens), device=tokens.device)[:, None]
        groups = Groups.of(self.prompts)
        resid = embed(model, tokens, at)
        for layer, block in enumerate(model.blocks):
            q, k, v = project(block, resid, at)
            for side, new in ((self.keys, k), (self.values, v)):
                if width > side[layer].shape[2]:
                    side[layer] = torch.cat([side[layer], torch.zeros_like(side[layer])], dim=2)
                side[layer][run, :, place] = new
            z = attend(
                block.attn, q, self.keys[layer][:, :, :width], self.values[layer][:, :, :width],
                near_at, prefix.keys[layer], prefix.values[layer], prefix.at, at, groups,
            )  # fmt: skip
            resid = finish_block(block, resid, post_norm(block, attention_out(block, z)))
        return resid
