"""Progress bars with the time left, on standard error, for whatever takes longer than a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def track(items: Sequence[T], what: str, show: bool) -> Iterable[T]:
    """The items; with a bar that goes away at the end when ``show`` and there is a terminal."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, description=what)
