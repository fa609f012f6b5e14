"""``bkdlens show``: a run folder's results in the terminal, for people on a cluster."""

from __future__ import annotations

import codecs
import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bkdlens.cli.options import Json

SPELLED = {"\u00a0": " ", "–": "-", "−": "-", "·": "|", "•": "*", "≈": "~", "…": "..."}


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """For terminals without unicode."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end


def show(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    as_json: Json = False,
) -> None:
    """The results of run folders as tables and a heatmap of heads; narrow and colourless terminals too.

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
        typer.echo(json.dumps([summary(study) for study in studies], indent=1))
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
