"""A study in a terminal: the report's numbers as rich tables, and heads as a unicode heatmap."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from bkdlens.analyses.parts import PARTS
from bkdlens.display.tables import Cell, Table
from bkdlens.display.text import plain
from bkdlens.study import Study, Thresholds


def render(study: Study, width: int, *, unicode: bool = True) -> Iterator[RenderableType]:
    """The study's parts, those that were run, fitted to ``width`` columns.

    Args:
        study: whole or partial.
        width: of the terminal; a table that is wider becomes a list.
        unicode: False for terminals that have no block characters.
    """
    for part in PARTS:
        for shown in part.tables(study, width, unicode):
            yield fitted(shown, width) if isinstance(shown, Table) else shown


def verdict(study: Study, width: int, thresholds: Thresholds | None = None) -> RenderableType:
    """Per question its answer and number, over control, threshold and what to add.

    Args:
        study: whole or partial.
        width: of the terminal; in a narrow one the number stands below the answer.
        thresholds: how much is enough for a *yes*.
    """
    drawn = RichTable.grid(padding=(0, 2, 0, 0))
    drawn.add_column(max_width=12)
    drawn.add_column(max_width=10)
    drawn.add_column(overflow="fold")
    lines: list[RenderableType] = []
    for one in study.verdict(thresholds):
        told = Text(plain(one.number or "–"), style="bold", overflow="fold")
        control = f"Controls: {one.control}." if one.control else ""
        threshold = f"Threshold: {one.threshold}." if one.threshold else ""
        for line in (control, threshold, one.note):
            told.append(f"\n{plain(line)}" if line else "", "not bold dim")
        drawn.add_row(Text(one.question), Text(one.answer, style="bold"), told)
        lines += [Text(f"{one.question} {one.answer}", style="bold"), told, ""]
    return Group(*lines) if width < 60 else drawn


def fitted(table: Table, width: int) -> RenderableType:
    """A rich table; where that is too wide for the terminal, the rows one after the other."""
    drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD,
                      pad_edge=False, padding=(0, 1))  # fmt: skip
    for i, column in enumerate(table.columns):
        drawn.add_column(Text(plain(column)), no_wrap=i == 0, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(_text(cell) for cell in row))
    console = Console(width=10_000)
    if Measurement.get(console, console.options, drawn).minimum <= width:
        return drawn
    lines = [Text(table.title, style="bold")]
    for row in table.rows:
        lines.append(Text("• " + plain(_one_line(row[0])), style="bold"))
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            lines.append(Text(f"  {plain(column)}: ", style="dim").append(plain(_one_line(cell)), ""))
    return Group(*lines, "")


def _text(cell: Cell | str) -> Text:
    if isinstance(cell, str):
        return Text(plain(cell))
    text = Text(plain(cell.text), style="bold")
    return text.append(f"\n{plain(cell.small)}", "not bold dim") if cell.small else text


def _one_line(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else " ".join(part for part in (cell.text, cell.small) if part)
