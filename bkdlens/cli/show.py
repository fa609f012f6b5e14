"""``bkdlens show`` and ``bkdlens report``: run folders in the terminal and on a page."""

from __future__ import annotations

import codecs
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bkdlens.cli.options import Json, say, say_json

if TYPE_CHECKING:
    from bkdlens.study import Study

SPELLED = {"\u00a0": " ", "–": "-", "−": "-", "·": "|", "•": "*", "≈": "~", "…": "..."}


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """ASCII for what a terminal without unicode cannot show, and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end


def finish(studies: list[Study], page: Path, as_json: bool) -> None:
    """Write the report, and print what the studies found."""
    from bkdlens.report.page import write_report
    from bkdlens.runs.reading import summary

    write_report(studies, page)
    if as_json:
        say_json([summary(study) for study in studies])
        return
    from rich.console import Console
    from rich.markup import escape

    from bkdlens.report.claims import claims

    console = Console()
    for study in studies:
        console.rule(escape(study.name))
        for sentence in claims(study):
            console.print("•", escape(sentence), highlight=False)
    say(f"Report: {page}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The html file.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one offline html file about one or several run folders; two are laid side by side.

    Example: `bkdlens report runs/x demo/tiny-llama/jailbreak --out both.html`
    """
    from bkdlens.runs.reading import load_study

    finish([load_study(folder) for folder in runs], out, as_json)


def show(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    as_json: Json = False,
) -> None:
    """Print results of run folders as tables and a heatmap of heads, in any terminal.

    Example: `bkdlens show demo/tiny-llama/jailbreak`
    """
    from rich.console import Console
    from rich.text import Text

    from bkdlens.display.text import plain
    from bkdlens.report.claims import claims
    from bkdlens.report.terminal import render
    from bkdlens.runs.reading import load_study, summary

    studies = [load_study(folder) for folder in runs]
    if as_json:
        say_json([summary(study) for study in studies])
        return
    console = Console(highlight=False)
    unicode = (console.encoding or "").lower().startswith("utf")
    if not unicode and isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("bkdlens", _spelled)
        sys.stdout.reconfigure(errors="bkdlens")
    for study in studies:
        console.rule(Text(plain(study.name)), characters="─" if unicode else "-")
        console.print(Text(plain(f"{study.backdoor.behaviour}, trigger {study.backdoor.trigger}")), "")
        for part in render(study, console.width, unicode=unicode):
            console.print(part)
        for sentence in claims(study):
            console.print(Text(f"{'•' if unicode else '*'} {plain(sentence)}"))
        if not study.results:
            console.print("This run holds no results yet.")
