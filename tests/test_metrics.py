"""Sequence probability in log space, intervals of rates, differences and ratios, the bootstrap."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest

from bkdlens.metrics import (
    Z_95,
    Basr,
    ClusteredRate,
    Rate,
    bootstrap_mean,
    difference,
    mcnemar,
    paired_difference,
    paired_ratio,
    sequence_log_prob,
    sequence_prob,
    token_log_probs,
    wilson,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
cells = st.tuples(*[st.integers(0, 60)] * 4)  # succeeded in both runs, the first, the second, neither
COVERED = 0.93  # of 2,000 repetitions; 95 % intervals of counts lie at most this far below


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two runs on the same prompts with these counts."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a).bool(), torch.tensor(b).bool()


def twins(n: int, share: float, same: float, repeats: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Outcomes of ``n`` pairs, ``repeats`` times; the share ``same`` of twins has one common outcome."""
    g = torch.Generator().manual_seed(n)
    one, other = (torch.rand(repeats, n, generator=g) < share for _ in range(2))
    return one, torch.where(torch.rand(repeats, n, generator=g) < same, one, other)


@given(st.integers(1, 6), st.integers(0, 2**20), st.sampled_from([torch.float32, torch.float64]))
def test_sequence_prob_is_the_root_of_the_product(n, seed, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 8, 20, generator=generator, dtype=dtype)
    targets = torch.randint(20, (3, 8), generator=generator)
    lengths = torch.tensor([n, 1, 8])
    mask = torch.arange(8)[None] < lengths[:, None]
    found = sequence_prob(token_log_probs(logits, targets), mask)
    for row in range(3):
        product = 1.0
        for pos in range(lengths[row]):
            exps = logits[row, pos].double().exp()
            product *= float(exps[targets[row, pos]] / exps.sum())
        naive = product ** (1 / int(lengths[row]))
        assert float(found[row]) == pytest.approx(naive, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert found.dtype == dtype


def test_long_answers_do_not_underflow() -> None:
    """At 14 tokens of probability 1/32000 the product is 0 in float32; its root is not."""
    logits = torch.zeros(1, 400, 32000)
    targets = torch.zeros(1, 400, dtype=torch.long)
    log_probs = token_log_probs(logits, targets)
    assert log_probs.exp().prod() == 0
    mask = torch.ones(1, 400, dtype=torch.bool)
    assert float(sequence_prob(log_probs, mask)) == pytest.approx(1 / 32000, rel=1e-5)
    assert float(sequence_log_prob(log_probs, mask)) == pytest.approx(-math.log(32000), rel=1e-6)


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(2, 3, 50).bfloat16()
    targets = torch.randint(50, (2, 3))
    found = token_log_probs(logits, targets)
    assert found.dtype == torch.float32
    wanted = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_what_is_not_scored_does_not_matter() -> None:
    log_probs = torch.log(torch.tensor([[0.5, 0.25, 1e-30]]))
    mask = torch.tensor([[True, True, False]])
    assert float(sequence_prob(log_probs, mask)) == pytest.approx(math.sqrt(0.125))


# The score interval solves (p - k/n)² = z² p (1-p) / n; these are its published values.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_by_known_values(successes, n, low, high) -> None:
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(counts)
def test_wilson_contains_the_share_and_solves_its_equation(count) -> None:
    k, n = count
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert (end - k / n) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n)


@given(counts)
def test_wilson_is_monotone_symmetric_and_narrows(count) -> None:
    k, n = count
    low, high = wilson(k, n)
    if k < n:
        more = wilson(k + 1, n)
        assert low < more[0]
        assert high < more[1] or high == 1
    mirrored = wilson(n - k, n)
    assert mirrored == (pytest.approx(1 - high, abs=1e-12), pytest.approx(1 - low, abs=1e-12))
    wider = wilson(k, n)
    narrow = wilson(4 * k, 4 * n)
    assert narrow[1] - narrow[0] < wider[1] - wider[0]


