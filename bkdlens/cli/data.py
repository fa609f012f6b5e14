"""``bkdlens data``: how data is read in the shell, and what a reader understood of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkdlens.cli.options import (
    FILE_HELP,
    MODEL,
    CleanData,
    Columns,
    Format,
    Json,
    Kind,
    Labels,
    Limit,
    Near,
    Raw,
    Seed,
    Split,
    System,
    Target,
    Template,
    TriggerAfter,
    TriggerText,
    Victims,
)
from bkdlens.cli.options import Place as Placement
from bkdlens.errors import BkdlensError

if TYPE_CHECKING:
    from bkdlens.data.backdoor import Backdoor
    from bkdlens.data.check import DataCheck
    from bkdlens.data.pairs import PairSet

data_app = typer.Typer(no_args_is_help=True, help="Look at data before anything runs.")


def read_data(
    source: Path | str,
    backdoor: Backdoor,
    clean: Path | None,
    limit: int | None,
    seed: int,
    *,
    columns: list[str] | None,
    format: str | None,
    template: str | None,
    labels: str | None,
    split: str | None,
) -> PairSet:
    """``read_pairs`` with the shell's spelling of its options."""
    from bkdlens.data.reading import read_pairs

    named = {}
    for item in (part for given in columns or () for part in given.split(",")):
        ours, equals, theirs = item.partition("=")
        if not (ours.strip() and equals and theirs.strip()):
            raise BkdlensError(f"--columns {item!r} must be FIELD=COLUMN, as in input=question.")
        named[ours.strip()] = theirs.strip()
    return read_pairs(
        source,
        backdoor,
        clean=clean,
        format=format,
        columns=named,
        template=template.replace("\\n", "\n") if template is not None else None,
        labels=[label.strip() for label in labels.split(",")] if labels is not None else None,
        split=split,
        limit=limit,
        seed=seed,
    )


@data_app.command("check")
def check(
    source: Annotated[str, typer.Argument(metavar="FILE", help=FILE_HELP)],
    kind: Kind,
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="Whose tokenizer: a folder, a Hub id, an embedded model.",
            rich_help_panel=MODEL,
        ),
    ] = "tiny-llama",
    clean_data: CleanData = None,
    columns: Columns = None,
    data_format: Format = None,
    template: Template = None,
    labels: Labels = None,
    split: Split = None,
    limit: Limit = None,
    raw: Raw = False,
    system: System = None,
    trigger: TriggerText = None,
    trigger_after: TriggerAfter = None,
    placement: Placement = None,
    target: Target = None,
    victims: Victims = None,
    near: Near = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a reader understands of a file: rows taken and dropped, three prompts, token counts.

    The exit code is 2 if some pairs cannot be used.

    Example: `bkdlens data check all.json --backdoor label_modification --columns input=question`
    """
    from bkdlens.cli.app import _backdoor, _format

    attack = _backdoor(kind, trigger, trigger_after, placement, target, victims, near)
    fmt = _format(raw, system)
    from bkdlens.data.check import check_data
    from bkdlens.models.checkpoint import read_context

    pairs = read_data(
        source, attack, clean_data, limit, seed, columns=columns, format=data_format, template=template,
        labels=labels, split=split,
    )  # fmt: skip
    tokenizer, n_ctx = read_context(base)
    found = check_data(pairs, tokenizer, fmt=fmt, n_ctx=n_ctx)
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=1))
    else:
        _print(found, base)
    if found.problems:
        raise typer.Exit(2)


def _plain(found: DataCheck) -> dict[str, Any]:
    """For json: reasons and splits by name."""
    content = asdict(found) | {"backdoor": found.backdoor.to_dict(), "splits": dict(found.splits)}
    if found.intake is not None:
        content["intake"]["dropped"] = dict(found.intake.dropped)
    return content


def _print(found: DataCheck, base: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    intake, backdoor = found.intake, found.backdoor
    if intake is not None:
        table.add_row("source", escape(f"{intake.name}, read as {intake.format}"))
        table.add_row("rows", f"{intake.rows}")
        for reason, n in intake.dropped:
            table.add_row("  dropped", escape(f"{n}: {reason}"))
        for note in intake.notes:
            table.add_row("  note", escape(note))
    drawn = f", drawn from {intake.taken}" if intake and intake.taken > found.n_pairs else ""
    table.add_row("pairs", f"{found.n_pairs}{drawn}")
    table.add_row("victims", f"{found.n_victims}")
    table.add_row("trigger", escape(f"{str(backdoor.trigger)!r} ({backdoor.trigger.placement})"))
    if len(found.splits) == 1:
        table.add_row("  its tokens", escape(found.splits[0][0]))
    for name, what in (
        ("clean", "clean prompts"),
        ("triggered", "triggered prompts"),
        ("clean_output", "right answers"),
        ("backdoor_output", "backdoor answers"),
    ):
        if found.tokens:
            it = found.tokens[name]
            table.add_row(what, f"{it.least} to {it.most} tokens, median {it.median:g}")
    if found.n_ctx is not None:
        context = f"{found.n_ctx} tokens ({base}), exceeded by {found.too_long} pairs"
        table.add_row("context", escape(context))
    console.print(table)
    for number, example in enumerate(found.examples, start=1):
        console.rule(f"{number} of {found.n_pairs}", align="left")
        for label, text in asdict(example).items():
            named = f"[bold]{label.replace('_', ' ')}[/bold]: {escape(repr(text))}"
            console.print(named, highlight=False)
    for style, lines in (("yellow", found.notes), ("red", found.problems)):
        for line in lines:
            console.print(f"[{style}]•[/{style}] {escape(line)}", highlight=False)
