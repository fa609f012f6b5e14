"""Saved results and run folders, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bkdlens.analyses.parts import PARTS  # which brings every kind of result with it
from bkdlens.data.backdoor import Backdoor
from bkdlens.errors import DataError, ResultError, unknown
from bkdlens.results import Result, read_json
from bkdlens.study import Study


def load_result(path: str | Path) -> Result:
    """Load any saved result, whatever its kind.

    Args:
        path: of the json file, the tensors beside it, or both without their endings.

    Returns:
        The result, equal to the one that was saved.

    Raises:
        ResultError: if there is none, or it is damaged.

    Examples:
        >>> again = bkdlens.load_result(heads.save("heads"))
    """
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".json", ".safetensors") else stem
    kind = read_json(stem).get("type")
    if kind not in Result.kinds:
        raise ResultError(unknown("kind of result", kind, sorted(Result.kinds)))
    return Result.kinds[kind].load(stem)


def load_study(folder: str | Path) -> Study:
    """Load a run folder.

    Args:
        folder: as :func:`bkdlens.run_study` or ``bkdlens run`` wrote it, whole or partial.

    Returns:
        The study, equal to the one that was run.

    Raises:
        ResultError: if it is not one.

    Examples:
        >>> parts = train.split(0.5, 0.25, 0.25)
        >>> _ = bkdlens.run_study(model, *parts, steps=("behaviour",), out="label")
        >>> study = bkdlens.load_study("label")
    """
    folder = Path(folder)
    head = read_json(folder / "study")
    files = sorted(path for path in folder.glob("*.json") if path.name != "study.json")
    results = {path.stem: load_result(path) for path in files}
    try:
        backdoor = Backdoor.from_dict(head["backdoor"])
        return Study(head["name"], backdoor, results, head["settings"], head["choice"])
    except (KeyError, TypeError, DataError) as error:
        raise ResultError(f"{folder / 'study.json'} is damaged ({error}); make it again.") from None


def summary(study: Study) -> dict[str, Any]:
    """The headline numbers of a study as plain values for machines, rates with count and interval."""
    head: dict[str, Any] = {"name": study.name, "backdoor": study.backdoor.behaviour}
    for part in PARTS:
        head |= part.summary(study)
    return head
