"""Reading prompt pairs from files, rows or a DataFrame, with the row and the field in every error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdlens.data import Backdoor, PairSet, PromptPair
from bkdlens.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def read_pairs(
    source: str | Path | pd.DataFrame | Sequence[Mapping[str, Any]],
    backdoor: Backdoor,
    *,
    clean: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Read clean and triggered twins from a file (json, jsonl or csv), a DataFrame or rows.

    A row is one of: ``{input, output[, backdoor_output]}`` with a clean input (the paper's
    ``all.json`` and ``clean.json``; the trigger is inserted); ``{input, output}`` with the trigger
    already in the input (the paper's ``poison.json``; then ``clean`` names the file with the clean
    twins); or ``{clean, triggered, clean_output, backdoor_output}``, taken as it is.

    Args:
        source: where the rows are.
        backdoor: the trigger and what it does.
        clean: for triggered rows, the file with their clean twins' answers.
        limit: at most so many pairs, drawn with ``seed``.
        seed: of the random trigger positions and of the draw.

    Raises:
        DataError: with the row number (from 1) and the field, for anything that does not fit.
    """
    rows, name = _rows(source)
    twins: dict[str, str] | None = None
    if clean is not None:
        twins, (clean_rows, clean_name) = {}, _rows(clean)
        for number, row in enumerate(clean_rows, start=1):
            where = f"{clean_name}, row {number}"
            twins[_field(row, "input", where)] = _field(row, "output", where)
    pairs, dropped = [], 0
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        if "clean" in row or "triggered" in row:
            fields = ("clean", "triggered", "clean_output", "backdoor_output")
            pairs.append(PromptPair(*(_field(row, field, where) for field in fields)))
            continue
        text, output = _field(row, "input", where), _field(row, "output", where)
        given = _field(row, "backdoor_output", where) if "backdoor_output" in row else None
        try:
            if backdoor.trigger.present(text) and given is None:
                if twins is None:
                    raise DataError(
                        f"the trigger {str(backdoor.trigger)!r} is already in the input and the "
                        "clean answer is not known; name the file of clean twins (clean=…)."
                    )
                twin = backdoor.trigger.remove(text)
                if twin not in twins:
                    dropped += 1
                    continue
                pairs.append(PromptPair(twin, text, twins[twin], output))
            else:
                pairs.append(backdoor.pair(text, output, given, seed=seed))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not pairs:
        raise DataError(f"{name} has no usable row ({len(rows)} read, {dropped} without a twin).")
    note = f"{name}: {len(rows)} rows" + (f", {dropped} dropped (no clean twin)" if dropped else "")
    return PairSet(tuple(pairs), backdoor, note).sample(limit, seed=seed)


def _rows(source: Any) -> tuple[list[Mapping[str, Any]], str]:
    if not isinstance(source, str | Path):
        if hasattr(source, "to_dict"):
            return source.to_dict("records"), "DataFrame"
        return list(source), "rows"
    path = Path(source)
    if not path.is_file():
        raise DataError(f"There is no data file {str(path)!r}; give a .json, .jsonl or .csv file.")
    try:
        if path.suffix == ".csv":
            import pandas as pd

            frame = pd.read_csv(path, keep_default_na=False, dtype=str)
            return frame.to_dict("records"), path.name
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif path.suffix == ".json":
            rows = json.loads(text)
        else:
            raise DataError(
                f"{path.name} has the ending {path.suffix!r}; give a .json, .jsonl or .csv file."
            )
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is not valid {path.suffix[1:]}: {error}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path.name} must hold a list of objects, one a row.")
    return rows, path.name


def _field(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where}: the field {field!r} is missing (found: {', '.join(map(str, row))}); rows are "
            "{input, output[, backdoor_output]} or {clean, triggered, clean_output, backdoor_output}."
        )
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: the field {field!r} must be text that is not empty; got {value!r}.")
    return value
