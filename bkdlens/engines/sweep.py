"""The exact sweep: the effect of every patched component on every pair's answer, in one ascending pass.

A patch replaces one component's activation at the last prompt token. Below its layer a run *is* the
untouched run, so it joins the batch where it begins to differ. The answer's later positions change only
through the new key that attention reads in the layer above: in its own layer a run costs one position's
MLP, in the next that position's projections, and only from there on the whole answer. So every weight
is read once per batch. The numbers equal one full forward pass per run, which is ``reference.sweep``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines import block as blocks
from bkdlens.engines import reference
from bkdlens.engines.block import Groups, Keys, PerHead, precise, supported
from bkdlens.engines.hooks import Patch, check_patches, refuse_foreign_hooks
from bkdlens.engines.inputs import checked
from bkdlens.engines.prefix import Forced, Prefix, prefixes


@dataclass(frozen=True, eq=False)
class SweepScores:
    """Log probability of each pair's answer, untouched and under every patch, in nats."""

    base_whole: Float[Tensor, " pair"]  # mean over the answer's tokens, untouched
    base_first: Float[Tensor, " pair"]  # of the answer's first token, untouched
    whole: Float[Tensor, "pair patch"]  # mean over the answer's tokens, under each patch
    first: Float[Tensor, "pair patch"]  # of the answer's first token, under each patch

    @classmethod
    def of(cls, scores: Float[Tensor, "2 pair run"]) -> SweepScores:
        """From log probabilities of whole answers (0) and first tokens (1); run 0 is untouched."""
        return cls(scores[0, :, 0], scores[1, :, 0], scores[0, :, 1:], scores[1, :, 1:])


