"""The exact sweep: the effect of every patched component on every pair's answer, in one ascending pass.

A patch replaces one component's activation at the last prompt token. What it cannot change is not run:

- the keys and values before that token are computed once a prompt (:mod:`bkdlens.engines.prefix`);
- below the patched layer a run *is* the untouched run, so it joins the batch where it begins to differ;
- a patch of layer l leaves the answer's later positions alone until attention reads the new key of
  layer l + 1: at its own layer a run costs one position's MLP, at the next one that position's
  projections, and only from there on the whole answer;
- only scored tokens are run and unembedded.

So the layers are passed once, with a batch that grows upwards, and no weight is read twice for a
batch. The numbers equal one full forward pass a run; ``reference.sweep`` is that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.prompts import Answer, Prompt, pad_right
from bkdlens.engines import reference
from bkdlens.engines.block import (
    Groups,
    attend,
    attention_out,
    embed,
    finish_block,
    log_probs,
    post_norm,
    precise,
    project,
    supported,
)
from bkdlens.engines.hooks import Patch, check_patches, refuse_foreign_hooks
from bkdlens.engines.memory import batches
from bkdlens.engines.prefix import Prefix, run_common, run_prefix
from bkdlens.progress import track


@dataclass(frozen=True, eq=False)
class SweepScores:
    """Log probability of each pair's answer, untouched and under every patch, in nats.

    ``whole`` is the mean over the answer's tokens, ``first`` the first token's.
    """

    base_whole: Float[Tensor, " pair"]
    base_first: Float[Tensor, " pair"]
    whole: Float[Tensor, "pair patch"]
    first: Float[Tensor, "pair patch"]

    @classmethod
    def of(cls, scores: Float[Tensor, "2 pair run"]) -> SweepScores:
        """Of whole and first-token log probabilities, the untouched run first."""
        return cls(scores[0, :, 0], scores[1, :, 0], scores[0, :, 1:], scores[1, :, 1:])


@torch.no_grad()
def sweep_patches(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    patches: Sequence[Patch],
    *,
    memory_gb: float | None = None,
    progress: bool = False,
) -> SweepScores:
    """Apply every patch, alone, to every prompt and score the prompt's answer.

    Args:
        model: the model; no hooks of anybody's on it.
        prompts: destination prompts, one a pair.
        answers: the scored answer of each pair.
        patches: any, in any order.
        memory_gb: the most memory beside the model; batches are as large as it allows. 2 GB for None
            on a CPU, 80 % of what is free on a GPU.
        progress: whether to show a progress bar.
    """
    refuse_foreign_hooks(model)
    check_patches(model, patches, len(prompts))
    if not supported(model):
        return SweepScores.of(reference.sweep(model, prompts, answers, patches, progress=progress))
    device, n = model.W_E.device, len(prompts)
    order = sorted(range(len(patches)), key=lambda i: patches[i].layer)
    out = torch.full((2, n, 1 + len(patches)), torch.nan, device=device, dtype=precise(model.cfg.dtype))
    common = run_common(model, prompts)
    sizes = [(answer.n_scored, len(prompt.ids)) for prompt, answer in zip(prompts, answers, strict=True)]
    work = batches(model, sizes, len(patches), memory_gb)
    for rows, size in track(list(work), "patching", progress):
        prefix = run_prefix(model, [prompts[i] for i in rows], common)
        own = [answers[i].ids[: answers[i].n_scored] for i in rows]
        for start in range(0, max(1, len(order)), max(1, size)):
            chosen = order[start : start + size]
            scores = _ascend(model, prefix, own, [patches[i].of(rows) for i in chosen])
            at = torch.tensor([0, *(1 + i for i in chosen)], device=device)
            out[:, torch.tensor(rows, device=device)[:, None], at] = scores
    return SweepScores.of(out)


def _ascend(
    model: HookedTransformer,
    prefix: Prefix,
    answers: Sequence[Sequence[int]],
    patches: Sequence[Patch],
) -> Float[Tensor, "2 prompt run"]:
    """Whole and first-token log probability, untouched and of each patch; these are sorted by layer.

    Runs are (slot, prompt), slot by slot. Slot 0 is the untouched run of each prompt; a patch's slot is
    added above the block that it touches, as a copy of slot 0 with another last prompt token.
    """
    cfg, device, n = model.cfg, prefix.last.device, len(prefix)
    targets, scored = pad_right(answers, 0)
    targets, scored = targets.to(device), scored.to(device)
    inputs = torch.cat([prefix.last[:, None], targets[:, :-1]], dim=1)
    at = prefix.lengths[:, None] + torch.arange(targets.shape[1], device=device)
    start = embed(model, inputs, at)
    n_early = sum(patch.layer + 1 < cfg.n_layers for patch in patches)
    state = start.new_empty(1 + n_early, *start.shape)
    state[0] = start
    live, fresh = 1, 0  # slots so far; how many of them were added by the block before
    late = start.new_empty(0, n, cfg.d_model)  # the last layer's patches: the last prompt token alone
    prompt = torch.arange(n, device=device)
    for layer, block in enumerate(model.blocks):
        q, k, v = _project(block, state[:live], fresh, at)
        own = at.repeat(live, 1)
        z = attend(
            block.attn, q, k.transpose(1, 2), v.transpose(1, 2), own, prefix.keys[layer],
            prefix.values[layer], prefix.at, own, Groups.of(prompt.repeat(live)),
        )  # fmt: skip
        attention = attention_out(block, z)
        here = [patch for patch in patches if patch.layer == layer]
        if here:
            late = _patched(block, state[0, :, 0], z[:n, 0], attention[:n, 0], here)
        del q, k, v, z
        finish_block(block, state[:live].flatten(0, 1), post_norm(block, attention))
        fresh = len(here)
        if here and layer + 1 < cfg.n_layers:
            state[live : live + fresh] = state[0]
            state[live : live + fresh, :, 0] = late
            live, late = live + fresh, late[:0]
    probs = start.new_zeros(len(state), *targets.shape, dtype=precise(start.dtype))
    wanted = targets[scored].repeat(live)
    probs[:, scored] = log_probs(model, state[:, scored].flatten(0, 1), wanted).view(live, -1)
    if len(late):
        probs = torch.cat([probs, probs[:1].repeat(len(late), 1, 1)])
        first = log_probs(model, late.flatten(0, 1), targets[:, 0].repeat(len(late)))
        probs[live:, :, 0] = first.view(len(late), n)
    return torch.stack([probs.sum(-1) / scored.sum(1), probs[..., 0]]).transpose(1, 2)


def _project(
    block: Any,
    state: Float[Tensor, "slot prompt pos d_model"],
    fresh: int,
    at: Int[Tensor, "prompt pos"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all runs; ``fresh`` slots share slot 0's but for one position."""
    old, n = len(state) - fresh, len(at)
    whole = project(block, state[:old].flatten(0, 1), at.repeat(old, 1))
    if not fresh:
        return whole
    first = project(block, state[old:, :, :1].flatten(0, 1), at[:, :1].repeat(fresh, 1))
    return tuple(
        torch.cat([t, torch.cat([own, t[:n, 1:].repeat(fresh, 1, 1, 1)], dim=1)])
        for t, own in zip(whole, first, strict=True)
    )  # type: ignore[return-value]


def _patched(
    block: Any,
    resid: Float[Tensor, "prompt d_model"],
    z: Float[Tensor, "prompt head d_head"],
    attention: Float[Tensor, "prompt d_model"],
    patches: Sequence[Patch],
) -> Float[Tensor, "patch prompt d_model"]:
    """The residual stream after the block at the last prompt token, under each of its patches."""
    shape = (len(patches), *resid.shape)
    untouched = post_norm(block, attention)
    attn_out, whole = untouched.repeat(len(patches), 1, 1), resid.new_zeros(shape)
    for i, patch in enumerate(patches):
        value = patch.value.to(resid)
        if patch.head is not None:
            weight, own = block.attn.W_O[patch.head], z[:, patch.head]
            change = (value - own) @ weight if patch.site == "z" else value - own @ weight
            attn_out[i] = post_norm(block, attention + change)
        elif patch.site == "attn_out":
            attn_out[i] = value
        else:
            whole[i] = resid + untouched + value
    start = resid.expand(shape).reshape(-1, 1, shape[-1]).clone()
    out = finish_block(block, start, attn_out.view_as(start)).view(shape)
    replaced = [i for i, patch in enumerate(patches) if patch.site == "mlp_out"]
    out[replaced] = whole[replaced]
    return out
