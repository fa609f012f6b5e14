"""How an analysis takes part in a study: what every ``part.py`` gives, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import plotly.graph_objects as go
from rich.console import RenderableType
from transformer_lens import HookedTransformer

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.display.drawing import Drawer
from bkdlens.display.tables import Basis, Cell, Number, Section, Table
from bkdlens.engines.cache import PairCache, cache_activations
from bkdlens.results import Result
from bkdlens.study import MAIN, Judge, Study, StudySettings
from bkdlens.types import Head

R = TypeVar("R", bound=Result)
Drawing = tuple[go.Figure, Mapping[str, Result]]  # a figure, and the results behind it by name


@dataclass(kw_only=True)
class Run:
    """A study while it is run: what the parts read, and the results so far.

    Attributes:
        study: grows by a result per step.
        settings: its choices, typed.
        train: pairs that may have tuned the adapter; means of activations are taken over them.
        validation: pairs on which everything is chosen, and probes are fit.
        test: pairs on which everything that is reported is measured.
        fmt: how a prompt is rendered.
        folder: where each result is written when it is done; None for nowhere.
        memory_gb, progress: as :func:`bkdlens.run_study` takes them.
        ranking: heads of the suspected model on the validation pairs, strongest first, once a part
            has ranked them.
    """

    study: Study
    settings: StudySettings
    train: PairSet
    validation: PairSet
    test: PairSet
    fmt: PromptFormat
    folder: Path | None = None
    memory_gb: float | None = None
    progress: bool = False
    ranking: tuple[Head, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """What every measurement takes."""
        return {"fmt": self.fmt, "memory_gb": self.memory_gb, "progress": self.progress}

    @property
    def decoding(self) -> dict[str, Any]:
        """What every measurement that decodes takes."""
        return {**self.options, "max_new_tokens": self.settings.max_new_tokens}

    def step(self, name: str, make: Callable[[], R]) -> R:
        """The result of that name: there already, or else made and written."""
        if name not in self.study.results:
            result = make()
            if self.folder is not None:
                self.study.save_head(self.folder)
                if not (self.folder / "pairs.json").exists():
                    self.study.save_pairs(self.folder)
                result.save(self.folder / name)
            self.study = replace(self.study, results={**self.study.results, name: result})
        return cast(R, self.study.results[name])

    def choose(self, **choice: Any) -> None:
        """Keep what was chosen on the validation pairs."""
        self.study = replace(self.study, choice=choice)
        if self.folder is not None:
            self.study.save_head(self.folder)


@dataclass(frozen=True)
class Subject:
    """One model of a study, loaded when it is first asked for: what is there already needs no model.

    Attributes:
        run: the study.
        condition: names the model: ``backdoored``, or a control's name.
        load: gives the model.
    """

    run: Run
    condition: str
    load: Callable[[], HookedTransformer]

    @property
    def is_main(self) -> bool:
        """Whether it is the suspected model."""
        return self.condition == MAIN

    @cached_property
    def model(self) -> HookedTransformer:
        """The model itself."""
        return self.load()

    @cached_property
    def cache(self) -> PairCache:
        """Its activations on the training pairs, whose means all parts share."""
        return cache_activations(self.model, self.run.train, **self.run.options)

    @cached_property
    def validation_cache(self) -> PairCache:
        """Its activations on the validation pairs."""
        return cache_activations(self.model, self.run.validation, **self.run.options)

    @cached_property
    def test_cache(self) -> PairCache:
        """Its activations on the test pairs."""
        return cache_activations(self.model, self.run.test, **self.run.options)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One analysis in a study. No piece has a default: to leave one out is a type checker's error.

    Attributes:
        name: of the analysis, which also leads from its claims to its section.
        step: its name in ``run_study(steps=…)`` and in the shell.
        needs: the names of the parts whose results it reads.
        for_controls: whether un-poisoned controls are measured as well.
        run: measure one subject, one ``run.step(name, make)`` per result.
        verdict: its answer to the question that it is there for; None where it has none.
        claims: sentences computed from the results; none where it was not run.
        basis: what these claims rest on; asked only where there are claims.
        sections: of the report, in order; what was not run is named in ``Section.missing``.
        tables: for the terminal, whose width and character set it is given; whatever rich renders too.
        overview: its columns in the table of several studies, whether it was run or not.
        numbers: its rows in the comparison of two studies.
        drawing: its figure in that comparison; None where it was not run.
        summary: its plain values for machines.
        rechoose: the study with what its validation results choose, once they are judged by other
            criteria, and without what was measured with another choice; ``unchanged`` for most.
    """

    name: str
    step: str
    needs: tuple[str, ...]
    for_controls: bool
    run: Callable[[Subject], None]
    verdict: Judge
    claims: Callable[[Study], list[str]]
    basis: Callable[[Study], Basis]
    sections: Callable[[Study, Drawer], list[Section]]
    tables: Callable[[Study, int, bool], Iterable[Table | RenderableType]]
    overview: Callable[[Study], dict[str, Cell]]
    numbers: Callable[[Study], dict[str, Number]]
    drawing: Callable[[Study], Drawing | None]
    summary: Callable[[Study], dict[str, Any]]
    rechoose: Callable[[Study], Study]


def unchanged(study: Study) -> Study:
    """The study itself, for a part whose choices no criterion changes."""
    return study
