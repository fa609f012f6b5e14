"""Numbers as a person reads them: per cent, signs, intervals, and lists of words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from bkdlens.counts import Draws
from bkdlens.metrics import Rate

SPACE = "\u00a0"


def percent(share: Any) -> str:
    """``98.3 %``."""
    value = 100 * float(share)
    return "–" if value != value else f"{value:.1f}{SPACE}%"


def points(difference: float) -> str:
    """``+12.5`` percentage points of a difference of fractions."""
    return signed(100 * difference, 1)


def signed(value: Any, digits: int = 3) -> str:
    """``+0.460``, with a true minus sign."""
    return f"{float(value):+.{digits}f}".replace("-", "−")


def coefficient_text(value: float) -> str:
    """``+2``, ``−0.5``."""
    return f"{value:+g}".replace("-", "−")


def interval_text(rate: Rate) -> str:
    """``94.1–99.5 %``."""
    low, high = rate.interval
    return f"{100 * low:.1f}–{100 * high:.1f}{SPACE}%"


def rate_text(rate: Rate) -> str:
    """A rate with its count and interval."""
    return (
        f"{percent(rate.value)} ({rate.successes}/{rate.n}; 95{SPACE}% interval {interval_text(rate)})"
    )


def short_rate(rate: Rate) -> str:
    """A rate with its count."""
    return f"{percent(rate.value)} ({rate.successes}/{rate.n})"


def spread_text(draws: Draws) -> str:
    """``0.0–12.5 %``: the smallest and the largest share of random draws."""
    return f"{100 * draws.low:.1f}–{100 * draws.high:.1f}{SPACE}%"


def plain(text: str) -> str:
    """Text of models and files without what a terminal would obey: escapes are shown, not sent."""
    return "".join(c if c.isprintable() or c == SPACE else repr(c)[1:-1] for c in text)


def join_words(items: Iterable[str], most: int = 99) -> str:
    """``a, b and c``, or the first of them."""
    names = list(items)
    if len(names) > most:
        return ", ".join(names[:most]) + ", …"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plain_json(value: Any) -> str:
    """Settings as a person writes them: no outer braces or quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain_json(v)}" for key, v in value.items()) or "–"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain_json(v) for v in value) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str)