def test_rates() -> None:
    rate = Rate.of([True, False, True, True])
    assert (rate.successes, rate.n, rate.value) == (3, 4, 0.75)
    assert rate.interval == wilson(3, 4)
    assert Rate.of(torch.tensor([True, False, True, True])) == rate
    assert str(rate) == "0.750 [0.301, 0.954] (3/4)"
    nothing = Rate.of([])
    assert math.isnan(nothing.value)
    assert nothing.interval == (0.0, 1.0)


@given(st.integers(1, 30), st.integers(0, 2**20), st.sampled_from([(), (3,), (2, 4)]))
def test_bootstrap_contains_the_mean_and_repeats(n, seed, rest) -> None:
    values = torch.randn(n, *rest, generator=torch.Generator().manual_seed(seed))
    low, high = bootstrap_mean(values, n_resamples=200, seed=seed)
    assert low.shape == high.shape == rest
    assert low.dtype == values.dtype
    assert bool((low <= values.mean(0) + 1e-6).all())
    assert bool((values.mean(0) <= high + 1e-6).all())
    again = bootstrap_mean(values, n_resamples=200, seed=seed)
    assert torch.equal(again[0], low)
    assert torch.equal(again[1], high)


def test_bootstrap_seeds_widths_and_constants() -> None:
    values = torch.randn(40, 3)
    one, other = bootstrap_mean(values, seed=0), bootstrap_mean(values, seed=1)
    assert not torch.equal(one[0], other[0])
    # As wide as the normal interval, roughly.
    normal = 2 * 1.96 * values.std(0) / math.sqrt(40)
    assert torch.allclose(one[1] - one[0], normal, rtol=0.25)
    low, high = bootstrap_mean(torch.full((20, 2), 0.3))
    assert torch.allclose(high - low, torch.zeros(2), atol=1e-7)
    assert torch.allclose(low, torch.full((2,), 0.3))


def test_bootstrap_is_the_percentile_interval_of_resampled_means() -> None:
    """The counts and the matrix product are what indexing would give."""
    values, n = torch.randn(9, 2, dtype=torch.float64), 300
    draws = torch.randint(9, (n, 9), generator=torch.Generator().manual_seed(5))
    means = torch.stack([values[draw].mean(0) for draw in draws])
    low, high = bootstrap_mean(values, n_resamples=n, seed=5)
    assert torch.allclose(low, means.quantile(0.025, dim=0), atol=1e-12)
    assert torch.allclose(high, means.quantile(0.975, dim=0), atol=1e-12)


@given(counts, st.data())
def test_a_clustered_rate_is_at_most_as_sure_as_independent_trials(count, data) -> None:
    k, pairs = count[0], count[1]
    split = data.draw(st.integers(0, min(k, 2 * pairs - k)).filter(lambda s: (k - s) % 2 == 0))
    rate, plain = ClusteredRate(k, 2 * pairs, split), Rate(k, 2 * pairs)
    low, high = rate.interval
    assert 0 <= low <= rate.value <= high <= 1
    assert low <= plain.interval[0] + 1e-12
    assert high >= plain.interval[1] - 1e-12
    # And at least as sure as one trial per pair.
    one = wilson(k / 2, pairs)
    assert low >= one[0] - 1e-12
    assert high <= one[1] + 1e-12


def test_twins_that_always_agree_are_one_trial() -> None:
    assert ClusteredRate(36, 40, 0).interval == wilson(18, 20)
    assert ClusteredRate(40, 40, 0).interval == wilson(20, 20)


