"""A study in a terminal: the report's numbers as rich tables, and heads as a unicode heatmap."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.text import percent, signed
from bkdlens.report.overview import (
    Cell,
    Rows,
    Table,
    ablation_table,
    head_table,
    headline_table,
    layer_table,
    rate_cell,
    steering_table,
)
from bkdlens.report.selection import (
    MAIN,
    best_probe_layer,
    by_condition,
    probes_by_kind,
    steering_layer,
)
from bkdlens.study import Study

# From none to all of the largest effect; a negative one has its sign before it, so colour is not needed.
SHADES, PLAIN_SHADES = " ░▒▓█", " .:*#"
STEPS = (0.05, 0.25, 0.5, 0.75)  # of the largest |ACIE|
POSITIVE, NEGATIVE = "dark_orange3", "dodger_blue2"
TOP = 8


def render(study: Study, width: int, *, unicode: bool = True) -> Iterator[RenderableType]:
    """The study's parts, those that were run, fitted to ``width`` columns.

    Args:
        study: whole or partial.
        width: of the terminal; a table that is wider becomes a list.
        unicode: False for terminals that have no block characters.
    """
    for title, table in _tables(study):
        if title == "Heads":
            found = by_condition(study, "attribution-", HeadAttribution)
            yield heatmap(found[MAIN], width, unicode=unicode)
            title = f"Top {TOP} heads, with 95 % interval"
        yield fitted(table, title, width)


def heatmap(attribution: HeadAttribution, width: int, *, unicode: bool = True) -> Group:
    """ACIE by layer (down from the last) and head, two columns a head; wide ones are cut into blocks.

    A cell is a sign and a shade: the shade is the share of the largest |ACIE|, ``−`` marks negative
    effects and ``≈`` estimates.
    """
    acie = attribution.acie
    n_layers, n_heads = acie.shape
    limit = float(acie.abs().max()) or 1.0
    shades, minus, about = (SHADES, "−", "≈") if unicode else (PLAIN_SHADES, "-", "~")
    margin = len(str(n_layers - 1)) + 2
    fit = max(1, (width - margin - len("  head")) // 2)
    blocks: list[RenderableType] = [
        Text(f"ACIE by layer and head, {plain(attribution.label)}", style="bold")
    ]
    for start in range(0, n_heads, fit):
        heads = range(start, min(start + fit, n_heads))
        for layer in reversed(range(n_layers)):
            line = Text(f"{layer:>{margin - 2}} ", no_wrap=True)
            for head in heads:
                value = float(acie[layer, head])
                level = sum(abs(value) >= step * limit for step in STEPS)
                sign = minus if value < 0 and level else " "
                if level and not bool(attribution.exact[layer, head]):
                    sign = about
                line.append(sign + shades[level], POSITIVE if value > 0 else NEGATIVE)
            blocks.append(line)
        marks = "".join(f"{head:>2}" if head % 2 == 0 or n_heads <= 10 else "  " for head in heads)
        blocks.append(Text(" " * (margin - 1) + marks + "  head", style="dim", no_wrap=True))
    key = "  ".join(f"{shades[i + 1]} ≥ {signed(step * limit, 3)[1:]}" for i, step in enumerate(STEPS))
    estimated = "" if bool(attribution.exact.all()) else f"  {about} estimated"
    text = f"{key}  {minus} negative{estimated}"
    blocks.append(Text(text if unicode else text.replace("≥", ">="), style="dim"))
    return Group(*blocks, "")


def fitted(table: Table, title: str, width: int) -> RenderableType:
    """A rich table; where that is too wide for the terminal, the rows one after the other."""
    drawn = RichTable(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD,
                      pad_edge=False, padding=(0, 1))  # fmt: skip
    for i, column in enumerate(table.columns):
        drawn.add_column(Text(plain(column)), no_wrap=i == 0, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(_text(cell) for cell in row))
    console = Console(width=10_000)
    if Measurement.get(console, console.options, drawn).minimum <= width:
        return drawn
    lines = [Text(title, style="bold")]
    for row in table.rows:
        lines.append(Text("• " + plain(_one_line(row[0])), style="bold"))
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            lines.append(Text(f"  {plain(column)}: ", style="dim").append(plain(_one_line(cell)), ""))
    return Group(*lines, "")


def plain(text: str) -> str:
    """Text of models and files without what a terminal would obey: escapes are shown, not sent."""
    return "".join(c if c.isprintable() or c == "\u00a0" else repr(c)[1:-1] for c in text)


def _tables(study: Study) -> Iterator[tuple[str, Table]]:
    """Title and table of every part that was run."""
    headline = headline_table(study)
    if headline is not None:
        yield "Behaviour on held-out prompts", headline
    groups = probes_by_kind(study)
    if groups:
        yield "Probes, at the layer that is best on the validation prompts", _probe_rows(groups)
    found = by_condition(study, "attribution-", HeadAttribution)
    if MAIN in found:
        main = found.pop(MAIN)
        heads = head_table(main, list(found.values()), TOP)
        yield "Heads", heads
        layers = layer_table(main)
        if layers is not None:
            yield layers.title, layers
    ablation = study.results.get("ablation")
    if isinstance(ablation, AblationResult):
        table = ablation_table(ablation)
        yield table.title, table
    test = study.results.get("steering-test")
    if isinstance(test, SteeringResult):
        layer = steering_layer(study, test)
        title = f"Steering with the {test.kind} vector on the test pairs, layer {layer}"
        table = steering_table(title, test, [layer], folded=False)
        yield table.title, table


def _probe_rows(groups: dict[tuple[str, str], dict[str, ProbeResult]]) -> Table:
    rows: Rows = []
    for (kind, against), found in groups.items():
        for name, probe in found.items():
            layer = best_probe_layer(probe)
            rate, apart = rate_cell(probe.rate(layer)), f"{float(probe.separation.max()):.2f}"
            few = percent(probe.few_shot.max())
            rows.append([name, kind.upper(), against, str(layer), rate, few, apart])
    columns = (
        "condition",
        "probe",
        "against",
        "layer",
        "accuracy",
        "few-shot, best",
        "separation, best",
    )
    return Table("", columns, rows)


def _text(cell: Cell | str) -> Text:
    if isinstance(cell, str):
        return Text(plain(cell))
    text = Text(plain(cell.text), style="bold")
    return text.append(f"\n{plain(cell.small)}", "not bold dim") if cell.small else text


def _one_line(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else " ".join(part for part in (cell.text, cell.small) if part)
