"""Progress bars with the time left, on standard error, for whatever takes longer than a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar() -> Progress:
    """A bar that disappears at the end, and shows nothing where there is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def track(items: Sequence[T], what: str, show: bool) -> Iterable[T]:
    """Yield the items, with a progress bar if ``show``."""
    with progress_bar() if show else nullcontext() as bar:
        yield from bar.track(items, description=what) if bar else items
