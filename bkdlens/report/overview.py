"""Tables of whole studies: several beside each other, and where the results of one come from."""

from __future__ import annotations

from collections.abc import Sequence

from bkdlens.analyses.parts import PARTS
from bkdlens.display.tables import Cell, Rows, Table
from bkdlens.display.text import plain_json
from bkdlens.study import Study, Thresholds


def overview_table(studies: Sequence[Study]) -> Table:
    """One row per study."""
    rows = [{k: v for part in PARTS for k, v in part.overview(study).items()} for study in studies]
    cells: Rows = [[study.name, *row.values()] for study, row in zip(studies, rows, strict=True)]
    return Table("", ("study", *rows[0]), cells)


def verdict_table(studies: Sequence[Study], thresholds: Thresholds | None = None) -> Table:
    """The answers to all questions, one row per study."""
    told = [study.verdict(thresholds) for study in studies]
    rows: Rows = [
        [study.name, *(Cell(one.answer) for one in verdicts)]
        for study, verdicts in zip(studies, told, strict=True)
    ]
    return Table("", ("study", *(one.question for one in told[0])), rows)


def headline_table(study: Study) -> Table | None:
    """The table that stands at the top of a study."""
    tables = (table for part in PARTS for table in part.tables(study, 80, True))
    return next((t for t in tables if isinstance(t, Table) and t.headline), None)


def provenance_table(study: Study) -> Table | None:
    """Where every result comes from."""
    rows = []
    for name, result in study.results.items():
        made = result.provenance
        model = [f"{key} {plain_json(value)}" for key, value in made.model.items() if value is not None]
        rows.append(
            [
                name,
                ", ".join(model) or "–",
                f"{made.data or '–'}, digest {made.data_digest or '–'}",
                str(made.n_pairs),
                str(made.seed),
                plain_json(made.prompt_format),
                plain_json(made.settings),
            ]
        )
    columns = ("result", "model", "data and digest", "pairs", "seed", "prompt format", "settings")
    return Table("", columns, rows) if rows else None
