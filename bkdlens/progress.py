"""Progress bars with the time left, on standard error, for whatever takes longer than a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar() -> Progress:
    """A bar that goes away at the end, and shows nothing where there is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def track(items: Sequence[T], what: str, show: bool) -> Iterable[T]:
    """Yield the items, with a progress bar when ``show``."""
    if not show:
        yield from items
        return
    with progress_bar() as bar:
        yield from bar.track(items, description=what)
