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
    return "–" if value != value else f"{_one_digit(value)}{SPACE}%"


def points(difference: float) -> str:
    """``+12.5`` percentage points of a difference of fractions."""
    return signed(100 * difference, 1)


def interval(change: tuple[float, float, float]) -> str:
    """``−12.5 [−20.1, −4.0]``: percentage points of a difference of fractions, with its interval."""
    difference, low, high = change
    return f"{points(difference)} [{points(low)}, {points(high)}]"


def signed(value: Any, digits: int = 3) -> str:
    """``+0.460``, with a true minus sign; what rounds to zero has none."""
    text = f"{float(value):+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def magnitude(value: float, digits: int = 3) -> str:
    """``0.460``; ``< 0.001`` for what is too small to show, so that all numbers beside it are alike."""
    least = 10**-digits
    return f"{value:.{digits}f}" if value == 0 or value >= least else f"<{SPACE}{least:g}"


def coefficient_text(value: float) -> str:
    """``+2``, ``−0.5``."""
    return f"{value:+g}".replace("-", "−")


def interval_text(rate: Rate) -> str:
    """``94.1–99.5 %``; ``−5.0 to 10.0 %`` where it begins below zero."""
    return _span(*rate.interval)


def count_text(rate: Rate) -> str:
    """``118/120``."""
    return f"{rate.successes}/{rate.n}".replace("-", "−")


def rate_text(rate: Rate) -> str:
    """A rate with its count and interval."""
    return f"{percent(rate.value)} ({count_text(rate)}; 95{SPACE}% interval {interval_text(rate)})"


def short_rate(rate: Rate) -> str:
    """A rate with its count."""
    return f"{percent(rate.value)} ({count_text(rate)})"


def spread_text(draws: Draws) -> str:
    """``0.0–12.5 %``: the smallest and the largest share of random draws."""
    return _span(draws.low, draws.high)


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


def _one_digit(value: float) -> str:
    """One digit after the point, with a true minus sign; what rounds to zero has none."""
    text = f"{value:.1f}".replace("-", "−")
    return "0.0" if text == "−0.0" else text


def _span(low: float, high: float) -> str:
    """From one share to another; with a word between them where a dash would meet a minus."""
    between = " to " if _one_digit(100 * low).startswith("−") else "–"
    return f"{_one_digit(100 * low)}{between}{_one_digit(100 * high)}{SPACE}%"
