"""Sequence probability in log space, Wilson intervals, the bootstrap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bkdlens.metrics import (
    Rate,
    bootstrap_mean,
    sequence_log_prob,
    sequence_prob,
    token_log_probs,
    wilson,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


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
