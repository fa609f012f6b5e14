"""Pure functions on tensors and counts: sequence probability, rates and their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


def token_log_probs(
    logits: Float[Tensor, "*batch pos d_vocab"], targets: Int[Tensor, "*batch pos"]
) -> Float[Tensor, "*batch pos"]:
    """Score each target token.

    Args:
        logits: what the model predicts at each position.
        targets: the id of the token at each position.

    Returns:
        ``[*batch pos]``, log probability in nats, at least in float32.

    Examples:
        >>> logits, ids = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
        >>> log_probs = bkdlens.metrics.token_log_probs(logits, ids)
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sequence_log_prob(
    log_probs: Float[Tensor, "*batch pos"], mask: Bool[Tensor, "*batch pos"]
) -> Float[Tensor, "*batch"]:
    """Average the log probability over the tokens of each answer.

    Args:
        log_probs: the log probability of each token, in nats.
        mask: which tokens belong to the answer.

    Returns:
        ``[*batch]``, mean log probability per token, in nats.

    Examples:
        >>> mean = bkdlens.metrics.sequence_log_prob(-torch.ones(2, 3), torch.ones(2, 3).bool())
    """
    return (log_probs * mask).sum(-1) / mask.sum(-1)


def sequence_prob(
    log_probs: Float[Tensor, "*batch pos"], mask: Bool[Tensor, "*batch pos"]
) -> Float[Tensor, "*batch"]:
    """``P(y|x)^(1/|y|)``, the geometric mean over the answer's tokens (BkdAttr, Section 4).

    Computed in log space: the product itself underflows in float32 after a dozen unlikely tokens.

    Args:
        log_probs: the log probability of each token, in nats.
        mask: which tokens belong to the answer.

    Returns:
        ``[*batch]``, probability per token, 0 to 1.

    Examples:
        >>> prob = bkdlens.metrics.sequence_prob(-torch.ones(2, 3), torch.ones(2, 3).bool())
    """
    return sequence_log_prob(log_probs, mask).exp()


@dataclass(frozen=True)
class Rate:
    """A share of successes with its count and 95 % Wilson interval.

    It converts, compares and is formatted as a number, its :attr:`value`: ``rate > 0.5``,
    ``f"{rate:.2f}"``. Two rates are equal if both counts are.
    """

    successes: int  # how many of the trials succeeded
    n: int  # how many trials there were

    @classmethod
    def of(cls, outcomes: Iterable[bool] | Bool[Tensor, " n"]) -> Rate:
        """Return the rate of true values, one per trial."""
        values = [bool(value) for value in outcomes]
        return cls(sum(values), len(values))

    @property
    def value(self) -> float:
        """The fraction of successes, 0 to 1; NaN without trials."""
        return self.successes / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end of the 95 % Wilson score interval (Wilson 1927), fractions 0 to 1."""
        return wilson(self.successes, self.n)

    def to_dict(self) -> dict[str, float]:
        """Return ``value``, ``low`` and ``high``, fractions 0 to 1, and both counts, by name."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, **asdict(self)}

    def __float__(self) -> float:
        return self.value

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rate):
            return (self.successes, self.n) == (other.successes, other.n)
        return self.value == other if isinstance(other, Real) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value)

    def __lt__(self, other: Rate | float) -> bool:
        return self.value < float(other) if isinstance(other, Rate | Real) else NotImplemented

    def __le__(self, other: Rate | float) -> bool:
        return self.value <= float(other) if isinstance(other, Rate | Real) else NotImplemented

    def __gt__(self, other: Rate | float) -> bool:
        return self.value > float(other) if isinstance(other, Rate | Real) else NotImplemented

    def __ge__(self, other: Rate | float) -> bool:
        return self.value >= float(other) if isinstance(other, Rate | Real) else NotImplemented

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self.successes}/{self.n})"


