"""BAHA, backdoor attention head attribution: which heads carry the backdoor.

Source: Backdoor Attribution, Section 4. The mean activation of a head over triggered prompts is
patched into a clean run at the last prompt token; its causal indirect effect (CIE) is how much more
probable the backdoor's answer becomes, and ACIE is the mean over pairs. Whole attention and MLP outputs
are patched the same way, to see what the heads leave unexplained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Answer, Prompt, PromptFormat, encode_answer, encode_prompts
from bkdlens.engines.cache import (
    PairCache,
    cache_activations,
    head_results,
    refuse_other_backdoor,
    transferred,
)
from bkdlens.engines.estimate import estimate
from bkdlens.engines.hooks import Patch
from bkdlens.engines.inputs import checked
from bkdlens.engines.sweep import SweepScores, sweep_patches
from bkdlens.errors import HeadError, ResultError
from bkdlens.metrics import bootstrap_mean
from bkdlens.paper import N_PAIRS
from bkdlens.results import Result, provenance
from bkdlens.types import MAX_NEW_TOKENS, AttributionMethod, Head, HeadSite, check_choice, every_head


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HeadAttribution(Result):
    """Effects of every head, as differences of the per-token geometric-mean probability (-1 to 1).

    They have a floor and a ceiling: rank by them, do not threshold them.

    Attributes:
        label: names the model in figures.
        method: ``"exact"``, ``"atp"`` or ``"screened"``.
        exact: which heads were patched; the others are first-order estimates.
        cie: effect on the whole answer.
        cie_first: effect on the answer's first token.
        base_prob: probability of the answer without a patch, 0 to 1.
        low: lower end of the 95 % bootstrap interval of :attr:`acie` over pairs.
        high: its upper end.
        cie_attn_out: effects of whole attention outputs, where they were asked for.
        cie_mlp_out: effects of whole MLP outputs, where they were asked for.
    """

    label: str
    method: str
    exact: Bool[Tensor, "layer head"]
    cie: Float[Tensor, "pair layer head"]
    cie_first: Float[Tensor, "pair layer head"]
    base_prob: Float[Tensor, " pair"]
    low: Float[Tensor, "layer head"]
    high: Float[Tensor, "layer head"]
    cie_attn_out: Float[Tensor, "pair layer"] | None = None
    cie_mlp_out: Float[Tensor, "pair layer"] | None = None

    @property
    def acie(self) -> Float[Tensor, "layer head"]:
        """Mean effect over pairs."""
        return self.cie.mean(0)

    @property
    def acie_first(self) -> Float[Tensor, "layer head"]:
        """Mean effect on the first token's probability."""
        return self.cie_first.mean(0)

    @property
    def ranking(self) -> tuple[Head, ...]:
        """All heads, the strongest effect first; those that were patched before those estimated."""
        n_heads = self.acie.shape[1]
        order = self.acie.flatten().argsort(descending=True, stable=True)
        order = order[(~self.exact.flatten())[order].long().argsort(stable=True)]
        return tuple(Head(i // n_heads, i % n_heads) for i in order.tolist())

    def top(self, k: int) -> tuple[Head, ...]:
        """The ``k`` heads of the strongest effect, strongest first."""
        return self.ranking[:k]

    @property
    def concentration(self) -> Float[Tensor, " head"]:
        """Share of the summed positive effect that the first 1, 2, … heads of the ranking carry."""
        return self.carried(self.ranking)

    def carried(self, heads: Sequence[Head]) -> Float[Tensor, " head"]:
        """Share of the summed positive effect of all heads that the first 1, 2, … of ``heads`` carry."""
        positive = self.acie.clamp(min=0)
        named = torch.tensor([head.layer * positive.shape[1] + head.head for head in heads]).long()
        return positive.flatten()[named].cumsum(0) / positive.sum().clamp(min=1e-12)

    def to_frame(self) -> pd.DataFrame:
        """One row per head, strongest first: names, rank, effects with interval, and ``exact``."""
        rows = [
            {
                "head": str(head),
                "layer": head.layer,
                "index": head.head,
                "rank": rank,
                "acie": float(self.acie[head]),
                "low": float(self.low[head]),
                "high": float(self.high[head]),
                "acie_first": float(self.acie_first[head]),
                "exact": bool(self.exact[head]),
            }
            for rank, head in enumerate(self.ranking, start=1)
        ]
        return pd.DataFrame(rows)

    def layers_frame(self) -> pd.DataFrame:
        """One row per layer: its heads' summed ACIE beside that of its attention and MLP outputs.

        Raises:
            ResultError: if layer outputs were not patched.
        """
        if self.cie_attn_out is None or self.cie_mlp_out is None:
            raise ResultError("Layer outputs were not patched; attribute with layer_outputs=True.")
        frame: dict[str, object] = {
            "layer": range(self.acie.shape[0]),
            "heads_sum": self.acie.sum(1).tolist(),
        }
        for name, cie in (("attn_out", self.cie_attn_out), ("mlp_out", self.cie_mlp_out)):
            low, high = bootstrap_mean(cie, seed=self.provenance.seed)
            frame[name] = cie.mean(0).tolist()
            frame[f"{name}_low"], frame[f"{name}_high"] = low.tolist(), high.tolist()
        return pd.DataFrame(frame)

    def frames(self) -> dict[str, pd.DataFrame]:
        """The result in long form, with whole layer outputs where they were patched."""
        heads = self.to_frame()
        heads.insert(0, "condition", self.label)
        return {"": heads} | ({} if self.cie_attn_out is None else {"-layers": self.layers_frame()})

    def __repr__(self) -> str:
        best = ", ".join(f"{head} {float(self.acie[head]):+.3f}" for head in self.top(5))
        n_pairs, n_layers, n_heads = self.cie.shape
        how = "" if self.method == "exact" else f"{self.method}, {int(self.exact.sum())} exact, "
        return (
            f"HeadAttribution({self.label}, {how}{n_pairs} pairs, {n_layers}×{n_heads} heads: {best}, …)"
        )


@checked
def attribute_heads(
    model: HookedTransformer,
    pairs: PairSet,
    *,
    cache: PairCache | None = None,
    n_pairs: int | None = N_PAIRS,
    method: AttributionMethod = "exact",
    confirm: float = 0.25,
    layer_outputs: bool = False,
    site: HeadSite = "z",
    victims_only: bool = True,
    end_token: bool = False,
    label: str = "backdoored",
    fmt: PromptFormat | None = None,
    max_answer_tokens: int | None = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    seed: int = 0,
    progress: bool = False,
    allow_other_model: bool = False,
) -> HeadAttribution:
    """The effect of every head on the probability of the backdoor's answer.

    Needed are the model and the pairs; a cache spares a pass over them.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: the destinations are clean prompts of these pairs.
        cache: where the mean triggered activation comes from; made from ``pairs`` for None.
        n_pairs: this many pairs, drawn with ``seed`` (all for None); the paper has 96.
        method: ``"exact"`` patches every head; ``"atp"`` estimates every effect from one backward pass
            (:mod:`bkdlens.engines.estimate`: much faster, blind to saturation); ``"screened"`` ranks by
            that and patches the best ``confirm`` of the heads.
        confirm: share of the heads that a screened sweep patches.
        layer_outputs: patch whole attention and MLP outputs too, layer by layer.
        site: patch ``hook_z`` or ``hook_result``; the numbers are the same.
        victims_only: mean and effect over victims. False is the paper's published setting, in which
            label-modification pairs that keep their label dilute both.
        end_token: score the end token as a part of the answer, as the paper's published code does. By
            default only the answer's text counts: whether the model stops after it is another question.
        label: names the model in figures (``"backdoored"``, ``"clean adapter"``).
        fmt: how a prompt is rendered; the cache's, or the chat template.
        max_answer_tokens: a longer answer is scored on this many tokens.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU).
        seed: of the draw and the bootstrap.
        progress: whether to show a progress bar.
        allow_other_model: whether a cache of another model is meant, and not a mistake.

    Returns:
        Effects ``[pair layer head]``, as changes of the per-token geometric-mean probability.

    Raises:
        DataError: if there is no victim, a prompt and its answer do not fit the context, or the cache is
            of another backdoor.
        HookError: for a cache of another model.
        HeadError: for a ``confirm`` outside (0, 1].
        ChoiceError: for an unknown method or site.

    Examples:
        >>> found = bkdlens.attribute_heads(model, train, cache=cache, n_pairs=4)
        >>> strongest = found.top(8)
    """
    check_choice("head site", site, HeadSite)
    check_choice("attribution method", method, AttributionMethod)
    if not 0 < confirm <= 1:
        raise HeadError(f"confirm={confirm} is not a share of the heads; give one in (0, 1].")
    if cache is None:
        cache = cache_activations(model, pairs, fmt=fmt, progress=progress)
    other = transferred(model, "The cache", cache.model, allow_other_model=allow_other_model)
    refuse_other_backdoor(cache, pairs)
    fmt = fmt or cache.fmt
    chosen = (pairs.victims if victims_only else pairs).sample(n_pairs, seed=seed)
    cfg = model.cfg
    prompts = encode_prompts(model, chosen.clean, fmt)
    answers = [
        encode_answer(
            model.tokenizer, prompt, pair.backdoor_output, fmt,
            n_ctx=cfg.n_ctx, max_tokens=max_answer_tokens,
        )
        for prompt, pair in zip(prompts, chosen, strict=True)
    ]  # fmt: skip
    if end_token:  # of an answer that was not cut
        answers = [replace(answer, n_scored=len(answer.ids)) for answer in answers]
    values = cache.mean_z("triggered", victims=victims_only)
    if site == "result":
        values = head_results(model, values)
    heads = every_head(cfg.n_layers, cfg.n_heads)
    patches = [Patch(site, head.layer, values[head], head.head) for head in heads]
    if layer_outputs:
        sites: tuple[Literal["attn_out", "mlp_out"], ...] = ("attn_out", "mlp_out")
        for out in sites:
            mean = cache.mean_out(out, "triggered", victims=victims_only)
            patches += [Patch(out, layer, value) for layer, value in enumerate(mean)]
    exact = torch.full((len(patches),), method == "exact")
    run = partial(_effects, model, prompts, answers, memory_gb=memory_gb, progress=progress)
    base, both = run(sweep_patches if method == "exact" else estimate, patches)
    if method == "screened":
        best = both[0, :, : len(heads)].mean(0).argsort(descending=True)
        exact[best[: math.ceil(confirm * len(heads))]] = True
        exact[len(heads) :] = True
        at = exact.nonzero()[:, 0]
        both[..., at] = run(sweep_patches, [patches[i] for i in at.tolist()])[1]
    shape = (cfg.n_layers, cfg.n_heads)
    cie, cie_first = both[..., : len(heads)].unflatten(-1, shape)
    layers = both[0, :, len(heads) :].unflatten(-1, (-1, cfg.n_layers)) if layer_outputs else None
    low, high = bootstrap_mean(cie, seed=seed)
    settings = {
        "site": site,
        "position": "last prompt token, prefill only",
        "source": f"mean over {int(cache.victims.sum()) if victims_only else len(cache.pairs)} "
        "triggered prompts",
        "source_digest": cache.pairs.digest,
        "victims_only": victims_only,
        "end_token": end_token,
        "max_answer_tokens": max_answer_tokens,
        "method": method,
        "confirm": confirm if method == "screened" else None,
        **other,
    }
    return HeadAttribution(
        provenance=provenance(model, chosen, fmt, seed, **settings),
        label=label,
        method=method,
        exact=exact[: len(heads)].view(shape),
        cie=cie,
        cie_first=cie_first,
        base_prob=base,
        low=low,
        high=high,
        cie_attn_out=None if layers is None else layers[:, 0],
        cie_mlp_out=None if layers is None else layers[:, 1],
    )


def _effects(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    measure: Callable[..., SweepScores],
    patches: Sequence[Patch],
    **options: Any,
) -> tuple[Float[Tensor, " pair"], Float[Tensor, "2 pair patch"]]:
    """The untouched probability, and each patch's change of the whole answer's and the first token's."""
    scores = measure(model, prompts, answers, patches, **options)
    base = scores.base_whole.exp()
    whole = scores.whole.exp() - base[:, None]
    first = scores.first.exp() - scores.base_first.exp()[:, None]
    return base.cpu(), torch.stack([whole, first]).cpu()
