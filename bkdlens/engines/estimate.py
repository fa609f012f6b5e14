"""Attribution patching: a first-order estimate of every patch, from one forward and one backward pass.

Source: Nanda (2023), Attribution Patching; Kramár et al. (2024), AtP*. The effect of replacing an
activation ``a`` by ``a'`` at the last prompt token is estimated as ``(a' - a) · ∂ log P / ∂ a``. Keys
and values before that token do not depend on it, so the backward pass covers the answer alone: about
P + 3T token passes per pair with P prompt and T answer tokens, whatever the number of heads. It is blind
where the gradient is, at a saturated softmax, and for effects that need a large step; the numbers of
:mod:`bkdlens.engines.sweep` are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines.block import embed, log_probs, precise, run_kept, supported
from bkdlens.engines.hooks import Patch, check_patches, refuse_foreign_hooks
from bkdlens.engines.prefix import Forced, Prefix, prefixes
from bkdlens.engines.sweep import SweepScores
from bkdlens.errors import HookError

# By site and layer, at the last prompt token: the activation and its gradient, ``[prompt …]``.
Slopes = dict[str, list[tuple[Tensor, Tensor]]]


@torch.inference_mode(False)  # what is made in that mode can join no backward pass
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
    """``sweep_patches`` to first order, cut at probability 1; the untouched scores are exact."""
    refuse_foreign_hooks(model)
    check_patches(model, patches, len(prompts))
    if not supported(model):
        raise HookError(
            f"Attribution patching does not know {model.cfg.original_architecture or 'this model'}; "
            "use method='exact'."
        )
    shape, dtype = (2, len(prompts), 1 + len(patches)), precise(model.W_E.dtype)
    out = model.W_E.new_full(shape, torch.nan, dtype=dtype)
    tails = [answer.n_scored for answer in answers]
    # The backward pass needs what every layer computed: as much memory as three runs per layer.
    n_runs, bar = 3 * model.cfg.n_layers, "attribution patching"
    for rows, _, prefix in prefixes(model, prompts, n_runs, memory_gb, bar, progress, tails=tails):
        scored = [answers[i].scored for i in rows]
        batch_patches = [patch.of(rows) for patch in patches]
        # The first token's probability has a slope of its own: that of an answer of one token.
        for which, forced in enumerate((scored, [ids[:1] for ids in scored])):
            base, slopes = _slopes(model, prefix, forced)
            change = [_first_order(model, slopes, patch) for patch in batch_patches]
            # A line goes on above probability 1; the probability does not.
            out[which, rows] = torch.stack([base, *(base + c for c in change)], dim=1).clamp(max=0)
    return SweepScores.of(out)


def _slopes(
    model: HookedTransformer, prefix: Prefix, answers: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, " prompt"], Slopes]:
    """Log probability per token of forced answers, and its gradients at the last prompt token."""
    forced, sites = Forced.of(prefix, answers), ("z", "result", "attn_out", "mlp_out")
    scored, at = forced.scored, forced.at
    with torch.enable_grad():
        # Weights get no gradients, so the graph begins here; the prefix stays outside it.
        resid = embed(model, forced.inputs, at).detach().requires_grad_()
        resid, kept = run_kept(model, resid, at, prefix.layers, sites)
        probs = torch.zeros(scored.shape, device=at.device, dtype=precise(resid.dtype))
        each = log_probs(model, resid[scored], forced.targets[scored])
        whole = probs.masked_scatter(scored, each).sum(1) / scored.sum(1)
        # Prompts do not see each other, so the gradient of the sum holds that of each.
        gradients = iter(torch.autograd.grad(whole.sum(), [v for site in kept.values() for v in site]))
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
    elif patch.site == "result":  # heads are summed, so the slope of the sum is that of each
        z, _ = slopes["z"][patch.layer]
        now = z[:, patch.head] @ model.blocks[patch.layer].attn.W_O[patch.head]
    return ((patch.value.to(now) - now) * slope).sum(-1)
