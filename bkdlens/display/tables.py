"""What a study is shown with: cells, tables, sections, and what claims rest on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
from torch import Tensor

from bkdlens.counts import Draws
from bkdlens.display.drawing import Figure
from bkdlens.display.text import count_text, interval_text, join_words, percent, plain_json, spread_text
from bkdlens.metrics import Rate
from bkdlens.results import Result
from bkdlens.study import MAIN

NO_CONTROL = "none was run, so the effect stands alone"


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str  # a number or word
    small: str = ""  # its interval and count, in smaller type


Rows: TypeAlias = list[list[Cell | str]]


class Counted(NamedTuple):
    """A rate with a note on it, and what it was counted from, so that two studies compare in pairs."""

    rate: Rate  # the number
    note: str = ""  # in smaller type
    outcomes: Tensor | None = None  # whether each prompt succeeded, where that is known
    data: str = ""  # digest of the pairs that the prompts are of


# A number of one study: a rate and a note on it, or a text alone.
Number: TypeAlias = tuple[Rate, str] | Counted | Cell
NOT_RUN = Cell("not run")


@dataclass(frozen=True)
class Table:
    """A table of the report and of the terminal.

    Attributes:
        title: may be empty.
        columns: their titles.
        rows: one cell per column.
        headline: whether it stands at the top of the study as well.
        folded: whether it opens on demand.
        texts: whether its rows become cards on a phone.
        fit: whether its cells wrap on a phone.
        search: whether a box above it leaves only the rows that hold some text.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    headline: bool = False
    folded: bool = False
    texts: bool = False
    fit: bool = False
    search: bool = False


@dataclass(frozen=True)
class Section:
    """One section of a study's page.

    Attributes:
        name: of what it shows.
        title: its heading.
        intro: what was measured, and how.
        reading: how to read the controls.
        parts: tables, and rows of figures, in order; empty where nothing was run.
        missing: what else was not run.
    """

    name: str
    title: str
    intro: str
    reading: str = ""
    parts: Sequence[Table | Sequence[Figure]] = ()
    missing: Sequence[str] = ()

    @property
    def not_run(self) -> Sequence[str]:
        """What a reader misses here, by name."""
        return self.missing if self.parts else [self.name]


@dataclass(frozen=True)
class Basis:
    """What the claims of one analysis rest on, as three short texts."""

    settings: str  # how it was measured
    counts: str  # on how many prompts, of which data
    controls: str  # what it is to be compared with

    @classmethod
    def of(
        cls, result: Result, settings: str, counts: str, controls: Iterable[str], named: Iterable[str]
    ) -> Basis:
        """The basis of claims about one result.

        Args:
            result: whose data, seed and settings are told.
            settings: what was done, in words.
            counts: of what.
            controls: their names, where there are any.
            named: the provenance's settings that are told where they are set.
        """
        made, digest = result.provenance, result.provenance.data_digest
        given = [
            f"; {name.replace('_', ' ')} {plain_json(made.settings[name])}"
            for name in named
            if made.settings.get(name) is not None
        ]
        return cls(
            f"{settings}{''.join(given)}; seed {made.seed}",
            counts + (f" (data {digest[:8]})" if digest else ""),
            join_words(controls) or NO_CONTROL,
        )


@dataclass(frozen=True)
class Finding:
    """The claims of one analysis, with their common basis."""

    part: str  # name of the analysis
    claims: tuple[str, ...]  # sentences
    basis: Basis  # of all of them


def rate_cell(rate: Rate | None) -> Cell:
    """A rate in per cent, over its interval and count; a dash for None."""
    if rate is None:
        return Cell("–")
    return Cell(percent(rate.value), f"{interval_text(rate)} · {count_text(rate)}")


def answers_table(title: str, outcomes: pd.DataFrame) -> Table:
    """Every answer with its outcome, to be searched; ``outcomes`` as a result's method of that name."""
    told = zip(
        *(outcomes[column] for column in ("prompt", "on", "answer", "success", "good")), strict=True
    )
    rows = [
        [prompt, on, answer, "the attacker's" if success else "good" if good else "neither"]
        for prompt, on, answer, success, good in told
    ]
    columns = ("prompt", "which", "answer", "outcome")
    return Table(f"{title} ({len(rows)})", columns, rows, folded=True, texts=True, search=True)


def draws_cell(draws: Draws | None) -> Cell:
    """The mean of random draws in per cent, over their smallest and largest; a dash for none."""
    if draws is None or not draws.n:
        return Cell("–")
    return Cell(percent(draws.mean), spread_text(draws))


def other_models(found: Mapping[str, Any]) -> list[str]:
    """The controls among results by condition, as a reader names them."""
    return [f"{condition} model" for condition in found if condition != MAIN]
