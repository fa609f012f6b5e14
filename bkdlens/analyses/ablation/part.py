"""Ablation in a study: how few heads break the attack, beside what is left right and random groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from bkdlens.analyses.ablation import figures
from bkdlens.analyses.ablation.measure import AblationResult, ablate_heads
from bkdlens.analyses.base import Drawing, Part, Subject
from bkdlens.display.drawing import Drawer
from bkdlens.display.tables import (
    NOT_RUN,
    Basis,
    Cell,
    Number,
    Rows,
    Section,
    Table,
    draws_cell,
    rate_cell,
)
from bkdlens.display.text import join_words, percent, rate_text, short_rate, spread_text
from bkdlens.study import Study
from bkdlens.types import AblationMode

NAME = "ablation"
HALF = 0.5  # an attack counts as broken when at most this share of it is left
WHAT = {"attack": "attack", "correct": "restored", "clean": "clean"}  # with their titles in tables


def run(subject: Subject) -> None:
    """Switch off the first heads of the suspected model's ranking, on the test pairs."""
    run, settings = subject.run, subject.run.settings
    run.step(
        NAME,
        lambda: ablate_heads(
            subject.model,
            run.test,
            run.ranking,
            cache=subject.cache,
            counts=settings.ablation_counts,
            modes=cast(Sequence[AblationMode], settings.ablation_modes),
            n_random=settings.n_random,
            seed=settings.seed,
            **run.decoding,
        ),
    )


def fewest_heads(result: AblationResult, mode: str) -> int | None:
    """The smallest number of heads that leaves at most half of the attack; None if none does."""
    base = result.base("attack", mode=mode)
    limit = HALF * (1.0 if base is None else base.value)
    hit = [n for n in result.counts if n and result.rate("attack", mode, n).value <= limit]
    return hit[0] if hit and limit else None


def claims(study: Study) -> list[str]:
    """One sentence per mode: the fewest heads that halve the attack, or the best that was tried."""
    result = study.get(NAME, AblationResult)
    if result is None:
        return []
    return [f"Ablation by {mode}: {_claim(result, mode)}" for mode in result.modes]


def _claim(result: AblationResult, mode: str) -> str:
    counts = [count for count in result.counts if count]
    base, unharmed = result.base("attack", mode=mode), result.base("clean", mode=mode)
    if base and not base.successes:
        return f"there was no attack to break ({rate_text(base)} without ablation)."
    if not counts:
        return "no head was ablated."
    before = f"from {short_rate(base)} " if base else ""
    n = fewest_heads(result, mode)
    if n is None:
        n = min(counts, key=lambda count: result.rate("attack", mode, count).value)
        return (
            f"no number of heads tried, up to {counts[-1]}, halves the attack; {n} heads bring it "
            f"{before}to {rate_text(result.rate('attack', mode, n))} at best."
        )
    clean = result.rate("clean", mode, n)
    text = (
        f"{n} head{'s' if n > 1 else ''} ({join_words(map(str, result.heads[:n]), 4)}) "
        f"bring{'' if n > 1 else 's'} the attack {before}to "
        f"{rate_text(result.rate('attack', mode, n))}, the fewest tried that leave at most half of it; "
        f"the right answer comes back in {short_rate(result.rate('correct', mode, n))} of victims, and "
        f"clean accuracy is {short_rate(clean)}"
        + (f" ({short_rate(unharmed)} without ablation)." if unharmed else ".")
    )
    if unharmed and clean.interval[1] < unharmed.interval[0]:
        text += " Clean accuracy falls beyond its interval, so part of this is damage."
    for draws in result.draws("attack", mode=mode, heads=n).values():
        text += (
            f" With {len(draws)} random groups of as many heads the attack is "
            f"{percent(draws.mean)} on average ({spread_text(draws)}), clean accuracy "
            f"{percent(result.random_mean('clean', mode, n))}."
        )
        if draws.mean <= HALF * (base.value if base else 1.0):
            text += " Random groups do as much, so this says nothing about these heads."
    return text


