"""The numbers behind the report's figures as csv texts, each held once per page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from bkdlens.results import Result


@dataclass(frozen=True)
class DataLink:
    """A link to one csv text of the page: the file's ``name``, and the ``id`` of the element with it."""

    name: str
    id: str


class DataStore:
    """The csv texts of one study; equal ones are held once."""

    def __init__(self, anchor: str) -> None:
        self.anchor = anchor
        self.texts: dict[tuple[str, str], str] = {}  # (file name, text) to id

    def add(self, results: Mapping[str, Result]) -> tuple[DataLink, ...]:
        """Links to what is behind a figure of these results (by their names in the run folder)."""
        tables: dict[str, list[pd.DataFrame]] = {}
        for name, result in results.items():
            for ending, frame in result.frames().items():
                frame.insert(0, "result", name)
                tables.setdefault(ending, []).append(frame)
        # A file is named by the words that the names of all results have in the same place.
        words = zip(*(name.split("-") for name in results), strict=False)
        stem = "-".join(at[0] for at in words if len(set(at)) == 1) or "results"
        return tuple(self._hold(f"{stem}{e}.csv", frames) for e, frames in tables.items())

    def _hold(self, name: str, frames: list[pd.DataFrame]) -> DataLink:
        whole = pd.concat(frames, ignore_index=True)
        text = whole.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        key = (f"{self.anchor}-{name}", text)
        return DataLink(name, self.texts.setdefault(key, f"{self.anchor}-csv{len(self.texts) + 1}"))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Pairs of id and text."""
        return ((element, text) for (_, text), element in self.texts.items())