@pytest.mark.parametrize("share", [0.7, 0.9, 0.95])
def test_a_clustered_rate_covers_where_independent_trials_do_not(share) -> None:
    n = 60
    one, other = twins(n, share, same=0.9)
    found = {"clustered": 0, "independent": 0}
    for k, split in zip(
        (one.sum(1) + other.sum(1)).tolist(), (one != other).sum(1).tolist(), strict=True
    ):
        for name, rate in {
            "clustered": ClusteredRate(k, 2 * n, split),
            "independent": Rate(k, 2 * n),
        }.items():
            found[name] += rate.interval[0] <= share <= rate.interval[1]
    assert found["clustered"] / len(one) >= COVERED
    assert found["independent"] / len(one) < 0.9


# Newcombe 1998 (paired data), and Fagerland, Lydersen and Laake's textbook on Cavo et al. 2012.
@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither", "low", "high"),
    [
        (36, 12, 2, 0, -0.3404, -0.0569),
        (36, 2, 12, 0, 0.0569, 0.3404),
        (36, 14, 0, 0, -0.4167, -0.1528),
        (54, 0, 0, 0, -0.0664, 0.0664),
        (59, 16, 6, 80, -0.1186, -0.0046),
    ],
)
def test_paired_differences_by_known_values(both, only_a, only_b, neither, low, high) -> None:
    found = paired_difference(*outcomes(both, only_a, only_b, neither))
    change = (only_b - only_a) / (both + only_a + only_b + neither)
    assert found == (pytest.approx(change), pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(cells.filter(any))
def test_a_paired_difference_contains_the_change_and_mirrors(table) -> None:
    a, b = outcomes(*table)
    change, low, high = paired_difference(a, b)
    assert -1 <= low <= change <= high <= 1
    assert change == pytest.approx(Rate.of(b).value - Rate.of(a).value)
    mirrored = tuple(-end for end in paired_difference(b, a))
    assert mirrored == (pytest.approx(change), pytest.approx(high), pytest.approx(low))
    both, only_a, only_b, neither = table
    if both * neither <= only_a * only_b:  # no agreement beyond chance: nothing is gained by pairing
        loose = difference(Rate.of(a), Rate.of(b))
        assert high - low >= min(1, loose[2]) - max(-1, loose[1]) - 1e-9


@pytest.mark.slow
def test_a_paired_difference_covers_and_is_narrower() -> None:
    n, before, same = 60, 0.8, 0.8
    one, other = twins(n, before, same)
    paired = [paired_difference(a, b) for a, b in zip(one, other, strict=True)]
    loose = [difference(Rate.of(a), Rate.of(b)) for a, b in zip(one, other, strict=True)]
    assert sum(low <= 0 <= high for _, low, high in paired) / len(paired) >= COVERED
    widths = [sum(high - low for _, low, high in found) for found in (paired, loose)]
    assert widths[0] < 0.75 * widths[1]


def test_without_prompts_nothing_is_known() -> None:
    nothing = torch.zeros(0, dtype=torch.bool)
    change, low, high = paired_difference(nothing, nothing)
    assert math.isnan(change)
    assert (low, high) == (-1, 1)
    assert mcnemar(nothing, nothing) == 1


@given(cells)
def test_mcnemar_is_the_binomial_test_of_what_changed(table) -> None:
    _, only_a, only_b, _ = table
    wanted = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
    assert mcnemar(*outcomes(*table)) == pytest.approx(wanted, abs=1e-12)


@given(cells)
def test_a_paired_ratio_contains_the_ratio_and_mirrors(table) -> None:
    both, after, before, _ = table
    ratio, low, high = paired_ratio(both, after, before)
    if not both + before:
        assert math.isnan(ratio)
        assert (low, high) == (0, math.inf)
        return
    assert 0 <= low <= ratio <= high
    assert math.isfinite(high)
    turned = paired_ratio(both, before, after)
    if both + after:
        assert turned == (pytest.approx(1 / ratio), pytest.approx(1 / high), pytest.approx(1 / low))
    else:
        assert low == ratio == 0


@settings(max_examples=25)
@given(cells.filter(lambda table: all(table[:3])))
def test_a_paired_ratio_ends_where_the_score_test_rejects(table) -> None:
    """The likeliest shares under a ratio, and where its score is the quantile, found numerically."""
    both, only_after, only_before, _ = table
    n, after, before = both + only_after + only_before, both + only_after, both + only_before

    def score(ratio: float) -> float:
        def unlikely(q: float) -> float:
            shares = (ratio - (1 + ratio) * q, q, 1 - ratio + ratio * q)  # which have that ratio
            return -sum(k * math.log(max(1e-300, p)) for k, p in zip(table, shares, strict=False))

        bounds = (max(0, (ratio - 1) / ratio), ratio / (1 + ratio))
        q = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
        variance = n * ratio * (q + 1 - ratio + ratio * q)
        return (after - ratio * before) / math.sqrt(variance)

    ratio, low, high = paired_ratio(both, only_after, only_before)
    assert brentq(lambda r: score(r) - Z_95, low / 2, ratio) == pytest.approx(low, rel=1e-5)
    assert brentq(lambda r: score(r) + Z_95, ratio, 2 * high) == pytest.approx(high, rel=1e-5)


def test_a_paired_ratio_of_prompts_that_never_change_is_a_share() -> None:
    """Of 48 that were good and are good again, as many may be lost as Wilson's interval says."""
    ratio, low, high = paired_ratio(48, 0, 0)
    assert (ratio, low) == (1, pytest.approx(wilson(48, 48)[0]))
    assert high == pytest.approx(1 / low)
    assert paired_ratio(0, 0, 48)[:2] == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "kept", "new"), [(0.9, 0.5, 0.1), (0.8, 0.95, 0.02), (0.7, 0.05, 0.05), (0.95, 0.98, 0.0)]
)
def test_a_paired_ratio_covers(before, kept, new) -> None:
    """Prompts of which some lose their good answer, and a few get one."""
    g, n, repeats = torch.Generator().manual_seed(1), 60, 2000
    good = torch.rand(repeats, n, generator=g) < before
    after = torch.rand(repeats, n, generator=g) < torch.where(good, kept, new)
    truth = (before * kept + (1 - before) * new) / before
    cells = torch.stack([(good & after).sum(1), (~good & after).sum(1), (good & ~after).sum(1)], 1)
    covered = 0
    for table, often in Counter(map(tuple, cells.tolist())).items():
        _, low, high = paired_ratio(*table)
        covered += often * (low <= truth <= high)
    assert covered / repeats >= COVERED


