"""How a number, its interval and its controls become a verdict: one rule for all questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bkdlens.display.text import join_words, percent
from bkdlens.metrics import Rate
from bkdlens.study import Answer, Verdict

NO_ANSWERS = "No answers were kept, as in results of version 0.1."
NO_CONTROL = "No control was run, which may reach as much."


def decide(
    *, meets: bool, sure: bool, reached: Sequence[str] | None, weak: str = "", vain: str = ""
) -> tuple[Answer, str]:
    """The answer, and why it is no plain one.

    Args:
        meets: whether the number itself meets the threshold.
        sure: whether its interval does, to the end.
        reached: the controls that come as far; None where there is no control.
        weak: what to say of a number that does not meet the threshold and yet counts; else it is a *no*.
        vain: why no number could say anything; empty where it can.
    """
    if vain:
        return "nothing can be concluded", vain
    if not meets:
        return ("mixed", weak) if weak else ("no", "")
    if reached is None:
        return "nothing can be concluded", NO_CONTROL
    if reached:
        return "mixed", as_far(reached)
    if not sure:
        return "mixed", "Its interval goes past the threshold: too few prompts to be sure."
    return "yes", ""


def as_far(controls: Sequence[str]) -> str:
    """Which controls do as much."""
    one = len(controls) == 1
    return f"{'A control comes' if one else 'Controls come'} as far: {join_words(controls)}."


def not_measured(analysis: str, question: str, why: str = "") -> Verdict:
    """The verdict of an analysis that was not run, or whose results lack what it takes."""
    return Verdict(analysis=analysis, question=question, answer="not measured", note=why)


def limit(share: float) -> str:
    """A threshold in per cent: ``90 %``."""
    return percent(share).replace(".0", "")


def sentences(texts: Iterable[str]) -> str:
    """Those that say something, one after the other."""
    return " ".join(text for text in texts if text)


def plain_rate(rate: Rate | None) -> dict[str, Any] | None:
    """A rate as plain values for json; None where it has no trials."""
    return rate.to_dict() if rate is not None and rate.n else None
