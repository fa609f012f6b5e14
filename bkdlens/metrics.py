"""Pure functions on tensors and counts: sequence probability, rates with intervals, the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

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
    """``P(y|x)^(1/|y|)``, the geometric mean over the answer's tokens (BkdAttr, Eq. 7).

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
    """A share of successes with its count and 95 % Wilson interval."""

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

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self.successes}/{self.n})"


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Compute the 95 % Wilson score interval of a binomial share.

    Args:
        successes: how many of the trials succeeded.
        n: how many trials there were.

    Returns:
        The low and high end, fractions 0 to 1; (0, 1) without trials.

    Examples:
        >>> low, high = bkdlens.metrics.wilson(9, 10)
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # A share of 0 or 1 is an end of its interval exactly; rounding must not push the end past the share.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def difference(a: Rate, b: Rate) -> tuple[float, float, float]:
    """Compute ``b - a`` with its 95 % interval (Newcombe 1998, method 10, from Wilson's).

    The two samples are taken as independent; if both have the same prompts, the interval is too wide.

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
