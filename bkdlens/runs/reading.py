"""Saved results and run folders, read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bkdlens.analyses.parts import PARTS  # which brings every kind of result with it
from bkdlens.data.backdoor import Backdoor
from bkdlens.data.pairs import PairSet
from bkdlens.errors import ChoiceError, DataError, ResultError, unknown
from bkdlens.results import Result, read_json
from bkdlens.study import Study, Thresholds

HEADS = ("study.json", "pairs.json")  # of a run folder; every other json file is a result


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
    files = sorted(path.stem for path in folder.glob("*.json") if path.name not in HEADS)
    results = {name: load_result(folder / f"{name}.json") for name in files}
    try:
        backdoor = Backdoor.from_dict(head["backdoor"])
        study = Study(head["name"], backdoor, results, head["settings"], head["choice"])
    except (KeyError, TypeError, AttributeError, DataError, ChoiceError) as error:
        raise ResultError(f"{folder / 'study.json'} is damaged ({error}); make it again.") from None
    try:
        saved = read_json(folder / "pairs") if (folder / "pairs.json").exists() else {}
        pairs = {name: PairSet.from_dict(values, backdoor) for name, values in saved.items()}
    except (KeyError, TypeError, AttributeError, ValueError, DataError) as error:
        raise ResultError(f"{folder / 'pairs.json'} is damaged ({error}); make it again.") from None
    return replace(study, pairs=pairs)


def summary(study: Study, thresholds: Thresholds | None = None) -> dict[str, Any]:
    """The verdict and the headline numbers of a study as plain values for machines."""
    head: dict[str, Any] = {
        "name": study.name,
        "backdoor": study.backdoor.behaviour,
        "criteria": study.backdoor.criteria,
        "verdict": [verdict.to_dict() for verdict in study.verdict(thresholds)],
    }
    for part in PARTS:
        head |= part.summary(study)
    return head
