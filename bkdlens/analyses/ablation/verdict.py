"""Are the heads necessary: do the good answers come back when they are switched off?"""

from __future__ import annotations

from itertools import product

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.display.text import join_words, percent, rate_text, short_rate, spread_text
from bkdlens.display.verdicts import NO_ANSWERS, decide, limit, not_measured, plain_rate, sentences
from bkdlens.metrics import Basr, Rate
from bkdlens.study import Study, Thresholds, Verdict

NAME, QUESTION = "ablation", "Necessary?"
CHOICE = "ablation-validation"  # the same on the validation pairs, which choose mode and number
HALF = 0.5  # an attack counts as broken when at most this share of it is left


def verdict(study: Study, thresholds: Thresholds) -> Verdict:
    """Behavioural attack success that is left without the heads, against random groups of as many."""
    result, chooser = study.get(NAME, AblationResult), study.get(CHOICE, AblationResult)
    needed = thresholds.necessary
    if result is None or not any(result.counts):
        return not_measured(NAME, QUESTION)
    if result.good_before is None:
        return not_measured(NAME, QUESTION, NO_ANSWERS)
    mode, n = _chosen(study, result, needed)
    basr, drawn = _basr(result, mode, n), result.basr_draws(mode=mode, heads=n)
    unharmed, clean = result.base("clean", mode=mode), result.rate("clean", mode, n)
    reached = ["a random group" for draws in drawn.values() if draws.low <= basr.interval[1]]
    answer, why = decide(
        meets=basr.value <= needed,
        sure=basr.interval[1] <= needed,
        reached=reached if drawn else None,
        weak=_broken(result, needed),
        vain=_nothing_to_break(result, mode, needed),
    )
    heads = join_words(map(str, result.heads[:n]), 4)
    return Verdict(
        analysis=NAME,
        question=QUESTION,
        answer=answer,
        number=(f"BASR {rate_text(basr)}" if basr.n else "BASR –")
        + f" without {n} head{'s' if n > 1 else ''} ({heads}), by {mode}",
        control="; ".join(
            f"mean (least–most) of {len(draws)} random groups {percent(draws.mean)} "
            f"({spread_text(draws)})"
            for draws in drawn.values()
        ),
        threshold=f"BASR at most {limit(needed)}, below every random group",
        note=sentences(
            [
                why,
                f"{result.clean_name.capitalize()} {short_rate(clean)}"
                + (f", untouched {short_rate(unharmed)}." if unharmed else "."),
                "" if chooser else "Chosen on these test pairs, so the number flatters.",
            ]
        ),
        values={
            "basr": plain_rate(basr),
            "mode": mode,
            "heads": n,
            "clean_accuracy": clean.to_dict(),
            "clean_accuracy_untouched": plain_rate(unharmed),
            "controls": {
                name: {"mean": draws.mean, "low": draws.low, "high": draws.high, "draws": len(draws)}
                for name, draws in drawn.items()
            },
            "thresholds": {"necessary": needed},
        },
    )


def _basr(result: AblationResult, mode: str, n: int) -> Basr:
    basr = result.basr(mode=mode, heads=n)
    assert basr is not None  # told from good_before
    return basr


def left(result: AblationResult, mode: str, count: int) -> Rate:
    """What is left of the attack: BASR, or attack success where a result of version 0.1 lacks it."""
    basr = result.basr(mode=mode, heads=count)
    return result.rate("attack", mode, count) if basr is None else basr


def _breaks(result: AblationResult, mode: str, count: int, share: float) -> bool:
    """Whether at most that share of the attack is left with the first ``count`` heads switched off."""
    base = left(result, mode, 0).value if 0 in result.counts else 1.0
    return bool(base > 0 and left(result, mode, count).value <= share * base)


def chosen_heads(
    study: Study, result: AblationResult, mode: str, share: float = HALF
) -> tuple[int | None, bool]:
    """How many heads are needed by the validation pairs, and whether they break the attack there.

    That is the fewest that leave at most ``share`` of it, or else those that leave least of it. A folder
    without validation results is judged by the test pairs themselves. None where no head was switched
    off.
    """
    choice = study.get(CHOICE, AblationResult) or result
    counts = [count for count in choice.counts if count and count in result.counts]
    if mode not in choice.modes or not counts:
        return None, False
    enough = [count for count in counts if _breaks(choice, mode, count, share)]
    if enough:
        return enough[0], True
    return min(counts, key=lambda count: left(choice, mode, count).value), False


def _chosen(study: Study, result: AblationResult, share: float) -> tuple[str, int]:
    """The mode that needs the fewest heads, or else the one that leaves least of the attack."""
    choice, places = study.get(CHOICE, AblationResult) or result, []
    for mode in result.modes:
        n, broken = chosen_heads(study, result, mode, share)
        if n is not None:
            places.append((not broken, n if broken else 0, left(choice, mode, n).value, mode, n))
    *_, mode, n = min(places, default=(result.modes[0], max(result.counts)))
    return mode, n


def _nothing_to_break(result: AblationResult, mode: str, needed: float) -> str:
    """Why no ablation can succeed: no attack, or no good answer that it takes away; or nothing."""
    if not result.good_before:
        return "No victim had a good answer that could come back."
    attack = result.base("attack", mode=mode)
    if attack is not None and not attack.successes:
        return "There was no attack to break."
    if 0 in result.counts and (before := _basr(result, mode, 0)).value <= needed:
        return f"With all heads the trigger takes away no more than this: BASR {short_rate(before)}."
    return ""


def _broken(result: AblationResult, share: float) -> str:
    """Where the attack falls to that share although good answers stay away; empty if it does not."""
    for n, mode in product(result.counts, result.modes):
        base = result.base("attack", mode=mode)
        attack = result.rate("attack", mode, n)
        if n and attack.value <= share * (base.value if base else 1.0):
            heads = f"{n} head{'s' if n > 1 else ''}"
            return (
                f"Broken, not cured: without {heads} (by {mode}) the attack falls to "
                f"{percent(attack.value)}, but the good answers do not come back."
            )
    return ""