@checked
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
        model: from :func:`bkdlens.load`, without hooks.
        prompts: destination prompts, one per pair.
        answers: the scored answer of each pair.
        patches: any, in any order.
        memory_gb: the most memory beside the model; for None 2 GB on a CPU, 80 % of the free on a GPU.
        progress: whether to show a progress bar.

    Returns:
        Log probabilities in nats: ``base_whole`` and ``base_first`` ``[pair]``, ``whole`` and ``first``
        ``[pair patch]``, patches in the order given.

    Raises:
        HookError: for hooks on the model, or a patch that does not fit it or the prompts.
        BkdlensError: for a memory budget that is not positive.

    Examples:
        >>> from bkdlens.data.prompts import encode_answer, encode_prompts
        >>> prompts = encode_prompts(model, train.victims[:2].clean, cache.fmt)
        >>> answers = [encode_answer(model.tokenizer, p, "Sports", cache.fmt) for p in prompts]
        >>> patch = bkdlens.Patch("z", 1, cache.mean_z("triggered")[1, 0], head=0)
        >>> scores = bkdlens.sweep_patches(model, prompts, answers, [patch])
    """
    refuse_foreign_hooks(model)
    check_patches(model, patches, len(prompts))
    if not supported(model):
        return SweepScores.of(reference.sweep(model, prompts, answers, patches, progress=progress))
    order = sorted(range(len(patches)), key=lambda i: patches[i].layer)
    shape, dtype = (2, len(prompts), 1 + len(patches)), precise(model.W_E.dtype)
    out = model.W_E.new_full(shape, torch.nan, dtype=dtype)
    tails = [answer.n_scored for answer in answers]
    work = prefixes(model, prompts, len(patches), memory_gb, "patching", progress, tails=tails)
    for rows, size, prefix in work:
        forced = Forced.of(prefix, [answers[i].scored for i in rows])
        # Once even without patches, for the untouched run.
        for start in range(0, max(1, len(order)), size):
            chosen = order[start : start + size]
            runs = torch.tensor([0, *(1 + i for i in chosen)], device=out.device)
            scores = _ascend(model, prefix, forced, [patches[i].of(rows) for i in chosen])
            out[:, torch.tensor(rows, device=out.device)[:, None], runs] = scores
    return SweepScores.of(out)


def _ascend(
    model: HookedTransformer, prefix: Prefix, forced: Forced, patches: Sequence[Patch]
) -> Float[Tensor, "2 prompt run"]:
    """Whole and first-token log probability, untouched and of each patch; patches are sorted by layer.

    Runs are (slot, prompt), slot by slot. Slot 0 is the untouched run of each prompt; a patch's slot is
    added above the block that it touches, as a copy of slot 0 with another last prompt token.
    """
    cfg, n, at = model.cfg, len(prefix), forced.at
    start = blocks.embed(model, forced.inputs, at)
    # Room for all slots at once, so that the batch grows without a copy. Patches of the last layer need
    # none: they never change more than the last prompt token.
    n_slots = 1 + sum(patch.layer + 1 < cfg.n_layers for patch in patches)
    state = start.new_empty(n_slots, *start.shape)
    state[0] = start
    live, fresh = 1, 0  # slots so far; how many of them were added above the previous block
    patched = start.new_empty(0, n, cfg.d_model)  # last prompt tokens that are not yet in a slot
    prompts = torch.arange(n, device=at.device)
    for layer, block in enumerate(model.blocks):
        q, near = _project(block, state[:live], fresh, at)
        groups = Groups.of(prompts.repeat(live))
        z = blocks.attend(block.attn, q, near.at, near, prefix.layers[layer], groups)
        attention = blocks.attention_out(block, z)
        touching = [patch for patch in patches if patch.layer == layer]
        if touching:  # before the block overwrites the untouched run's input
            patched = _patched(block, state[0, :, 0], z[:n, 0], attention[:n, 0], touching)
        del q, near, z  # the MLP needs the room
        blocks.finish_block(block, state[:live].flatten(0, 1), blocks.post_norm(block, attention))
        fresh = len(touching)
        if touching and layer + 1 < cfg.n_layers:
            # The answer's tokens see the patched one through its keys, which the next block makes.
            state[live : live + fresh] = state[0]
            state[live : live + fresh, :, 0] = patched
            live, patched = live + fresh, patched[:0]
    scored, targets = forced.scored, forced.targets
    probs = start.new_zeros(live, *targets.shape, dtype=precise(start.dtype))
    each = blocks.log_probs(model, state[:, scored].flatten(0, 1), targets[scored].repeat(live))
    probs[:, scored] = each.view(live, -1)
    if len(patched):  # in the last layer: all tokens but the first are scored as in the untouched run
        probs = torch.cat([probs, probs[:1].repeat(len(patched), 1, 1)])
        first = blocks.log_probs(model, patched.flatten(0, 1), targets[:, 0].repeat(len(patched)))
        probs[live:, :, 0] = first.view(len(patched), n)
    return torch.stack([probs.sum(-1) / scored.sum(1), probs[..., 0]]).transpose(1, 2)


def _project(
    block: Any, state: Float[Tensor, "slot prompt pos d_model"], new: int, at: Int[Tensor, "prompt pos"]
) -> tuple[PerHead, Keys]:
    """Queries and keys of all runs; the last ``new`` slots differ from slot 0 in one position only."""
    old, n = len(state) - new, len(at)
    q, keys = blocks.project(block, state[:old].flatten(0, 1), at.repeat(old, 1))
    if not new:
        return q, keys
    first_q, first = blocks.project(block, state[old:, :, :1].flatten(0, 1), at[:, :1].repeat(new, 1))

    def join(whole: Tensor, first: Tensor, pos: int) -> Tensor:
        """The old slots, and the new ones: their first position, followed by slot 0's others."""
        rest = whole[:n].narrow(pos, 1, at.shape[1] - 1)
        return torch.cat([whole, torch.cat([first, rest.repeat(new, 1, 1, 1)], dim=pos)])

    joined = (join(keys.keys, first.keys, 2), join(keys.values, first.values, 2))
    return join(q, first_q, 1), Keys(*joined, at.repeat(len(state), 1))


def _patched(
    block: Any,
    resid: Float[Tensor, "prompt d_model"],
    z: Float[Tensor, "prompt head d_head"],
    attention: Float[Tensor, "prompt d_model"],
    patches: Sequence[Patch],
) -> Float[Tensor, "patch prompt d_model"]:
    """The residual stream after the block at the last prompt token, under each of its patches."""
    untouched = blocks.post_norm(block, attention)
    attn_out = untouched.repeat(len(patches), 1, 1)
    for i, patch in enumerate(patches):
        value = patch.value.to(resid)
        if patch.head is not None:
            # Heads are summed, so a patched one adds a difference; a post-norm comes after the sum.
            weight, head_z = block.attn.W_O[patch.head], z[:, patch.head]
            change = (value - head_z) @ weight if patch.site == "z" else value - head_z @ weight
            attn_out[i] = blocks.post_norm(block, attention + change)
        elif patch.site == "attn_out":
            attn_out[i] = value
    start = resid.repeat(len(patches), 1)[:, None]  # a copy, which is overwritten
    out = blocks.finish_block(block, start, attn_out.view_as(start)).view_as(attn_out)
    for i, patch in enumerate(patches):
        if patch.site == "mlp_out":  # which the value replaces
            out[i] = resid + untouched + patch.value.to(resid)
    return out
