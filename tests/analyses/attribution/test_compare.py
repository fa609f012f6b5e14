"""Overlap of top heads: the chance level by enumeration, the bootstrap by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made import origin

from bkdlens import HeadAttribution, compare_heads
from bkdlens.analyses.attribution.compare import chance_jaccard
from bkdlens.errors import HeadError, ResultError
from bkdlens.metrics import bootstrap_mean, resampling_counts
from bkdlens.types import Head


def attribution(seed: int, shape: tuple[int, int] = (2, 4), n: int = 12, noise: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randn(shape, generator=generator)
    cie = strength + noise * torch.randn(n, *shape, generator=generator)
    low, high = bootstrap_mean(cie)
    exact = torch.ones(shape, dtype=torch.bool)
    return HeadAttribution(
        provenance=origin(), label=f"model {seed}", method="exact", exact=exact, cie=cie, cie_first=cie,
        base_prob=cie[:, 0, 0], low=low, high=high,
    )  # fmt: skip


@pytest.mark.many
@given(n=st.integers(1, 8), data=st.data())
def test_chance_level_is_the_mean_over_all_pairs_of_sets(n, data):
    k = data.draw(st.integers(1, n))
    sets = [set(chosen) for chosen in combinations(range(n), k)]
    mean = sum(len(sets[0] & b) / len(sets[0] | b) for b in sets) / len(sets)
    assert chance_jaccard(n, k) == pytest.approx(mean)


@given(seed=st.integers(0, 100), k=st.integers(1, 8))
def test_a_model_overlaps_with_itself_wholly(seed, k):
    found = attribution(seed)
    row = compare_heads({"a": found, "b": found}, k=k, n_resamples=5).iloc[0]
    assert (row.shared, row.jaccard, row.low, row.high, row.k) == (k, 1.0, 1.0, 1.0, k)
    assert row.spearman == pytest.approx(1)


def test_p_is_the_share_of_sets_that_have_as_much_in_common():
    a, b = attribution(1), attribution(2)
    row = compare_heads({"a": a, "b": b}, k=3, n_resamples=5).iloc[0]
    heads = [(i, j) for i in range(2) for j in range(4)]
    top = {tuple(h) for h in a.top(3)}
    assert row.shared == len(top & {tuple(h) for h in b.top(3)})
    counts = [len(top & set(other)) for other in combinations(heads, 3)]
    assert row.expected == pytest.approx(sum(counts) / len(counts))
    assert row.p == pytest.approx(sum(c >= row.shared for c in counts) / len(counts))


def test_interval_is_that_of_tops_made_again_from_resampled_pairs():
    a, b = attribution(1, noise=2.0), attribution(2, noise=2.0, n=9)
    row = compare_heads({"a": a, "b": b}, k=3, n_resamples=200, seed=5).iloc[0]
    drawn = []
    for i in range(200):
        tops = []
        for found in (a, b):
            weights = resampling_counts(len(found.cie), 200, 5)[i]
            again = torch.cat([x.repeat(int(w), 1, 1) for w, x in zip(weights, found.cie, strict=True)])
            tops.append(set(again.mean(0).flatten().topk(3).indices.tolist()))
        drawn.append(len(tops[0] & tops[1]) / len(tops[0] | tops[1]))
    ends = torch.quantile(torch.tensor(drawn).double(), torch.tensor([0.025, 0.975]).double())
    assert (row.low, row.high) == pytest.approx(tuple(ends.tolist()))
    assert row.low < row.high


def test_estimates_come_after_what_was_patched_in_each_draw():
    a = attribution(3)
    exact = torch.zeros_like(a.exact)
    exact[0] = True
    screened = replace(a, method="screened", exact=exact)
    row = compare_heads({"a": a, "b": screened}, k=4, n_resamples=50).iloc[0]
    first_layer = {Head(0, i) for i in range(4)}
    shared = [len({*a.top(4)} & first_layer)]
    counts = resampling_counts(12, 50, 0)
    for weights in counts:
        top = (weights[:, None] * a.cie.flatten(1)).sum(0).topk(4).indices
        shared.append(int((top < 4).sum()))
    assert row.shared == shared[0]
    jaccard = torch.tensor([m / (8 - m) for m in shared[1:]]).double()
    assert row.low == pytest.approx(float(jaccard.quantile(0.025)))


def test_every_pair_is_a_row_and_k_is_an_eighth_unless_given():
    frame = compare_heads({str(i): attribution(i, (4, 8)) for i in range(4)}, n_resamples=5)
    assert list(zip(frame["first"], frame["second"], strict=True)) == [*combinations("0123", 2)]
    assert set(frame.k) == {4}


def test_what_cannot_be_compared_is_said():
    a = attribution(0)
    with pytest.raises(ResultError, match="two or more"):
        compare_heads({"a": a})
    with pytest.raises(ResultError, match="a 2×4, b 3×4"):
        compare_heads({"a": a, "b": attribution(0, (3, 4))})
    for k in (0, 9):
        with pytest.raises(HeadError, match="give 1 to 8"):
            compare_heads({"a": a, "b": a}, k=k)
