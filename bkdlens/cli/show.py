"""``bkdlens show`` and ``bkdlens report``: run folders in the terminal and on a page."""

from __future__ import annotations

import codecs
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from bkdlens.cli.options import Json, say, say_json

if TYPE_CHECKING:
    from rich.console import Console

    from bkdlens.study import Study, Thresholds

THRESHOLD_HELP = (
    "Enough for a yes in the verdict, as in seen=0.95: attack, seen, located, necessary, switched_off, "
    "switched_on or clean_loss; repeatable."
)
Threshold = Annotated[list[str] | None, Option(metavar="NAME=VALUE", help=THRESHOLD_HELP)]

SPELLED = {"\u00a0": " ", "–": "-", "−": "-", "·": "|", "•": "*", "≈": "~", "…": "..."}


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """ASCII for what a terminal without unicode cannot show, and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end


def limits(given: list[str] | None) -> Thresholds:
    """The thresholds that ``--threshold`` names."""
    from bkdlens.study import Thresholds

    return Thresholds.of(given or ())


def _console() -> tuple[Console, bool]:
    """Standard output, and whether it shows unicode; what it cannot show is spelled."""
    from rich.console import Console

    console = Console(highlight=False)
    unicode = (console.encoding or "").lower().startswith("utf")
    if not unicode and isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("bkdlens", _spelled)
        sys.stdout.reconfigure(errors="bkdlens")
    return console, unicode


def _head(console: Console, study: Study, thresholds: Thresholds, unicode: bool) -> None:
    """Name, criterion and verdict of a study."""
    from rich.text import Text

    from bkdlens.display.text import plain
    from bkdlens.report.terminal import verdict

    backdoor = study.backdoor
    console.rule(Text(plain(study.name)), characters="─" if unicode else "-")
    console.print(Text(plain(f"{backdoor.behaviour}, trigger {backdoor.trigger}")))
    console.print(Text(plain(backdoor.criteria)), "")
    console.print(verdict(study, console.width, thresholds), "")


def finish(studies: list[Study], page: Path, as_json: bool, thresholds: Thresholds) -> None:
    """Write the report, and print the verdict on each study."""
    from bkdlens.report.page import write_report
    from bkdlens.runs.reading import summary

    write_report(studies, page, thresholds=thresholds)
    if as_json:
        say_json([summary(study, thresholds) for study in studies])
        return
    console, unicode = _console()
    for study in studies:
        _head(console, study, thresholds, unicode)
    say(f"Report: {page}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The html file.")] = Path("report.html"),
    threshold: Threshold = None,
    as_json: Json = False,
) -> None:
    """Write one offline html file about one or several run folders; two are laid side by side.

    Example: `bkdlens report runs/x demo/tiny-llama/jailbreak --out both.html`
    """
    from bkdlens.runs.reading import load_study

    thresholds = limits(threshold)
    finish([load_study(folder) for folder in runs], out, as_json, thresholds)


def show(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    claims: Annotated[bool, Option("--claims", help="Print every claim as a sentence, too.")] = False,
    threshold: Threshold = None,
    as_json: Json = False,
) -> None:
    """Print run folders in any terminal: the verdict, then tables and a heatmap of heads.

    Example: `bkdlens show demo/tiny-llama/jailbreak --threshold seen=0.95`
    """
    from rich.text import Text

    from bkdlens.display.text import plain
    from bkdlens.report.claims import claims as claims_of
    from bkdlens.report.terminal import render
    from bkdlens.runs.reading import load_study, summary

    thresholds = limits(threshold)
    studies = [load_study(folder) for folder in runs]
    if as_json:
        say_json([summary(study, thresholds) for study in studies])
        return
    console, unicode = _console()
    for study in studies:
        _head(console, study, thresholds, unicode)
        for part in render(study, console.width, unicode=unicode):
            console.print(part)
        for sentence in claims_of(study) if claims else ():
            console.print(Text(f"{'•' if unicode else '*'} {plain(sentence)}"))
        if not study.results:
            console.print("This run holds no results yet.")
