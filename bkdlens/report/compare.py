"""Two studies side by side: their key numbers in one table, and their figures next to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import plotly.graph_objects as go

from bkdlens import plot
from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.claims import layer_shares
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.drawing import Drawer, Figure
from bkdlens.display.text import coefficient_text, percent, plain_json, points, signed, spread_text
from bkdlens.metrics import Rate, difference
from bkdlens.report.overview import Cell, Rows, Table, rate_cell
from bkdlens.report.selection import (
    MAIN,
    TOP_SHARE,
    best_probe_layer,
    by_condition,
    fewest_heads,
    probes_by_kind,
    steering_layer,
)
from bkdlens.results import Result
from bkdlens.study import Study

# A number of one study: a rate and a note to it, or a text alone.
Number: TypeAlias = tuple[Rate, str] | Cell
NOT_RUN = Cell("not run")


@dataclass(frozen=True)
class Comparison:
    """Two studies side by side; ``pairs`` are rows of two figures (or one, where a study lacks it)."""

    names: tuple[str, str]
    numbers: Table
    settings: Table | None  # those that differ
    pairs: list[list[Figure]]


def compare(a: Study, b: Study, draw: Drawer) -> Comparison:
    """The key numbers and figures of two studies, and the settings in which they differ."""
    numbers = [key_numbers(study) for study in (a, b)]
    rows: Rows = []
    for name in dict.fromkeys(name for found in numbers for name in found):
        left, right = (found.get(name, NOT_RUN) for found in numbers)
        rows.append([name, _shown(left), _shown(right), _change(left, right)])
    table = Table("", ("", a.name, b.name, "second − first, in points"), rows, fit=True)
    return Comparison((a.name, b.name), table, _differing(a, b), list(_figures(a, b, draw)))


def key_numbers(study: Study) -> dict[str, Number]:
    """The numbers of a study that a comparison shows, by what they are; controls beside effects."""
    found: dict[str, Number] = {}
    for name, behaviour in by_condition(study, "behaviour-", BehaviourResult).items():
        if name == MAIN:
            found["attack success"] = behaviour.asr, ""
            found["false triggers"] = behaviour.ftr, ""
            if behaviour.near is not None:
                found["near trigger"] = behaviour.near, ""
            found["clean accuracy"] = behaviour.clean_accuracy, ""
        else:
            found[f"attack success, {name} (control)"] = behaviour.asr, ""
    groups = probes_by_kind(study)
    kinds = {kind for kind, _ in groups}
    for (kind, against), probes in groups.items():
        if kind != "svm" and "svm" in kinds:
            continue  # one kind is enough here; all are in each study's own part
        for name, probe in probes.items():
            layer = best_probe_layer(probe)
            control = "" if name == MAIN else f", {name} (control)"
            title = f"{kind.upper()} probe against {against}{control}"
            found[title] = probe.rate(layer), f"layer {layer}"
    attribution = by_condition(study, "attribution-", HeadAttribution)
    if MAIN in attribution:
        found |= _head_numbers(attribution.pop(MAIN))
    for name, other in attribution.items():
        found[f"largest |ACIE|, {name} (control)"] = Cell(f"{float(other.acie.abs().max()):.2g}")
    ablation, test = study.results.get("ablation"), study.results.get("steering-test")
    if isinstance(ablation, AblationResult):
        found |= _ablation_numbers(ablation)
    if isinstance(test, SteeringResult):
        found |= _steering_numbers(study, test)
    return found


def _head_numbers(main: HeadAttribution) -> dict[str, Number]:
    top, n = main.top(1)[0], main.acie.numel()
    few, shares = max(1, round(TOP_SHARE * n)), layer_shares(main)
    interval = f"{signed(main.low[top])} to {signed(main.high[top])} · {main.cie.shape[0]} pairs"
    found: dict[str, Number] = {
        "strongest head, ACIE": Cell(f"{top} {signed(main.acie[top])}", interval),
        "top 3 % of heads carry": Cell(percent(main.concentration[few - 1]), f"{few} of {n} heads"),
    }
    if shares is not None:
        text = f"{percent(shares[0])} / {percent(shares[1])}"
        found["whole outputs: attention / MLP share"] = Cell(text)
    return found


def _ablation_numbers(result: AblationResult) -> dict[str, Number]:
    found: dict[str, Number] = {}
    for mode in result.modes:
        fewest = fewest_heads(result, mode)
        found[f"heads to halve the attack, {mode}"] = Cell(str(fewest or "none of those tried"))
        for count in [c for c in result.counts if c][:3]:
            m, k = result.modes.index(mode), result.counts.index(count)
            draws, heads = result.random_attack[m, k], f"{count} head{'s' if count > 1 else ''}"
            note = f"random {spread_text(draws, result.n_triggered)}" if draws.numel() else ""
            found[f"attack, {heads} by {mode}"] = result.rate("attack", mode, count), note
            found[f"clean accuracy, {heads} by {mode}"] = result.rate("clean", mode, count), ""
    return found


def _steering_numbers(study: Study, test: SteeringResult) -> dict[str, Number]:
    found: dict[str, Number] = {}
    layer = steering_layer(study, test)
    i = test.layers.index(layer)
    for sign, what in ((1, "added"), (-1, "subtracted")):
        c = next((c for c in test.coefficients if c * sign > 0), None)
        if c is None:
            continue
        note = f"{test.kind} {coefficient_text(c)}, layer {layer}"
        found[f"attack, vector {what}"] = test.rate("attack", layer, c), note
        found[f"clean accuracy, vector {what}"] = test.rate("clean", layer, c), ""
        for name, draws in (("heads", test.random_heads), ("noise", test.random_vectors)):
            if draws.shape[-1]:
                drawn = draws[test.coefficients.index(c), i]
                mean = percent(drawn.double().mean() / max(1, test.n_victims))
                spread = f"{spread_text(drawn, max(1, test.n_victims))} · {drawn.numel()} draws"
                found[f"attack, random {name} {what} (control)"] = Cell(mean, spread)
    return found


def _shown(number: Number) -> Cell:
    if isinstance(number, Cell):
        return number
    cell = rate_cell(number[0])
    return Cell(cell.text, " · ".join(part for part in (cell.small, number[1]) if part))


def _change(left: Number, right: Number) -> Cell:
    if isinstance(left, Cell) or isinstance(right, Cell) or not (left[0].n and right[0].n):
        return Cell("")
    change, low, high = difference(left[0], right[0])
    return Cell(points(change), f"{points(low)} to {points(high)}")


def _differing(a: Study, b: Study) -> Table | None:
    """Settings, choices and trigger that are not the same, as a row each."""
    sides = [_flat({"backdoor": s.backdoor.to_dict(), **s.settings, "chosen": s.choice}) for s in (a, b)]
    rows = [
        [name, *(side.get(name, "–") for side in sides)]
        for name in dict.fromkeys(name for side in sides for name in side)
        if sides[0].get(name) != sides[1].get(name)
    ]
    columns = ("", a.name, b.name)
    return Table("Where their settings differ", columns, rows, folded=True, fit=True) if rows else None


def _flat(settings: dict[str, object]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}: {inner}": plain_json(v) for inner, v in value.items()}
        else:
            flat[name] = plain_json(value)
    return flat


def _figures(a: Study, b: Study, draw: Drawer) -> Iterator[list[Figure]]:
    """Rows of figures, the same analysis of both; heads are on one colour scale."""
    makers: tuple[Callable[[Study], tuple[go.Figure, dict[str, Result]] | None], ...] = (
        _draw_behaviour, _draw_probes, _draw_heads, _draw_ablation, _draw_steering,
    )  # fmt: skip
    for make in makers:
        made = [(study, found) for study in (a, b) if (found := make(study)) is not None]
        if make is _draw_heads:
            limit = max((fig.layout.coloraxis.cmax for _, (fig, _) in made), default=0)
            for _, (fig, _) in made:
                fig.update_layout(coloraxis={"cmin": -limit, "cmax": limit})
        if made:
            yield [draw(fig, 0, f" · {study.name}", data) for study, (fig, data) in made]


def _draw_behaviour(study: Study) -> tuple[go.Figure, dict[str, Result]] | None:
    found = by_condition(study, "behaviour-", BehaviourResult)
    data: dict[str, Result] = {f"behaviour-{name}": r for name, r in found.items()}
    return (plot.behaviour(list(found.values())), data) if found else None


def _draw_probes(study: Study) -> tuple[go.Figure, dict[str, Result]] | None:
    groups = probes_by_kind(study)
    if not groups:
        return None
    (kind, against), found = next(
        (item for item in groups.items() if item[0] == ("svm", "clean")), next(iter(groups.items()))
    )
    data: dict[str, Result] = {f"probe-{name}-{kind}-{against}": p for name, p in found.items()}
    probes: list[ProbeResult] = list(found.values())
    return plot.layer_accuracy(probes), data


def _draw_heads(study: Study) -> tuple[go.Figure, dict[str, Result]] | None:
    main = by_condition(study, "attribution-", HeadAttribution).get(MAIN)
    return (plot.acie_heatmap(main), {f"attribution-{MAIN}": main}) if main is not None else None


def _draw_ablation(study: Study) -> tuple[go.Figure, dict[str, Result]] | None:
    result = study.results.get("ablation")
    if not isinstance(result, AblationResult):
        return None
    mode = "mean" if "mean" in result.modes else result.modes[0]
    m = [result.modes.index(mode)]
    names = ("attack", "restored", "clean")
    shown = {n: getattr(result, n)[m] for n in (*names, *(f"random_{name}" for name in names))}
    one = replace(result, modes=(mode,), **shown)
    return plot.ablation_curve(one), {"ablation": result}


def _draw_steering(study: Study) -> tuple[go.Figure, dict[str, Result]] | None:
    test = study.results.get("steering-test")
    if not isinstance(test, SteeringResult):
        return None
    if len(test.layers) > 1:
        layer = steering_layer(study, test)
        return plot.steering_by_layer(test, chosen=layer, panel_height=380), {"steering-test": test}
    return plot.steering_at(test), {"steering-test": test}
