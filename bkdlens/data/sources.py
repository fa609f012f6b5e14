"""From where data lies to rows: a file, a Hugging Face data set (on the Hub or saved), a DataFrame.

No data set's code is run: ``datasets`` 4 and later have none, and files are parsed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdlens.errors import DataError, one_line, unknown
from bkdlens.types import HUB_ID

if TYPE_CHECKING:
    import datasets
    import pandas as pd

    DataSource = str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict | Sequence[Mapping]

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves in its folder


@dataclass(frozen=True)
class Table:
    """All rows of one file, data set or table."""

    name: str  # of the file or data set; "rows" or "DataFrame" for what was in memory
    rows: Sequence[Mapping[str, Any]]  # each a mapping of field to value
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by column, where known


def read_table(source: Any, *, split: str | None = None) -> Table:
    """All rows of a source, or of one split of a data set, by default its only one, else ``train``."""
    if type(source).__module__.startswith("datasets"):
        return _data_set(source, "data set", split)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _saved(path, split)
        name, _, subset = str(source).partition(":")
        if not path.is_file() and HUB_ID.fullmatch(name) and path.suffix not in ENDINGS:
            return _hub(name, subset or None, split)
        table = _file(path)
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):
        table = Table("DataFrame", _records(source))
    else:
        rows = list(source)
        if not all(isinstance(row, Mapping) for row in rows):
            raise DataError("Rows must be mappings of field to value, one per row.")
        table = Table("rows", rows)
    if split is not None:
        raise DataError(f"Only data sets have splits, and {table.name} is not one; leave split out.")
    return table


def _file(path: Path) -> Table:
    kinds = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file"
    if not path.is_file():
        raise DataError(
            f"There is no data file {str(path)!r}; give a {kinds}, a folder of a saved data set or a "
            'Hub id ("org/name").'
        )
    if path.suffix not in ENDINGS:
        raise DataError(f"{path.name} has the ending {path.suffix!r}; give a {kinds}.")
    try:
        if path.suffix in (".csv", ".parquet"):
            return Table(path.name, _records(_frame(path)))
        rows = _json(path.read_text(encoding="utf-8-sig"), lines=path.suffix == ".jsonl")
    except (ValueError, OSError) as error:  # what json, pandas and pyarrow raise
        raise DataError(f"{path.name} is not valid {path.suffix[1:]}: {one_line(error)}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path.name} must hold a list of objects, one per row.")
    return Table(path.name, rows)


def _json(text: str, *, lines: bool) -> Any:
    """A json document, or one per line; many files with the ending .json are of the second kind."""
    if not lines:
        try:
            return json.loads(text)
        except ValueError as error:
            if not str(error).startswith("Extra data"):
                raise
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _frame(path: Path) -> pd.DataFrame:
    import pandas as pd

    if path.suffix == ".parquet":
        return pd.read_parquet(path, engine="pyarrow")
    return pd.read_csv(path, keep_default_na=False, dtype=str)


def _records(frame: pd.DataFrame) -> list[Mapping[str, Any]]:
    """The rows of a DataFrame, with None for missing values."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


# --- data sets ------------------------------------------------------------------------------------


def _saved(folder: Path, split: str | None) -> Table:
    if not any((folder / name).is_file() for name in SAVED):
        files = sorted(file.name for file in folder.iterdir() if file.suffix in ENDINGS)
        hint = f"give one of its files, such as {files[0]!r}" if files else "name a file"
        raise DataError(f"{str(folder)!r} is a folder but not a saved data set; {hint}.")
    import datasets

    try:
        return _data_set(datasets.load_from_disk(str(folder)), folder.name, split)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"The data set saved in {str(folder)!r} is damaged ({one_line(error)}); save it again."
        ) from error


def _hub(name: str, subset: str | None, split: str | None) -> Table:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is not a file or folder here and could not be read as a data set of the Hugging "
            f"Face Hub ({one_line(error)}); check the name, the subset ('{name}:subset'), the split, "
            "your access and your connection."
        ) from error
    name = f"{name}:{subset}" if subset else name
    return _data_set(loaded, f"{name} ({split})" if split else name, None)


def _data_set(loaded: Any, name: str, split: str | None) -> Table:
    """A data set, or the split that is asked for, with names for the numbers of classes."""
    if isinstance(loaded, Mapping):
        splits = list(loaded)
        if split is None:
            split = splits[0] if len(splits) == 1 else "train"
        if split not in loaded:
            raise DataError(f"{name}: {unknown('split', split, splits)}")
        loaded, name = loaded[split], f"{name} ({split})"
    elif split is not None:
        raise DataError(f"{name} is one split already; leave split out.")
    labels = {c: tuple(f.names) for c, f in loaded.features.items() if hasattr(f, "int2str")}
    rows = list(loaded.with_format(None))
    for row in rows:
        for column, names in labels.items():
            number = row[column]  # -1, no label, becomes None
            row[column] = None if number is None or number < 0 else names[number]
    return Table(name, rows, labels)