@dataclass(frozen=True)
class Basr(Rate):
    """Behavioural attack success: ``1 - good answers after / good answers before`` of the same victims.

    *Before* are the clean twins without an intervention, *after* the triggered prompts with it. It
    counts the good answers that are gone; where more are good after than before, it is negative.

    Attributes:
        successes: good answers before less those after.
        n: good answers before.
        lost: victims with a good answer before alone.
        gained: victims with a good answer after alone.
    """

    lost: int = 0
    gained: int = 0

    @classmethod
    def of_counts(cls, *, both: int, after: int, before: int) -> Basr:
        """Make it of the numbers of victims with a good answer before, after, and both."""
        return cls(before - after, before, before - both, after - both)

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % interval (:func:`paired_ratio`); (0, 1) where none was good before."""
        if not self.n:
            return 0.0, 1.0
        _, low, high = paired_ratio(self.n - self.lost, self.gained, self.lost)
        return 1 - high, 1 - low


@dataclass(frozen=True)
class ClusteredRate(Rate):
    """A share of successes among prompts that come in pairs, such as a prompt and its twin.

    The two of a pair are no independent trials. The interval is Wilson's for as many independent trials
    as say the same: ``n`` over the design effect ``1 + ρ`` (Rao and Scott 1992), where the correlation
    ``ρ`` of the two is Fleiss and Cuzick's (1979). It is never narrower than that of ``n`` independent
    trials.
    """

    split: int  # pairs of which one of the two succeeded

    @property
    def design_effect(self) -> float:
        """How many times less the trials say than independent ones, 1 to 2."""
        spread = self.successes * (self.n - self.successes)  # n² times the variance of a trial
        if not spread:
            return 2.0  # nothing tells how the two depend on each other
        return max(1.0, 2 - self.split * self.n / spread)

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end of the 95 % interval, fractions 0 to 1."""
        effect = self.design_effect
        return wilson(self.successes / effect, self.n / effect)


