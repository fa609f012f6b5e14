"""Steering in a study: a vector chosen on validation pairs switches the backdoor on and off, or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

from bkdlens.analyses.base import Drawing, Part, Subject
from bkdlens.analyses.steering import figures
from bkdlens.analyses.steering.answers import Generations, sample_generations
from bkdlens.analyses.steering.choice import (
    ANSWERS,
    TEST,
    choose,
    chosen_layer,
    headline_layer,
    rechoose,
)
from bkdlens.analyses.steering.measure import SteeringResult, sweep_layers
from bkdlens.analyses.steering.vector import BackdoorVector
from bkdlens.analyses.steering.verdict import verdict
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
from bkdlens.display.text import (
    coefficient_text,
    interval,
    join_words,
    percent,
    rate_text,
    short_rate,
    spread_text,
)
from bkdlens.paper import VECTOR_SHARE
from bkdlens.study import Study
from bkdlens.types import VectorKind, VectorSite

NAME = "steering"
WAYS = ((1, "added"), (-1, "subtracted"))  # sign of the coefficient, what is done with the vector
DRAWN = {"random heads": "vectors of random heads", "noise": "norm-matched noise"}


def run(subject: Subject) -> None:
    """Choose kind, coefficient and layer on validation; measure them, with controls, on test."""
    run, settings = subject.run, subject.run.settings
    signed = [sign * size for size in settings.coefficients for sign in (1, -1)]

    def make(kind: str) -> BackdoorVector:
        total = subject.model.cfg.n_layers * subject.model.cfg.n_heads
        heads = run.ranking[: settings.vector_heads or max(4, int(total * VECTOR_SHARE))]
        site = cast(VectorSite, settings.vector_site)
        return BackdoorVector.from_cache(subject.cache, heads, kind=cast(VectorKind, kind), site=site)

    def sweep(pairs: PairSet, kind: str, coefficients: Sequence[float], n: int) -> SteeringResult:
        return sweep_layers(
            subject.model,
            pairs,
            vectors[kind],
            cache=subject.cache,
            coefficients=coefficients,
            n_random=n,
            seed=settings.seed,
            keep_controls=settings.keep_controls,
            **run.decoding,
        )

    vectors, swept = {}, {}
    for kind in settings.vector_kinds:
        vectors[kind] = run.step(f"vector-{kind}", partial(make, kind))
        swept[kind] = run.step(f"{NAME}-{kind}", partial(sweep, run.validation, kind, signed, 0))
    choice = choose(swept, settings.coefficients, settings.max_clean_loss)
    kind, layer, size = choice["kind"], choice["layer"], choice["coefficient"]
    run.step(TEST, partial(sweep, run.test, kind, (size, -size), settings.n_random))
    run.choose(**choice)
    only = {name: run.decoding[name] for name in ("fmt", "max_new_tokens")}
    run.step(
        ANSWERS, lambda: sample_generations(subject.model, run.test, vectors[kind], layer, size, **only)
    )


def claims(study: Study) -> list[str]:
    """One sentence per coefficient, on the test pairs at the chosen layer."""
    result = study.get(TEST, SteeringResult)
    if result is None:
        return []
    layer = headline_layer(study, result)
    return [_claim(study, result, layer, coefficient) for coefficient in result.coefficients]


def _claim(study: Study, result: SteeringResult, layer: int, coefficient: float) -> str:
    at: dict[str, Any] = {"coefficient": coefficient, "layer": layer}
    subtracted, where = coefficient < 0, result.site
    if chosen_layer(study, result) is not None:
        where += ", chosen on the validation pairs"
    elif len(result.layers) > 1:
        where += ", the best layer on these same pairs, so the numbers flatter"
    basr, change = result.basr(**at), result.clean_change(**at)
    text = (
        f"{'Subtracted from triggered' if subtracted else 'Added to clean'} prompts at layer {layer} "
        f"({where}) with coefficient {coefficient_text(coefficient)}, the {result.kind} vector "
    )
    if basr is not None:
        text += f"leaves a behavioural attack success (BASR) of {rate_text(basr)} and "
    text += (
        f"takes the attacker's answer from {short_rate(result.base('attack', **at))} to "
        f"{rate_text(result.rate_at('attack', **at))} of victims; a good answer "
        f"{'comes back' if subtracted else 'stays'} in {short_rate(result.rate_at('correct', **at))}, "
        f"against {short_rate(result.base('correct', **at))} without the vector. "
        f"{result.clean_name.capitalize()} under the same vector: "
        f"{short_rate(result.rate_at('clean', **at))}, without it "
        f"{short_rate(result.base('clean', **at))}"
        + (f" ({interval(change)} points, paired)." if change else ".")
    )
    if subtracted and study.choice.get("within") is False:
        most = percent(study.settings.get("max_clean_loss", 0.0))
        text += (
            f" On validation no kind, layer and coefficient kept the loss of {result.clean_name} within "
            f"{most}: this is the best of those that harm least."
        )
    drawn = result.draws("attack", **at)
    if drawn:
        found = result.basr_draws(**at)
        what, controls = ("BASR", found) if basr is not None and found else ("Attack", drawn)
        named = join_words(
            f"{DRAWN[name]} {percent(draws.mean)} ({spread_text(draws)})"
            for name, draws in controls.items()
        )
        text += f" {what} with the controls, mean (least–most): {named}."
        if what == "BASR" and basr is not None:
            as_far = any(draws.low <= basr.value for draws in controls.values())
        else:
            start, sign = result.base("attack", **at).value, -1 if subtracted else 1
            moved = sign * (result.rate_at("attack", **at).value - start)
            ends = [end for draws in controls.values() for end in (draws.low, draws.high)]
            as_far = any(sign * (end - start) >= moved for end in ends)
        if as_far:
            text += " A control draw moves it as far, so this is not specific."
    if layer == 0 and result.site == "resid_pre":
        text += " This is the bare embedding: a change here may destroy the input itself."
    return text


def basis(study: Study) -> Basis:
    """The vector, where and how far it is added, and its controls."""
    result = cast(SteeringResult, study.get(TEST, SteeringResult))
    names = {"random heads": "vectors of random heads", "noise": "norm-matched noise vectors"}
    sizes = join_words(coefficient_text(c) for c in result.coefficients)
    return Basis.of(
        result,
        f"last prompt token, prefill only; {result.kind} vector of "
        f"{join_words(map(str, result.heads), 4)} at {result.site}, coefficients {sizes}",
        f"{result.n_victims} victims, {result.n_clean} clean prompts",
        [f"{drawn['attack'].shape[-1]} {names[name]}" for name, drawn in result.controls.items()],
        ["max_new_tokens", "criteria"],
    )


def sections(study: Study, draw: Drawer) -> list[Section]:
    """The vector itself, the sweeps and the test, and answers side by side."""
    return [_vector(study, draw), _sweeps(study, draw), _answers(study)]


def _vector(study: Study, draw: Drawer) -> Section:
    found = study.named(BackdoorVector)
    return Section(
        "vector",
        "Backdoor vector",
        "The outputs of the top heads on triggered prompts, averaged and summed (kind mean), or the "
        "difference of triggered and clean averages (kind contrast), are one direction in the residual "
        "stream. Its effect, and the controls, are under Steering; this is only where its length lies.",
        parts=[[draw(figures.vector(v), data={name: v}) for name, v in found.items()]] if found else [],
    )


def _sweeps(study: Study, draw: Drawer) -> Section:
    swept = study.named(SteeringResult)
    test = swept.pop(TEST, None)
    parts: list[Any] = []
    if test is not None:
        data = {TEST: test}
        layer, marked = headline_layer(study, test), chosen_layer(study, test)
        if len(test.layers) > 1:
            by_layer = figures.steering_by_layer(test, chosen=marked)
            parts.append([draw(by_layer, on=", test pairs", data=data)])
        parts.append([draw(figures.steering_at(test, layer), 820, ", test pairs", data)])
        parts.append(table(f"On the test pairs, layer {layer}", test, [layer]))
        if len(test.layers) > 1:
            parts.append(table("On the test pairs, all layers", test, test.layers, folded=True))
        every = study.outcomes_of(test)
        if every is not None:
            for coefficient in test.coefficients:
                on = "clean" if coefficient > 0 else "triggered"
                here = (every["layer"] == layer) & (every["coefficient"] == coefficient)
                named = every[here & (every["on"] == on)]
                title = f"Every victim's answer with {coefficient_text(coefficient)}, layer {layer}"
                parts.append(answers_table(title, named))
    if swept:
        drawn = [
            (figures.steering_by_layer(result, panel_height=190), {name: result})
            for name, result in swept.items()
        ]
        parts.append([draw(fig, 480, ", validation pairs", data) for fig, data in drawn])
    for result in swept.values():
        title = f"Sweep of the {result.kind} vector on the validation pairs"
        parts.append(table(title, result, result.layers, folded=True))
    return Section(
        NAME,
        "Steering",
        "The vector is added to clean prompts (does the backdoor switch on?) and subtracted from "
        "triggered ones (does it switch off?), at the last prompt token of the prefill. Its kind, "
        "coefficient and layer are chosen by sweeps on the validation pairs, without random controls: "
        "those that switch most both ways (good answers that come back count, not attacks that end), "
        "among those that keep clean accuracy. Every layer is then measured on the test pairs.",
        "Grey: vectors made of random heads. Purple: random vectors of the same norm. An effect counts "
        "only beyond both and with clean accuracy intact. At layer 0, resid_pre is the bare "
        "embedding: subtraction there destroys the input, also with random vectors.",
        parts,
        [TEST] if test is None and swept else [],
    )


def _answers(study: Study) -> Section:
    result = study.get(ANSWERS, Generations)
    rows = list(zip(*result.columns.values(), strict=True)) if result else []
    return Section(
        ANSWERS,
        "Answers side by side",
        "Greedy answers to the first victims of the test pairs, without and with the vector.",
        parts=[Table("", tuple(result.columns), rows, texts=True)] if result else [],
    )


def tables(study: Study, width: int, unicode: bool) -> Iterator[Table]:
    """One row per coefficient, on the test pairs at the chosen layer."""
    test = study.get(TEST, SteeringResult)
    if test is not None:
        layer = headline_layer(study, test)
        title = f"Steering with the {test.kind} vector on the test pairs, layer {layer}"
        yield table(title, test, [layer])


def table(title: str, result: SteeringResult, layers: Sequence[int], *, folded: bool = False) -> Table:
    """One row per coefficient and layer, with the controls where there are any."""
    rows: Rows = []
    for coefficient in result.coefficients:
        where = f"{'clean' if coefficient > 0 else 'triggered'} prompts"
        for layer in layers:
            at: dict[str, Any] = {"coefficient": coefficient, "layer": layer}
            rates = [
                result.basr(**at),
                result.base("attack", **at),
                result.rate_at("attack", **at),
                result.base("correct", **at),
                result.rate_at("correct", **at),
                result.rate_at("clean", **at),
            ]
            controls = map(draws_cell, result.draws("attack", **at).values())
            named = Cell(coefficient_text(coefficient), where)
            rows.append([named, str(layer), *map(rate_cell, rates), *controls])
    columns = ["coefficient", "layer", "BASR", "ASR before", "ASR", "right before", "right"]
    columns += [result.clean_name, *(name.replace("noise", "random noise") for name in result.controls)]
    drawn = join_words(str(counted["attack"].shape[-1]) for counted in result.controls.values())
    note = f" (controls: ASR, mean and least–most of {drawn} draws)" if drawn else ""
    return Table(title + note, columns, rows, folded=folded)


def overview(study: Study) -> dict[str, Cell]:
    """Attack success and clean accuracy on the test pairs under the chosen vector, both ways."""
    test = study.get(TEST, SteeringResult)
    return {f"attack, vector {way}": _reached(study, test, sign) for sign, way in WAYS}


def _reached(study: Study, test: SteeringResult | None, sign: int) -> Cell:
    coefficient = next((c for c in test.coefficients if c * sign > 0), None) if test else None
    if test is None or coefficient is None:
        return NOT_RUN
    at: dict[str, Any] = {"coefficient": coefficient, "layer": headline_layer(study, test)}
    cell, basr = rate_cell(test.rate_at("attack", **at)), test.basr(**at)
    told = [
        cell.small,
        *([f"BASR {short_rate(basr)}"] if basr is not None else []),
        f"{test.clean_name} under it {short_rate(test.rate_at('clean', **at))}",
        f"{coefficient_text(coefficient)}, layer {at['layer']}",
    ]
    return Cell(cell.text, " · ".join(told))


def numbers(study: Study) -> dict[str, Number]:
    """Attack and clean accuracy under the chosen vector, both ways, with the controls."""
    found: dict[str, Number] = {}
    test = study.get(TEST, SteeringResult)
    if test is None:
        return found
    layer = headline_layer(study, test)
    for sign, way in WAYS:
        coefficient = next((c for c in test.coefficients if c * sign > 0), None)
        if coefficient is None:
            continue
        at: dict[str, Any] = {"coefficient": coefficient, "layer": layer}
        note = f"{test.kind} {coefficient_text(coefficient)}, layer {layer}"
        if (basr := test.basr(**at)) is not None:
            found[f"BASR, vector {way}"] = basr, note
        for what, name, told in (("attack", "attack", note), ("clean", test.clean_name, "")):
            of, data = test.outcomes_at(what, **at), test.provenance.data_digest
            found[f"{name}, vector {way}"] = Counted(test.rate_at(what, **at), told, of, data)
        for name, draws in test.draws("attack", **at).items():
            spread = f"{spread_text(draws)} · {len(draws)} draws"
            name = name.replace("noise", "random noise")
            found[f"attack, {name} {way} (control)"] = Cell(percent(draws.mean), spread)
    return found


def drawing(study: Study) -> Drawing | None:
    """The test by layer, or at its one layer."""
    test = study.get(TEST, SteeringResult)
    if test is None:
        return None
    if len(test.layers) == 1:
        return figures.steering_at(test), {TEST: test}
    layer = headline_layer(study, test)
    return figures.steering_by_layer(test, chosen=layer, panel_height=380), {TEST: test}


def summary(study: Study) -> dict[str, Any]:
    """The rows of the test at the chosen layer; None where no layer was chosen."""
    test, layer = study.get(TEST, SteeringResult), study.choice.get("layer")
    if test is None:
        return {}
    frame = test.to_frame()
    rows = None if layer is None else frame[frame.layer == layer].to_dict("records")
    return {"steering": rows}


PART = Part(
    name=NAME, step="steer", needs=("attribution",), for_controls=False, run=run, claims=claims,
    basis=basis, sections=sections, tables=tables, overview=overview, numbers=numbers, drawing=drawing,
    summary=summary, verdict=verdict, rechoose=rechoose,
)  # fmt: skip
