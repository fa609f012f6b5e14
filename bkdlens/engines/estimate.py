"""Attribution patching: a first-order estimate of every patch, from one forward and one backward a pair.

Source: Nanda (2023), Attribution Patching; Kramár et al. (2024), AtP*. The effect of replacing an
activation ``a`` by ``a'`` at the last prompt token is estimated as ``(a' - a) · ∂ log P / ∂ a``. Keys
and values before that token do not depend on it, so the backward pass covers the answer alone: about
P + 3T token passes a pair with P prompt and T answer tokens, whatever the number of heads.

The estimate is blind where the gradient is: at a saturated softmax, and for effects that need a large
step. :mod:`bkdlens.engines.sweep` has the exact numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.prompts import Answer, Prompt, pad_right
from bkdlens.engines.block import (
    Groups,
    attend,
    attention_out,
    embed,
    log_probs,
    mlp_out,
    post_norm,
    precise,
    project,
    supported,
)
from bkdlens.engines.hooks import Patch, check_patches, refuse_foreign_hooks
from bkdlens.engines.memory import batches
from bkdlens.engines.prefix import Prefix, run_common, run_prefix
from bkdlens.engines.sweep import SweepScores
from bkdlens.errors import HookError
from bkdlens.progress import track

Slopes = dict[str, list[tuple[Tensor, Tensor]]]  # by site and layer: the activation, its gradient


@torch.inference_mode(False)  # whose tensors the backward pass could not use
@torch.no_grad()
def estimate(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    patches: Sequence[Patch],
    *,
    memory_gb: float | None = None,
    progress: bool = False,
) -> SweepScores:
    """The scores of :func:`bkdlens.engines.sweep.sweep_patches` to first order, cut at probability 1.

    The untouched scores are exact. The arguments are those of the sweep.

    Raises:
        HookError: for an architecture that :mod:`bkdlens.engines.block` does not know.
    """
    refuse_foreign_hooks(model)
    check_patches(model, patches, len(prompts))
    if not supported(model):
        raise HookError(
            f"Attribution patching does not know {model.cfg.original_architecture or 'this model'}; "
            "use method='exact'."
        )
    device, dtype = model.W_E.device, precise(model.cfg.dtype)
    out = torch.full((2, len(prompts), 1 + len(patches)), torch.nan, device=device, dtype=dtype)
    common = run_common(model, prompts)
    # The backward pass needs what every layer computed: as much as so many runs.
    sizes = [(answer.n_scored, len(prompt.ids)) for prompt, answer in zip(prompts, answers, strict=True)]
    work = batches(model, sizes, 3 * model.cfg.n_layers, memory_gb)
    for rows, _ in track(list(work), "attribution patching", progress):
        prefix = run_prefix(model, [prompts[i] for i in rows], common)
        own = [answers[i].ids[: answers[i].n_scored] for i in rows]
        here = [patch.of(rows) for patch in patches]
        for which, forced in enumerate((own, [answer[:1] for answer in own])):
            base, slopes = _slopes(model, prefix, forced)
            change = [_first_order(model, slopes, patch) for patch in here]
            scores = torch.stack([base, *(base + c for c in change)], dim=1).clamp(max=0)
            out[which, rows] = scores
    return SweepScores.of(out)


def _slopes(
    model: HookedTransformer, prefix: Prefix, answers: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, " prompt"], Slopes]:
    """Log probability per token of forced answers, and its gradients at the last prompt token."""
    device = prefix.last.device
    targets, scored = pad_right(answers, 0)
    targets, scored = targets.to(device), scored.to(device)
    inputs = torch.cat([prefix.last[:, None], targets[:, :-1]], dim=1)
    at = prefix.lengths[:, None] + torch.arange(targets.shape[1], device=device)
    groups = Groups.of(torch.arange(len(prefix), device=device))
    kept: dict[str, list[Tensor]] = {"z": [], "result": [], "attn_out": [], "mlp_out": []}
    with torch.enable_grad():
        resid = embed(model, inputs, at).detach().requires_grad_()
        for layer, block in enumerate(model.blocks):
            q, k, v = project(block, resid, at)
            z = attend(
                block.attn, q, k.transpose(1, 2), v.transpose(1, 2), at, prefix.keys[layer],
                prefix.values[layer], prefix.at, at, groups,
            )  # fmt: skip
            result = attention_out(block, z)
            attention = post_norm(block, result)
            middle = resid + attention
            mlp = mlp_out(block, resid if model.cfg.parallel_attn_mlp else middle)
            resid = middle + mlp
            for site, value in zip(kept, (z, result, attention, mlp), strict=True):
                kept[site].append(value)
        probs = torch.zeros(targets.shape, device=device, dtype=precise(resid.dtype))
        probs = probs.masked_scatter(scored, log_probs(model, resid[scored], targets[scored]))
        whole = probs.sum(1) / scored.sum(1)
        values = [value for site in kept.values() for value in site]
        gradients = iter(torch.autograd.grad(whole.sum(), values))
    slopes = {
        site: [(value.detach()[:, 0], next(gradients)[:, 0]) for value in values]
        for site, values in kept.items()
    }
    return whole.detach(), slopes


def _first_order(model: HookedTransformer, slopes: Slopes, patch: Patch) -> Float[Tensor, " prompt"]:
    """The estimated change of the log probability under a patch."""
    now, slope = slopes[patch.site][patch.layer]
    if patch.site == "z":
        now, slope = now[:, patch.head], slope[:, patch.head]
    elif patch.site == "result":  # the slope is that of all heads' sum
        z, _ = slopes["z"][patch.layer]
        now = z[:, patch.head] @ model.blocks[patch.layer].attn.W_O[patch.head]
    return ((patch.value.to(now) - now) * slope).sum(-1)