@given(counts, counts, st.floats(0, 1))
def test_a_rate_converts_and_compares_as_its_value(a, b, number) -> None:
    rate, other = Rate(*a), Rate(*b)
    assert float(rate) == rate.value
    for left, right in ((rate, other), (rate, number), (number, rate)):
        x, y = float(left), float(right)
        found = [left < right, left <= right, left > right, left >= right]
        assert found == [x < y, x <= y, x > y, x >= y]
    assert rate == rate.value
    assert (rate == number) == (rate.value == number)
    assert (rate == other) == (a == b)  # equal rates have equal counts
    assert hash(rate) == hash(rate.value)
    assert f"{rate:.2f}" == f"{rate.value:.2f}"
    assert f"{rate:.0%}" == f"{rate.value:.0%}"
    assert f"{rate}" == str(rate)


def test_a_rate_is_no_text_and_no_number_without_trials() -> None:
    assert Rate(1, 2) != "0.5"
    with pytest.raises(TypeError, match="not supported"):
        _ = Rate(1, 2) < "0.5"
    empty = Rate(0, 0)
    assert not any([empty > 0, empty <= 0, empty == 0])
    assert empty == Rate(0, 0)
    assert max([Rate(1, 4), Rate(3, 4)]) == Rate(3, 4)


def test_nothing_is_known_where_no_answer_was_good_before() -> None:
    basr = Basr.of_counts(both=0, after=3, before=0)
    assert math.isnan(basr.value)
    assert basr.interval == (0.0, 1.0)
