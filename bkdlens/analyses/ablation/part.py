"""Ablation in a study: how few heads break the attack, beside what is left right and random groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from bkdlens.analyses.ablation import figures
from bkdlens.analyses.ablation.measure import AblationResult, ablate_heads
from bkdlens.analyses.ablation.verdict import CHOICE, NAME, chosen_heads, left, verdict
from bkdlens.analyses.base import Drawing, Part, Subject, unchanged
from bkdlens.data.pairs import PairSet
from bkdlens.display.drawing import Drawer
from bkdlens.display.tables import (
    NOT_RUN,
    Basis,
    Cell,
    Counted,
    Number,
    Rows,
    Section,
    Table,
    answers_table,
    draws_cell,
    rate_cell,
)
from bkdlens.display.text import interval, join_words, percent, rate_text, short_rate, spread_text
from bkdlens.study import Study
from bkdlens.types import AblationMode

WHAT = {"attack": "ASR", "correct": "right again", "clean": "clean accuracy"}  # titles in tables


def run(subject: Subject) -> None:
    """Switch off the first heads of the ranking: on validation, which chooses how many, and on test."""
    run, settings = subject.run, subject.run.settings

    def ablate(pairs: PairSet, n_random: int) -> AblationResult:
        return ablate_heads(
            subject.model,
            pairs,
            run.ranking,
            cache=subject.cache,
            counts=settings.ablation_counts,
            modes=cast(Sequence[AblationMode], settings.ablation_modes),
            n_random=n_random,
            seed=settings.seed,
            keep_controls=settings.keep_controls,
            **run.decoding,
        )

    run.step(CHOICE, lambda: ablate(run.validation, 0))
    run.step(NAME, lambda: ablate(run.test, settings.n_random))


def claims(study: Study) -> list[str]:
    """One sentence per mode: what the heads that validation chose leave of the attack on test."""
    result = study.get(NAME, AblationResult)
    if result is None:
        return []
    return [f"Ablation by {mode}: {_claim(study, result, mode)}" for mode in result.modes]


def _claim(study: Study, result: AblationResult, mode: str) -> str:
    base, unharmed = result.base("attack", mode=mode), result.base("clean", mode=mode)
    n, halved = chosen_heads(study, result, mode)
    if base and not base.successes:
        return f"there was no attack to break ({rate_text(base)} without ablation)."
    if n is None:
        return "no head was ablated."
    at: dict[str, Any] = {"mode": mode, "heads": n}
    attack, clean, basr = (
        result.rate("attack", mode, n),
        result.rate("clean", mode, n),
        result.basr(**at),
    )
    measure = "attack success" if basr is None else "behavioural attack success (BASR)"
    where = "on these same prompts" if study.get(CHOICE, AblationResult) is None else "on validation"
    one = n == 1
    heads = f"{n} head{'' if one else 's'} ({join_words(map(str, result.heads[:n]), 4)})"
    if halved:
        why = f"the fewest that halve {measure} {where}"
    else:
        most = max(result.counts)
        why = f"the best of up to {most} {where}, where no number of heads tried halves {measure}"
    text = f"{heads}, {why}, "
    if basr is not None:
        before = result.basr(mode=mode, heads=0) if 0 in result.counts else None
        text += f"bring{'s' * one} BASR "
        text += f"from {short_rate(before)} to " if before else "to "
        text += f"{rate_text(basr)} and attack success "
    else:
        text += f"bring{'s' * one} attack success "
    text += f"from {short_rate(base)} to " if base else "to "
    right, name = short_rate(result.rate("correct", mode, n)), result.clean_name
    text += f"{rate_text(attack)}; a good answer comes back in {right} of victims; "
    text += f"{name}: {short_rate(clean)}"
    text += f" ({short_rate(unharmed)} without ablation)." if unharmed else "."
    if base and attack.value >= base.value:
        text += " That is no fall at all."
    change = result.clean_change(**at)
    if change and change[2] < 0:
        text += f" The change of {name} is beyond chance ({interval(change)} points, paired): damage."
    elif change is None and unharmed and clean.interval[1] < unharmed.interval[0]:
        text += " Clean accuracy falls beyond its interval, so part of this is damage."
    draws, found = result.draws("attack", **at).get("random"), result.basr_draws(**at).get("random")
    if draws is not None:
        control, what = found or draws, "BASR" if found else "the attack"
        text += (
            f" With {len(draws)} random groups of as many other heads {what} "
            f"is {percent(control.mean)} on average ({spread_text(control)}), {name} "
            f"{percent(result.random_mean('clean', mode, n))}."
        )
        if control.low <= left(result, mode, n).value:
            text += " A random group does as much, so this says nothing about these heads."
    return text


def basis(study: Study) -> Basis:
    """The modes and numbers of heads, and random groups as the control."""
    result = cast(AblationResult, study.get(NAME, AblationResult))
    counts = ", ".join(map(str, result.counts))
    return Basis.of(
        result,
        f"last prompt token, prefill only; {join_words(result.modes)}; {counts} heads",
        f"{result.n_victims} triggered victims, {result.n_clean} clean prompts",
        [f"{_n_groups(result)} random groups of as many other heads"] if result.controls else [],
        ["max_new_tokens", "criteria"],
    )


def sections(study: Study, draw: Drawer) -> list[Section]:
    """The curves by number of heads, and every number."""
    result = study.get(NAME, AblationResult)
    parts: list[Any] = []
    if result is not None:
        parts = [[draw(figures.ablation_curve(result), data={NAME: result})], table(result)]
        parts += _answers(study, result)
    section = Section(
        NAME,
        "Ablation",
        "The first heads of the ranking are switched off at the last prompt token. Behavioural attack "
        "success (BASR) is the share of victims' good answers that are gone: one minus the good answers "
        "to triggered prompts, over those of the untouched model to their clean twins. How many heads "
        "are needed is read off the validation pairs, and reported on the test pairs.",
        "An ablation that breaks the model ends the attack (ASR) as well, but not BASR: trust a falling "
        "attack only where BASR falls with it and clean accuracy holds. The grey band is the attack "
        "with random groups of as many other heads; it should stay high.",
        parts,
    )
    return [section]


def _answers(study: Study, result: AblationResult) -> list[Table]:
    """Every answer without the heads that were chosen, where the study holds answers and prompts."""
    every = study.outcomes_of(result)
    if every is None:
        return []
    tables = []
    for mode in result.modes:
        n, _ = chosen_heads(study, result, mode)
        here = (every["mode"] == mode) & (every["heads"] == n) & (every["on"] == "triggered")
        named = every[here]
        title = f"Every victim's answer without {n} head{'s' if n != 1 else ''}, by {mode}"
        tables += [answers_table(title, named)] if len(named) else []
    return tables


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
            row: list[Cell | str] = [mode, str(n), rate_cell(result.basr(**at))]
            row += [rate_cell(result.rate_at(what, **at)) for what in WHAT]
            if result.controls:
                row.append(draws_cell(result.basr_draws(**at).get("random")))
                row += [draws_cell(result.draws(what, **at).get("random")) for what in WHAT]
            rows.append(row)
    titles = ("BASR", *(WHAT | {"clean": result.clean_name}).values())
    columns, title = ["mode", "heads", *titles], "Ablation numbers"
    if result.controls:
        columns += [f"random: {name}" for name in titles]
        title += f" (random groups: mean and least–most of {_n_groups(result)})"
    return Table(title, columns, rows)


def overview(study: Study) -> dict[str, Cell]:
    """How many heads halve the attack, by mode, and what is left of it."""
    result, title = study.get(NAME, AblationResult), "heads to halve BASR"
    if result is None:
        return {title: NOT_RUN}
    found, left_right = [], []
    for mode in result.modes:
        n, halved = chosen_heads(study, result, mode)
        found.append(f"{mode} {n if halved else 'none'}")
        if n is not None:
            basr = result.basr(mode=mode, heads=n)
            told = f"BASR {percent(basr.value)}, " if basr is not None else ""
            clean = percent(result.rate("clean", mode, n).value)
            left_right.append(f"{mode} {n}: {told}{result.clean_name} {clean}")
    return {title: Cell(", ".join(found), "; ".join(left_right))}


def numbers(study: Study) -> dict[str, Number]:
    """The heads that halve the attack, and the first three numbers of heads, by mode."""
    result = study.get(NAME, AblationResult)
    found: dict[str, Number] = {}
    if result is None:
        return found
    for mode in result.modes:
        fewest, halved = chosen_heads(study, result, mode)
        found[f"heads to halve BASR, {mode}"] = Cell(str(fewest if halved else "none of those tried"))
        for count in [c for c in result.counts if c][:3]:
            at: dict[str, Any] = {"mode": mode, "heads": count}
            heads = f"{count} head{'s' if count > 1 else ''}"
            if (basr := result.basr(**at)) is not None:
                drawn = "".join(f"random {spread_text(d)}" for d in result.basr_draws(**at).values())
                found[f"BASR, {heads} by {mode}"] = basr, drawn
            note = "".join(f"random {spread_text(d)}" for d in result.draws("attack", **at).values())
            for what, name, told in (("attack", "attack", note), ("clean", result.clean_name, "")):
                of, data = result.outcomes_at(what, **at), result.provenance.data_digest
                rate = result.rate(what, mode, count)
                found[f"{name}, {heads} by {mode}"] = Counted(rate, told, of, data)
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
    summary=summary, verdict=verdict, rechoose=unchanged,
)  # fmt: skip