def wilson(successes: float, n: float, *, z: float = Z_95) -> tuple[float, float]:
    """Compute the 95 % Wilson score interval of a binomial share.

    Args:
        successes: how many of the trials succeeded.
        n: how many trials there were; no whole number where they depend on each other
            (:class:`ClusteredRate`).
        z: the normal quantile, for an interval of another level.

    Returns:
        The low and high end, fractions 0 to 1; (0, 1) without trials.

    Examples:
        >>> low, high = bkdlens.metrics.wilson(9, 10)
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # A share of 0 or 1 is an end of its interval exactly; rounding must not push the end past the share.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def difference(a: Rate, b: Rate) -> tuple[float, float, float]:
    """Compute ``b - a`` with its 95 % interval (Newcombe 1998, method 10, from Wilson's).

    The two samples are taken as independent. For outcomes on the same prompts there is
    :func:`paired_difference`; without the outcomes prompt by prompt this interval stands in for it, and
    is as a rule too wide.

    Args:
        a: the rate that is subtracted.
        b: the rate from which it is subtracted.

    Returns:
        The change and the low and high end of its interval, change of a fraction.

    Examples:
        >>> change, low, high = bkdlens.metrics.difference(bkdlens.Rate(1, 20), bkdlens.Rate(9, 20))
    """
    (low_a, high_a), (low_b, high_b) = a.interval, b.interval
    change = b.value - a.value
    below = math.hypot(b.value - low_b, high_a - a.value)
    above = math.hypot(high_b - b.value, a.value - low_a)
    return change, change - below, change + above


def paired_difference(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> tuple[float, float, float]:
    """Compute the rate of ``b`` minus that of ``a``, of the same prompts, with its 95 % interval.

    Newcombe (1998, paired data), method 10: both Wilson intervals, joined under the correlation of the
    outcomes. :func:`mcnemar` tests the same difference.

    Args:
        a: whether each prompt succeeded in the one run.
        b: whether the same prompt succeeded in the other.

    Returns:
        The change and the low and high end of its interval, change of a fraction; NaN, -1 and 1 without
        prompts.

    Examples:
        >>> before, after = torch.tensor([True, True, False]), torch.tensor([True, False, False])
        >>> change, low, high = bkdlens.metrics.paired_difference(before, after)
    """
    n, both, only_a, only_b = _paired_counts(a, b)
    if n == 0:
        return math.nan, -1.0, 1.0
    neither = n - both - only_a - only_b
    rate_a, rate_b = Rate(both + only_a, n), Rate(both + only_b, n)
    (low_a, high_a), (low_b, high_b) = rate_a.interval, rate_b.interval
    margins = math.prod((rate_a.successes, n - rate_a.successes, rate_b.successes, n - rate_b.successes))
    # Agreement beyond chance, with a continuity correction where it is positive.
    beyond = float(both * neither - only_a * only_b)
    beyond = beyond if beyond < 0 else max(beyond - n / 2, 0.0)
    phi = beyond / math.sqrt(margins) if margins else 0.0

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    change = (only_b - only_a) / n
    below = joined(rate_b.value - low_b, high_a - rate_a.value)
    above = joined(high_b - rate_b.value, rate_a.value - low_a)
    return change, max(-1.0, change - below), min(1.0, change + above)


def mcnemar(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> float:
    """Compute the exact two-sided p of McNemar's test that two runs do equally well on the same prompts.

    Of the prompts whose outcome changed, as many should have changed each way (binomial).

    Args:
        a: whether each prompt succeeded in the one run.
        b: whether the same prompt succeeded in the other.

    Returns:
        The probability of a change at least as one-sided, 0 to 1; 1 where no outcome changed.

    Examples:
        >>> before, after = torch.tensor([True, True, False]), torch.tensor([True, False, False])
        >>> p = bkdlens.metrics.mcnemar(before, after)
    """
    _, _, only_a, only_b = _paired_counts(a, b)
    changed = only_a + only_b
    tail = sum(math.comb(changed, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**changed)


def paired_ratio(both: int, only_after: int, only_before: int) -> tuple[float, float, float]:
    """Compute the ratio of two rates of the same prompts, after by before, with its 95 % interval.

    The score interval (Tang, Tang and Chan 2003): all ratios that the counts do not reject. It keeps its
    coverage where counts are zero and near a ratio of 1, where closed forms do not. Prompts that never
    succeeded say nothing about the ratio and are not asked for.

    Args:
        both: prompts that succeeded before and after.
        only_after: prompts that succeeded after alone.
        only_before: prompts that succeeded before alone.

    Returns:
        The ratio and the low and high end of its interval, from 0 up; NaN, 0 and infinity where none
        succeeded before.

    Examples:
        >>> ratio, low, high = bkdlens.metrics.paired_ratio(59, 6, 16)
    """
    n, after, before = both + only_after + only_before, both + only_after, both + only_before
    if not before:
        return math.nan, 0.0, math.inf

    def rejected(r: float) -> bool:
        # Were r the ratio, the likeliest share q of prompts that succeed after alone: a q² = b q + c.
        a, c = n * r * (1 + r), only_after * r * (1 - r)
        b = only_after * (2 * r * r - 1) + only_before * r * r - both * (1 - r * r)
        q = (b + math.sqrt(max(0.0, b * b + 4 * a * c))) / (2 * a)
        variance = n * r * (1 - r + (1 + r) * q)
        return (after - r * before) ** 2 > Z_95**2 * variance

    def end(step: float) -> float:
        """Where ratios begin to be rejected: outwards by steps, then by halves in the logarithm."""
        inside, outside = start, start * step
        while not rejected(outside):
            inside, outside = outside, outside * step
        for _ in range(60):
            middle = math.sqrt(inside * outside)
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    ratio = after / before
    start = ratio or 1e-9 / n  # of none, the smallest ratio that is told from 0
    return ratio, end(0.5) if after else 0.0, end(2.0)


def _paired_counts(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> tuple[int, int, int, int]:
    """How many prompts there are, and how many succeed in both runs, in ``a`` and in ``b`` alone."""
    a, b = a.cpu(), b.cpu()
    return len(a), int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())


def resampling_counts(n: int, n_resamples: int, seed: int) -> Float[Tensor, "draw n"]:
    """Count how often each of ``n`` items is drawn in each bootstrap sample (Efron 1979).

    With counts instead of resampled copies, one matrix product gives all means.

    Args:
        n: the number of items, and of draws per sample.
        n_resamples: how many samples.
        seed: of the draws.

    Returns:
        ``[draw n]``, counts in float64; each row sums to ``n``.

    Examples:
        >>> counts = bkdlens.metrics.resampling_counts(24, 1000, seed=0)
    """
    draws = torch.randint(n, (n_resamples, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(n_resamples, n, dtype=torch.float64)
    return counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))


def bootstrap_mean(
    values: Float[Tensor, " n *rest"], *, n_resamples: int = 1000, seed: int = 0
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Compute the 95 % percentile interval of the mean over the first axis (Efron 1979).

    Args:
        values: a number or tensor per trial.
        n_resamples: how many bootstrap samples.
        seed: of the draws.

    Returns:
        The low and high end, each ``[*rest]``, in the unit of the values.

    Examples:
        >>> low, high = bkdlens.metrics.bootstrap_mean(torch.randn(24, 3))
    """
    n = values.shape[0]
    flat = values.detach().to("cpu", torch.float64).reshape(n, -1)
    means = resampling_counts(n, n_resamples, seed) @ flat / n
    ends = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    low, high = (end.reshape(values.shape[1:]).to(values.dtype) for end in ends)
    return low, high
