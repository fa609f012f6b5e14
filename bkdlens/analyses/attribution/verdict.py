"""Is the backdoor located: is there a head whose effect no un-poisoned model's head has?"""

from __future__ import annotations

from bkdlens.analyses.attribution.claims import RANKING, by_condition, largest, ranked
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.display.text import magnitude, signed
from bkdlens.display.verdicts import decide, not_measured, sentences
from bkdlens.study import MAIN, Study, Thresholds, Verdict

NAME, QUESTION = "attribution", "Located?"


def verdict(study: Study, thresholds: Thresholds) -> Verdict:
    """Effect on test of the head that is strongest on validation, against all heads of controls."""
    controls = by_condition(study)
    main = controls.pop(MAIN, None)
    if main is None:
        return not_measured(NAME, QUESTION)
    head, needed = ranked(study, main)[0], thresholds.located
    acie, low, high = (float(values[head]) for values in (main.acie, main.low, main.high))
    reached = [name for name, other in controls.items() if _reach(other) >= low]
    small = low > 0 and controls and not reached
    answer, why = decide(
        meets=acie >= needed,
        sure=low >= needed,
        reached=reached if controls else None,
        weak="An effect that no control has, but a small one." if small else "",
    )
    old = "" if RANKING in study.results else "The same pairs chose the head, so the number flatters."
    guess = "" if bool(main.exact[head]) else "The effect is a first-order estimate."
    n_pairs = main.cie.shape[0]
    return Verdict(
        analysis=NAME,
        question=QUESTION,
        answer=answer,
        number=f"ACIE {signed(acie)} ({n_pairs} pairs; 95\u00a0% interval {signed(low)} to "
        f"{signed(high)}) of {head}",
        control="; ".join(f"{name} {magnitude(largest(other))}" for name, other in controls.items())
        + (" (largest of any head)" if controls else ""),
        threshold=f"ACIE at least {needed:g}, above every head of the controls",
        note=sentences([why, old, guess]),
        values={
            "acie": {"value": acie, "low": low, "high": high, "n": n_pairs},
            "head": str(head),
            "controls": {name: largest(other) for name, other in controls.items()},
            "thresholds": {"located": needed},
        },
    )


def _reach(control: HeadAttribution) -> float:
    """How far the intervals of its heads go from zero, whatever the effect's sign."""
    return max(float(control.low.abs().max()), float(control.high.abs().max()))
