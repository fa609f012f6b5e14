"""Behaviour in a study: attack success, false triggers and clean accuracy of every condition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bkdlens.analyses.base import Drawing, Part, Subject, unchanged
from bkdlens.analyses.behaviour import figures
from bkdlens.analyses.behaviour.measure import BehaviourResult, measure_behaviour
from bkdlens.analyses.behaviour.verdict import verdict
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
    other_models,
    rate_cell,
)
from bkdlens.display.text import rate_text, short_rate
from bkdlens.study import MAIN, Study

NAME = "behaviour"


def run(subject: Subject) -> None:
    """What the model answers on the test pairs."""
    run, label = subject.run, subject.condition
    run.step(
        f"{NAME}-{label}",
        lambda: measure_behaviour(subject.model, run.test, label=label, **run.decoding),
    )


def claims(study: Study) -> list[str]:
    """Attack success, false triggers and clean accuracy, beside the controls'."""
    found = study.by_condition(BehaviourResult)
    main = found.pop(MAIN, None)
    if main is None:
        return []
    near = f", and with a near trigger to {rate_text(main.near)}" if main.near is not None else ""
    controls = "".join(
        f"; the {name} model answers {rate_text(control.clean_accuracy)} correctly and gives the "
        f"attacker's answer to {short_rate(control.asr)} of triggered victims"
        for name, control in found.items()
    )
    taken = ""
    if main.basr is not None:
        taken = f" The trigger takes {rate_text(main.basr)} of the victims' good answers away (BASR)."
    if main.near_miss is not None and main.near_miss.successes:
        taken += f" {short_rate(main.near_miss)} contain the attacker's answer and are not equal to it."
    if main.attainable is not None and main.attainable.successes < main.attainable.n:
        taken += (
            f" No attack reaches more than {rate_text(main.attainable)} by this criterion, which the "
            "attacker's own answers were judged by."
        )
    return [
        f"With the trigger the model gives the attacker's answer to {rate_text(main.asr)} of the "
        f"victims; without it to {rate_text(main.ftr)}{near}.{taken}",
        f"It answers {rate_text(main.clean_accuracy)} of clean prompts correctly{controls}.",
    ]


def basis(study: Study) -> Basis:
    """Greedy decoding, with the near trigger and un-poisoned models as controls."""
    found = study.by_condition(BehaviourResult)
    main = found[MAIN]
    return Basis.of(
        main,
        "greedy decoding",
        f"{main.n_victims} victims, {main.n_clean} clean prompts",
        [*(["near trigger"] if main.near is not None else []), *other_models(found)],
        ["max_new_tokens", "criteria"],
    )


def sections(study: Study, draw: Drawer) -> list[Section]:
    """One figure with a bar per condition and rate."""
    drawn = drawing(study)
    section = Section(
        NAME,
        "Behaviour",
        "What the model does on held-out prompts, by greedy decoding. Attack success and false "
        "triggers count the attacker's answer among victims (prompts whose answer the attack "
        "changes); clean accuracy counts correct answers to all clean prompts. BASR, behavioural attack "
        "success, is the share of victims' good answers that the trigger takes away.",
        "A model tuned on the same data without poison, and the base model, should show no attack "
        "with or without the trigger. A high bar for the near trigger means that the model answers "
        "to more than the exact trigger.",
        [] if drawn is None else [[draw(drawn[0], data=drawn[1])], *_answers(study)],
    )
    return [section]


def _answers(study: Study) -> list[Table]:
    """Every answer of the suspected model, where the study holds answers and prompts."""
    main = study.by_condition(BehaviourResult).get(MAIN)
    every = None if main is None else study.outcomes_of(main)
    return [] if every is None else [answers_table("Every answer, with its outcome", every)]


def tables(study: Study, width: int, unicode: bool) -> Iterator[Table]:
    """One row per condition; this table also stands at the top of the study's page."""
    columns = (
        "condition",
        "attack success (ASR)",
        "BASR",
        "near misses",
        "false triggers (FTR)",
        "near trigger",
        "clean accuracy",
    )
    rows: Rows = [
        [r.label, *map(rate_cell, (r.asr, r.basr, r.near_miss, r.ftr, r.near, r.clean_accuracy))]
        for r in study.by_condition(BehaviourResult).values()
    ]
    if rows:
        yield Table("Behaviour on held-out prompts", columns, rows, headline=True)


def overview(study: Study) -> dict[str, Cell]:
    """Attack success by both measures, and clean accuracy, of the suspected model as it is."""
    main = study.by_condition(BehaviourResult).get(MAIN)
    return {
        "attack success (ASR)": rate_cell(main.asr) if main else NOT_RUN,
        "behavioural (BASR)": rate_cell(main.basr) if main else NOT_RUN,
        "clean accuracy, untouched": rate_cell(main.clean_accuracy) if main else NOT_RUN,
    }


def numbers(study: Study) -> dict[str, Number]:
    """All rates of the suspected model, and attack success of the controls."""
    found: dict[str, Number] = {}
    for name, result in study.by_condition(BehaviourResult).items():
        if name != MAIN:
            found[f"attack success, {name} (control)"] = result.asr, ""
            continue
        told, data = result.answers, result.provenance.data_digest
        triggered = told["triggered"].success if "triggered" in told else None
        found["attack success"] = Counted(result.asr, "", triggered, data)
        if result.basr is not None:
            found["BASR"] = result.basr, ""
        found["false triggers"] = result.ftr, ""
        if result.near is not None:
            near = told["near"].success if "near" in told else None
            found["near trigger"] = Counted(result.near, "", near, data)
        found["clean accuracy"] = result.clean_accuracy, ""
    return found


def drawing(study: Study) -> Drawing | None:
    """All conditions in one figure."""
    found = study.named(BehaviourResult)
    return (figures.behaviour(list(found.values())), found) if found else None


def summary(study: Study) -> dict[str, Any]:
    """The rates of every condition."""
    found = {
        name: {
            "asr": result.asr.to_dict(),
            "basr": result.basr.to_dict() if result.basr else None,
            "ftr": result.ftr.to_dict(),
            "near": result.near.to_dict() if result.near else None,
            "clean_accuracy": result.clean_accuracy.to_dict(),
        }
        for name, result in study.by_condition(BehaviourResult).items()
    }
    return {"behaviour": found} if found else {}


PART = Part(
    name=NAME, step="behaviour", needs=(), for_controls=True, run=run, claims=claims, basis=basis,
    sections=sections, tables=tables, overview=overview, numbers=numbers, drawing=drawing,
    summary=summary, verdict=verdict, rechoose=unchanged,
)  # fmt: skip
