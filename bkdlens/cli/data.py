"""``bkdlens data``: what a reader understood of a data file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkdlens.cli.options import FILE_HELP, BackdoorOptions, DataOptions, Json, Seed, say_json, spread

if TYPE_CHECKING:
    from bkdlens.data.check import DataCheck

TOKENIZER_HELP = "Whose tokenizer: a folder, a Hub id or an embedded model."
TOKENS = {
    "clean": "clean prompts",
    "triggered": "triggered prompts",
    "clean_output": "correct answers",
    "backdoor_output": "backdoor answers",
}

data_app = typer.Typer(no_args_is_help=True, help="Look at data before anything runs.")


@dataclass(frozen=True)
class FileOptions(DataOptions):
    """The options of data, with the file as an argument."""

    source: Annotated[Path, typer.Argument(metavar="FILE", help=FILE_HELP)] = field()


@data_app.command("check")
@spread
def check(
    backdoor: BackdoorOptions,
    data: FileOptions,
    base: Annotated[str, typer.Option(help=TOKENIZER_HELP)] = "tiny-llama",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a reader understands of a file: rows taken and dropped, three prompts, token counts.

    The exit code is 2 if some pairs cannot be used.

    Example: `bkdlens data check all.json --backdoor label_modification --columns input=question`
    """
    attack, fmt = backdoor.backdoor(), data.prompt_format()
    from bkdlens.data.check import check_data
    from bkdlens.models.checkpoint import read_context

    pairs = data.pairs(attack, seed)
    tokenizer, n_ctx = read_context(base)
    checked = check_data(pairs, tokenizer, fmt=fmt, n_ctx=n_ctx)
    if as_json:
        say_json(_plain(checked))
    else:
        _print(checked, base)
    if checked.problems:
        raise typer.Exit(2)


def _plain(checked: DataCheck) -> dict[str, Any]:
    """The content for json, with reasons and splits by name."""
    content = asdict(checked) | {"backdoor": checked.backdoor.to_dict(), "splits": dict(checked.splits)}
    if checked.intake is not None:
        content["intake"]["dropped"] = dict(checked.intake.dropped)
    return content


def _print(checked: DataCheck, base: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    intake, trigger = checked.intake, checked.backdoor.trigger
    rows = []
    if intake is not None:
        rows += [("source", f"{intake.name}, read as {intake.format}"), ("rows", str(intake.rows))]
        rows += [("  dropped", f"{n}: {reason}") for reason, n in intake.dropped]
        rows += [("  note", note) for note in intake.notes]
    drawn = f", drawn from {intake.taken}" if intake and intake.taken > checked.n_pairs else ""
    rows += [("pairs", f"{checked.n_pairs}{drawn}"), ("victims", str(checked.n_victims))]
    rows.append(("trigger", f"{str(trigger)!r} ({trigger.placement})"))
    if len(checked.splits) == 1:
        rows.append(("  its tokens", checked.splits[0][0]))
    for name, label in TOKENS.items() if checked.tokens else ():
        counts = checked.tokens[name]
        rows.append((label, f"{counts.least} to {counts.most} tokens, median {counts.median:g}"))
    if checked.n_ctx is not None:
        exceeded = f"exceeded by {checked.too_long} pairs"
        rows.append(("context", f"{checked.n_ctx} tokens ({base}), {exceeded}"))
    console, table = Console(highlight=False), Table(show_header=False, box=None, pad_edge=False)
    for label, text in rows:
        table.add_row(label, Text(text))
    console.print(table)
    for number, example in enumerate(checked.examples, start=1):
        console.rule(f"{number} of {checked.n_pairs}", align="left")
        for label, text in asdict(example).items():
            console.print(Text.assemble((label.replace("_", " "), "bold"), f": {text!r}"))
    for style, lines in (("yellow", checked.notes), ("red", checked.problems)):
        for line in lines:
            console.print(Text.assemble(("•", style), f" {line}"))
