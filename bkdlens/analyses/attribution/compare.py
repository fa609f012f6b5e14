"""Do several models carry a backdoor in the same heads? Overlap of top heads, with its chance level."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.engines.inputs import checked
from bkdlens.errors import HeadError, ResultError
from bkdlens.metrics import resampling_counts


@checked
def compare_heads(
    attributions: Mapping[str, HeadAttribution],
    *,
    k: int | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The top heads of each two models against each other, with what chance would share.

    Args:
        attributions: results of :func:`bkdlens.attribute_heads` by name, of models of one shape.
        k: how many top heads; an eighth of all, as ``bkdlens run`` ablates at most, for None.
        n_resamples: bootstrap draws of the pairs (prompts), the same for attributions of as many.
        seed: of these.

    Returns:
        One row per pair of models: ``first, second, k, shared`` (heads among both top ``k``),
        ``expected`` (how many two random sets of ``k`` heads share on average), ``jaccard`` (shared
        over the union) with ``low`` and ``high``
        (95 % percentile bootstrap over pairs), ``chance`` (its mean for two random sets), ``p`` (the
        chance that two such sets share as many; hypergeometric) and ``spearman`` (rank correlation of
        all heads' ACIE).

    Raises:
        ResultError: for fewer than two attributions, or models of different shapes.
        HeadError: for a ``k`` that is not between 1 and the number of heads.

    Examples:
        >>> overlap = bkdlens.compare_heads({"first": heads, "again": heads}, n_resamples=10)
    """
    if len(attributions) < 2:
        raise ResultError(f"{len(attributions)} attribution(s) given; comparing takes two or more.")
    shapes = {name: tuple(found.acie.shape) for name, found in attributions.items()}
    if len(set(shapes.values())) > 1:
        described = ", ".join(f"{name} {s[0]}×{s[1]}" for name, s in shapes.items())
        raise ResultError(
            f"These models have different heads ({described}, layers × heads); "
            "compare models of one base."
        )
    n = next(iter(attributions.values())).acie.numel()
    k = max(1, n // 8) if k is None else k
    if not 1 <= k <= n:
        raise HeadError(f"k={k} top heads cannot be taken of {n}; give 1 to {n}.")
    # One seed for all: models that were measured on the same pairs see the same draws of them.
    tops = {name: _resampled_tops(found, k, n_resamples, seed) for name, found in attributions.items()}
    rows = []
    for first, second in combinations(attributions, 2):
        a, b = attributions[first], attributions[second]
        shared = len({*a.top(k)} & {*b.top(k)})
        drawn = (tops[first] & tops[second]).sum(1).double()
        low, high = torch.quantile(drawn / (2 * k - drawn), torch.tensor([0.025, 0.975]).double())
        rows.append(
            {
                "first": first,
                "second": second,
                "k": k,
                "shared": shared,
                "expected": k * k / n,
                "jaccard": shared / (2 * k - shared),
                "low": float(low),
                "high": float(high),
                "chance": chance_jaccard(n, k),
                "p": float(stats.hypergeom.sf(shared - 1, n, k, k)),
                "spearman": float(stats.spearmanr(a.acie.flatten(), b.acie.flatten()).statistic),
            }
        )
    return pd.DataFrame(rows)


def chance_jaccard(n: int, k: int) -> float:
    """The mean Jaccard index of two random sets of ``k`` out of ``n``, exactly."""
    shared = range(max(0, 2 * k - n), k + 1)
    return sum(float(stats.hypergeom.pmf(m, n, k, k)) * m / (2 * k - m) for m in shared)


def _resampled_tops(
    found: HeadAttribution, k: int, n_resamples: int, seed: int
) -> Bool[Tensor, "draw head"]:
    """Which heads (flat, as booleans) are among the top ``k`` when the pairs are drawn again."""
    cie: Float[Tensor, "pair head"] = found.cie.flatten(1).double()
    acie = resampling_counts(len(cie), n_resamples, seed) @ cie
    acie[:, ~found.exact.flatten()] -= 2.0 * len(cie)  # estimates rank after what was patched
    return torch.zeros(n_resamples, cie.shape[1], dtype=torch.bool).scatter_(
        1, acie.topk(k, dim=1).indices, True
    )