def basis(study: Study) -> Basis:
    """The modes and numbers of heads, and random groups as the control."""
    result = cast(AblationResult, study.get(NAME, AblationResult))
    counts = ", ".join(map(str, result.counts))
    return Basis.of(
        result,
        f"last prompt token, prefill only; {join_words(result.modes)}; {counts} heads",
        f"{result.n_victims} triggered victims, {result.n_clean} clean prompts",
        [f"{_n_groups(result)} random groups of as many heads"] if result.controls else [],
        ["max_new_tokens"],
    )


def sections(study: Study, draw: Drawer) -> list[Section]:
    """The curves by number of heads, and every number."""
    result = study.get(NAME, AblationResult)
    parts: list[Any] = []
    if result is not None:
        parts = [[draw(figures.ablation_curve(result), data={NAME: result})], table(result)]
    section = Section(
        NAME,
        "Ablation",
        "The first heads of the ranking are switched off at the last prompt token. Attack success is "
        "measured on triggered victims, beside how often the right answer comes back and how many "
        "clean prompts are still answered correctly.",
        "An ablation that breaks the model ends the attack as well: trust a falling attack only where "
        "clean accuracy holds and right answers return. The grey band is the attack with random "
        "groups of as many heads; it should stay high.",
        parts,
    )
    return [section]


def tables(study: Study, width: int, unicode: bool) -> Iterator[Table]:
    """One row per mode and number of heads."""
    result = study.get(NAME, AblationResult)
    if result is not None:
        yield table(result)


def table(result: AblationResult) -> Table:
    """One row per mode and number of heads, with the random groups where there are any."""
    rows: Rows = []
    for mode in result.modes:
        for n in result.counts:
            at = {"mode": mode, "heads": n}
            controls = [result.draws(what, **at).get("random") for what in WHAT if result.controls]
            rates = [rate_cell(result.rate_at(what, **at)) for what in WHAT]
            rows.append([mode, str(n), *rates, *map(draws_cell, controls)])
    columns, title = ["mode", "heads", *WHAT.values()], "Ablation numbers"
    if result.controls:
        columns += [f"random: {name}" for name in WHAT.values()]
        title += f" (random groups: mean and least–most of {_n_groups(result)})"
    return Table(title, columns, rows)


def overview(study: Study) -> dict[str, Cell]:
    """How many heads halve the attack, by mode."""
    result, title = study.get(NAME, AblationResult), "heads to halve it"
    if result is None:
        return {title: NOT_RUN}
    fewest = [f"{mode} {fewest_heads(result, mode) or 'none'}" for mode in result.modes]
    return {title: Cell(", ".join(fewest))}


def numbers(study: Study) -> dict[str, Number]:
    """The heads that halve the attack, and the first three numbers of heads, by mode."""
    result = study.get(NAME, AblationResult)
    found: dict[str, Number] = {}
    if result is None:
        return found
    for mode in result.modes:
        fewest = fewest_heads(result, mode)
        found[f"heads to halve the attack, {mode}"] = Cell(str(fewest or "none of those tried"))
        for count in [c for c in result.counts if c][:3]:
            heads = f"{count} head{'s' if count > 1 else ''}"
            draws = result.draws("attack", mode=mode, heads=count).values()
            note = "".join(f"random {spread_text(drawn)}" for drawn in draws)
            found[f"attack, {heads} by {mode}"] = result.rate("attack", mode, count), note
            found[f"clean accuracy, {heads} by {mode}"] = result.rate("clean", mode, count), ""
    return found


def drawing(study: Study) -> Drawing | None:
    """The curves of one mode: the clean mean where it was run."""
    result = study.get(NAME, AblationResult)
    if result is None:
        return None
    mode = "mean" if "mean" in result.modes else result.modes[0]
    return figures.ablation_curve(result, mode), {NAME: result}


def summary(study: Study) -> dict[str, Any]:
    """Every row of the table."""
    result = study.get(NAME, AblationResult)
    return {} if result is None else {"ablation": result.to_frame().to_dict("records")}


def _n_groups(result: AblationResult) -> int:
    return result.random_attack.shape[-1]


PART = Part(
    name=NAME, step="ablate", needs=("attribution",), for_controls=False, run=run, claims=claims,
    basis=basis, sections=sections, tables=tables, overview=overview, numbers=numbers, drawing=drawing,
    summary=summary,
)  # fmt: skip
