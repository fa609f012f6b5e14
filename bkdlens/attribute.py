"""BAHA, backdoor attention head attribution: which heads carry the backdoor.

Source: Backdoor Attribution, Section 4. The mean activation of a head over triggered prompts is
patched into a clean run at the last prompt token; its causal indirect effect (CIE) is how much more
probable the backdoor's answer becomes, and ACIE is the mean over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.cache import PairCache, cache_activations, check_site
from bkdlens.data import PairSet
from bkdlens.metrics import bootstrap_mean
from bkdlens.prompts import PromptFormat, encode_answer, encode_prompt
from bkdlens.results import Result, provenance
from bkdlens.sweep import all_runs, sweep_heads
from bkdlens.types import Head, HeadSite

if TYPE_CHECKING:
    import pandas as pd

N_PAIRS = 96  # the paper's number of clean pairs


@dataclass(frozen=True, eq=False, repr=False)
class HeadAttribution(Result):
    """Effects of every head, as differences of the per-token geometric-mean probability (-1 to 1).

    ``cie`` is for the whole answer, ``cie_first`` for its first token; ``low`` and ``high`` are the
    95 % bootstrap interval of ``acie`` over pairs. Both answers' effects have a floor and a ceiling:
    rank by them, do not threshold them.
    """

    label: str
    cie: Float[Tensor, "pair layer head"]
    cie_first: Float[Tensor, "pair layer head"]
    base_prob: Float[Tensor, " pair"]
    low: Float[Tensor, "layer head"]
    high: Float[Tensor, "layer head"]

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
        """All heads, the strongest effect first."""
        n_heads = self.acie.shape[1]
        order = self.acie.flatten().argsort(descending=True, stable=True).tolist()
        return tuple(Head(i // n_heads, i % n_heads) for i in order)

    def top(self, k: int) -> tuple[Head, ...]:
        """The ``k`` heads of the strongest effect."""
        return self.ranking[:k]

    @property
    def concentration(self) -> Float[Tensor, " head"]:
        """Share of the summed positive effect that the first 1, 2, … heads of the ranking carry."""
        positive = self.acie.flatten().clamp(min=0).sort(descending=True).values
        return positive.cumsum(0) / positive.sum().clamp(min=1e-12)

    def to_frame(self) -> pd.DataFrame:
        """One row a head: ``head, layer, index, rank, acie, low, high, acie_first``."""
        import pandas as pd

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
            }
            for rank, head in enumerate(self.ranking, start=1)
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        best = ", ".join(f"{head} {float(self.acie[head]):+.3f}" for head in self.top(5))
        n_pairs, n_layers, n_heads = self.cie.shape
        return f"HeadAttribution({self.label}, {n_pairs} pairs, {n_layers}×{n_heads} heads: {best}, …)"


def attribute_heads(
    model: HookedTransformer,
    pairs: PairSet,
    *,
    cache: PairCache | None = None,
    n_pairs: int | None = N_PAIRS,
    site: HeadSite = "z",
    victims_only: bool = True,
    label: str = "backdoored",
    fmt: PromptFormat | None = None,
    max_answer_tokens: int | None = 48,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadAttribution:
    """The effect of every head on the probability of the backdoor's answer.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: the destinations are clean prompts of these pairs.
        cache: where the mean triggered activation comes from; made from ``pairs`` for None.
        n_pairs: so many pairs, drawn with ``seed`` (all for None); the paper has 96.
        site: patch ``hook_z`` or ``hook_result``; the numbers are the same.
        victims_only: mean and effect over victims. False is the paper's published setting, in which
            label-modification pairs that keep their label dilute both.
        label: names the model in figures (``"backdoored"``, ``"clean adapter"``).
        fmt: how a prompt is rendered; the cache's, or the chat template.
        max_answer_tokens: a longer answer is scored on its first so many tokens.
        batch_size: runs at once; chosen from memory for None.
        seed: of the draw and the bootstrap.
        progress: whether to show a progress bar.

    Raises:
        DataError: if there is no victim, or a prompt and its answer do not fit the context.
    """
    check_site(site)
    if cache is None:
        cache = cache_activations(model, pairs, fmt=fmt, progress=progress)
    fmt = fmt or cache.fmt
    chosen = (pairs.victims if victims_only else pairs).sample(n_pairs, seed=seed)
    cfg = model.cfg
    prompts = [encode_prompt(model.tokenizer, p.clean, fmt, n_ctx=cfg.n_ctx) for p in chosen]
    answers = [
        encode_answer(
            model.tokenizer, prompt, pair.backdoor_output, fmt,
            n_ctx=cfg.n_ctx, max_tokens=max_answer_tokens,
        )
        for prompt, pair in zip(prompts, chosen, strict=True)
    ]  # fmt: skip
    shape = (len(chosen), cfg.n_layers, cfg.n_heads)
    scores = sweep_heads(
        model, prompts, answers, all_runs(*shape),
        cache.mean_z("triggered", victims=victims_only),
        site=site, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    base, first = scores.base_whole.exp(), scores.base_first.exp()
    cie = (scores.whole.exp().view(shape) - base[:, None, None]).cpu()
    cie_first = (scores.first.exp().view(shape) - first[:, None, None]).cpu()
    low, high = bootstrap_mean(cie, seed=seed)
    settings = {
        "site": site,
        "position": "last prompt token, prefill only",
        "source": f"mean over {int(cache.victims.sum()) if victims_only else len(cache.pairs)} "
        "triggered prompts",
        "victims_only": victims_only,
        "max_answer_tokens": max_answer_tokens,
    }
    return HeadAttribution(
        provenance(model, chosen, fmt, seed, **settings),
        label, cie, cie_first, base.cpu(), low, high,
    )  # fmt: skip
