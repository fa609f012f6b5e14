"""Two studies side by side: their key numbers in one table, and their figures next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import plotly.graph_objects as go

from bkdlens.analyses.parts import PARTS
from bkdlens.display.drawing import Drawer, Figure
from bkdlens.display.tables import NOT_RUN, Cell, Counted, Number, Rows, Table, rate_cell
from bkdlens.display.text import magnitude, plain_json, points
from bkdlens.metrics import difference, mcnemar, paired_difference
from bkdlens.study import Study, Thresholds


@dataclass(frozen=True)
class Comparison:
    """Two studies side by side.

    Attributes:
        names: of both.
        numbers: one row per key number.
        settings: those that differ; None where all agree.
        pairs: rows of two figures, or of one where a study lacks the other.
    """

    names: tuple[str, str]
    numbers: Table
    settings: Table | None
    pairs: list[list[Figure]]


def compare(a: Study, b: Study, draw: Drawer, thresholds: Thresholds | None = None) -> Comparison:
    """Verdicts, key numbers and figures of two studies, and the settings in which they differ."""
    numbers = [_verdicts(study, thresholds) | key_numbers(study) for study in (a, b)]
    rows: Rows = []
    for name in dict.fromkeys(name for found in numbers for name in found):
        left, right = (found.get(name, NOT_RUN) for found in numbers)
        rows.append([name, _shown(left), _shown(right), _change(left, right)])
    table = Table("", ("", a.name, b.name, "second − first, in points"), rows, fit=True)
    return Comparison((a.name, b.name), table, _differing(a, b), list(_figures(a, b, draw)))


def key_numbers(study: Study) -> dict[str, Number]:
    """The numbers of a study that a comparison shows, by what they are; controls beside effects."""
    return {name: number for part in PARTS for name, number in part.numbers(study).items()}


def _verdicts(study: Study, thresholds: Thresholds | None) -> dict[str, Number]:
    return {one.question: Cell(one.answer) for one in study.verdict(thresholds)}


def _shown(number: Number) -> Cell:
    if isinstance(number, Cell):
        return number
    cell = rate_cell(number[0])
    return Cell(cell.text, " · ".join(part for part in (cell.small, number[1]) if part))


def _change(left: Number, right: Number) -> Cell:
    """The difference of two rates: in pairs where both know the outcomes of the same prompts."""
    if isinstance(left, Cell) or isinstance(right, Cell) or not (left[0].n and right[0].n):
        return Cell("")
    if isinstance(left, Counted) and isinstance(right, Counted) and left.data == right.data:
        before, after = left.outcomes, right.outcomes
        if before is not None and after is not None and before.shape == after.shape:
            change, low, high = paired_difference(before, after)
            p = magnitude(mcnemar(before, after))
            p = p if p.startswith("<") else f"= {p}"
            return Cell(points(change), f"{points(low)} to {points(high)} · same prompts, p {p}")
    change, low, high = difference(left[0], right[0])
    return Cell(points(change), f"{points(low)} to {points(high)}")


def _differing(a: Study, b: Study) -> Table | None:
    """Settings, choices and trigger that differ, one row each."""
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
    """A row of figures per analysis that either study has, on one colour scale."""
    for part in PARTS:
        drawn = [(study, found) for study in (a, b) if (found := part.drawing(study)) is not None]
        _share_scale([fig for _, (fig, _) in drawn])
        if drawn:
            yield [draw(fig, 0, f" · {study.name}", data) for study, (fig, data) in drawn]


def _share_scale(figs: list[go.Figure]) -> None:
    """One colour scale, so that the figures of two studies can be compared by eye."""
    scales = [fig.layout.coloraxis for fig in figs if fig.layout.coloraxis.cmax is not None]
    if scales:
        low, high = min(s.cmin for s in scales), max(s.cmax for s in scales)
        for scale in scales:
            scale.update(cmin=low, cmax=high)
