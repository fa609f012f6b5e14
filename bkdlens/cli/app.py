"""The shell: every command is registered here, and errors become one sentence."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bkdlens.cli.analyse import ANALYSES, analysis, demo
from bkdlens.cli.data import data_app
from bkdlens.cli.inject import inject
from bkdlens.cli.rescore import rescore
from bkdlens.cli.show import report, show
from bkdlens.cli.zoo import zoo_app
from bkdlens.errors import BkdlensError

app = typer.Typer(
    name="bkdlens",
    help="See, locate and switch backdoors in language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name in ANALYSES:
    app.command(_name)(analysis(_name))
for _command in (demo, report, show, rescore, inject):
    app.command()(_command)
app.add_typer(data_app, name="data")
app.add_typer(zoo_app, name="zoo")


def main() -> None:
    """Run the shell; an error that the caller can fix is one sentence and exit code 2."""
    try:
        app()
    except BkdlensError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


def _version(show: bool | None) -> None:
    if show:
        from bkdlens import __version__

        typer.echo(f"bkdlens {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass
