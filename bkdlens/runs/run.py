"""The whole main job on one model: every analysis of the list, and the same on its controls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from bkdlens.analyses.base import Run, Subject
from bkdlens.analyses.parts import PARTS
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat, encode_prompts
from bkdlens.engines.inputs import checked
from bkdlens.errors import ResultError, unknown
from bkdlens.results import provenance
from bkdlens.runs.reading import load_study
from bkdlens.study import MAIN, Study, StudySettings

MISSING = "not there"  # the value of a setting that one of two runs lacks
STEPS = tuple(part.step for part in PARTS)


@checked
def run_study(
    model: HookedTransformer,
    train: PairSet,
    validation: PairSet,
    test: PairSet,
    *,
    name: str = "study",
    controls: Mapping[str, Callable[[], HookedTransformer]] | None = None,
    settings: StudySettings | None = None,
    fmt: PromptFormat | None = None,
    out: str | Path | None = None,
    steps: tuple[str, ...] = STEPS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> Study:
    """Run the analyses on one model, with its controls.

    Needed are the model and three disjoint sets of pairs. ``train`` may have tuned the model: only mean
    activations come from it. On ``validation`` the probes are fit, the heads are ranked, and kind, layer
    and coefficient of the vector are chosen. Every reported number is measured on ``test``.

    Args:
        model: the suspected model, from :func:`bkdlens.load`.
        train, validation, test: disjoint pairs (:meth:`PairSet.split`).
        name: a title for tables and the report.
        controls: un-poisoned models by condition (``clean-adapter``, ``base``), each loaded when it
            is its turn and dropped after.
        settings: the choices; the defaults are the paper's where it has any.
        fmt: how a prompt is rendered; the chat template where there is one.
        out: a run folder. What it already holds is not run again, and each result is written when
            it is done.
        steps: which steps of the list of analyses to run (``"behaviour"``, ``"attribute"``, …); what
            a later one needs of an earlier one is run with it.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU); it
            changes no number.
        progress: whether to show progress bars.

    Returns:
        The study: every result by name, and what was chosen on ``validation``.

    Raises:
        ResultError: if ``out`` holds another study, or a step is unknown.
        DataError: if the pairs cannot be used.

    Examples:
        >>> parts = train.split(0.5, 0.25, 0.25)
        >>> study = bkdlens.run_study(model, *parts, steps=("behaviour",), out="runs/label")
    """
    settings = settings or StudySettings()
    fmt = fmt or PromptFormat.default(model.tokenizer)
    for step in steps:
        if step not in STEPS:
            raise ResultError(unknown("step", step, STEPS))
    pairs = {"train": train, "validation": validation, "test": test}
    for pair_set in pairs.values():
        _check(model, pair_set, fmt)
    described = asdict(settings) | {
        "prompt_format": asdict(fmt),
        "model": dict(provenance(model, train, fmt, 0).model),
        "data": {split: pair_set.digest for split, pair_set in pairs.items()},
    }
    plain = json.loads(json.dumps(described))
    test.backdoor.to_dict()  # raises for what could not be saved
    kept = {"validation": validation, "test": test}
    folder = Path(out) if out else None
    run = Run(
        study=_resumed(Study(name, test.backdoor, {}, plain, pairs=kept), folder),
        settings=settings,
        train=train,
        validation=validation,
        test=test,
        fmt=fmt,
        folder=folder,
        memory_gb=memory_gb,
        progress=progress,
    )
    needed = {need for part in PARTS if part.step in steps for need in part.needs}
    wanted = [part for part in PARTS if part.step in steps or part.name in needed]
    loads = {MAIN: lambda: model, **(controls or {})}
    for condition, load in loads.items():
        subject = Subject(run, condition, load)
        for part in wanted:
            if subject.is_main or part.for_controls:
                part.run(subject)
    return replace(run.study, results=dict(sorted(run.study.results.items())))


def _resumed(study: Study, folder: Path | None) -> Study:
    """The study with what its folder holds.

    Raises:
        ResultError: if the folder holds another study, or something else.
    """
    if folder is None or not folder.exists():
        return study
    if (folder / "study.json").exists():
        earlier = load_study(folder)
        if earlier.settings != study.settings or earlier.backdoor != study.backdoor:
            earlier_head, head = (
                {**each.settings, "backdoor": json.loads(json.dumps(each.backdoor.to_dict()))}
                for each in (earlier, study)
            )
            changed = _changes(earlier_head, head)
            raise ResultError(
                f"The folder {str(folder)!r} holds a run with other settings, data or model "
                f"({'; '.join(changed)}); name a new folder, or run it as it was."
            )
        return replace(study, results=earlier.results, choice=earlier.choice)
    if any(folder.iterdir()):
        raise ResultError(
            f"The folder {str(folder)!r} is not empty and holds no run; name a new folder."
        )
    return study


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between settings, as ``name: old → new``; those within one are ``outer.inner``."""
    changes = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, MISSING), new.get(name, MISSING)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += _changes(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name}: {_short(before)} → {_short(after)}")
    return changes


def _short(value: object) -> str:
    text = value if value is MISSING else repr(value)
    return str(text) if len(str(text)) <= 60 else f"{str(text)[:59]}…"


def _check(model: HookedTransformer, pairs: PairSet, fmt: PromptFormat) -> None:
    """Raise for pairs that cannot be used, before anything is run or written."""
    _ = pairs.victims
    texts = [text for pair in pairs for text in (pair.clean, pair.triggered, pair.near)]
    encode_prompts(model, [text for text in texts if text is not None], fmt)
