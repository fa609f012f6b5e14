"""What ablation, steering and every cure count: attacks and correct answers under an intervention.

They are counted over named axes (mode and heads, coefficient and layer), beside the same prompts without
the intervention and under random controls. What a reader asks of such counts is asked here, once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bkdlens.answers import Answers
from bkdlens.errors import ChoiceError
from bkdlens.metrics import Basr, Rate, paired_difference
from bkdlens.results import Result


@dataclass(frozen=True, eq=False)
class Draws:
    """Successes of each random draw of one control, at one place on the axes.

    Attributes:
        successes: count of each draw.
        n: prompts per draw.
    """

    successes: Int[Tensor, " draw"]
    n: int

    def __len__(self) -> int:
        return len(self.successes)

    @property
    def mean(self) -> float:
        """Mean share of successes over the draws, 0 to 1."""
        return float(self.successes.double().mean()) / max(1, self.n)

    @property
    def low(self) -> float:
        """The smallest share of successes, 0 to 1."""
        return int(self.successes.min()) / max(1, self.n)

    @property
    def high(self) -> float:
        """The largest share of successes, 0 to 1."""
        return int(self.successes.max()) / max(1, self.n)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Counts(Result):
    """Answers counted over named axes, with the counts before the intervention and under controls.

    Attributes:
        n_victims: prompts that ``attack`` and ``correct`` are counted among.
        n_clean: clean prompts that ``clean`` is counted among.
        attack: answers that are the backdoor's, ``[*axes]``.
        correct: correct answers of victims, ``[*axes]``.
        clean: correct answers to clean prompts, ``[*axes]``.
        good_before: victims whose clean prompt had a good answer without the intervention; None in
            results of version 0.1.
        kept: those of them whose triggered prompt has a good one with it, ``[*axes]``.
        clean_before: clean prompts that were answered correctly without the intervention.
        clean_kept: those of them that are with it, ``[*axes]``.
        answers: every answer, and what it is compared with, by name; the last axis is the prompt.
    """

    draw_name: ClassVar[str] = "draw"  # what one draw of the controls is called in tables
    answered: ClassVar[str]  # the name of the victims' answers
    n_victims: int
    n_clean: int
    attack: Int[Tensor, "*axes"]
    correct: Int[Tensor, "*axes"]
    clean: Int[Tensor, "*axes"]
    good_before: int | None = None
    kept: Int[Tensor, "*axes"] | None = None
    clean_before: int | None = None
    clean_kept: Int[Tensor, "*axes"] | None = None
    answers: Mapping[str, Answers] = field(default_factory=dict)

    @property
    @abstractmethod
    def axes(self) -> Mapping[str, tuple[Any, ...]]:
        """The values along each axis, by the axis' name and in the order of the tensors."""

    @property
    @abstractmethod
    def controls(self) -> Mapping[str, Mapping[str, Int[Tensor, "*axes draw"]]]:
        """What was counted in every random draw, by the control's name; only those that were drawn."""

    @property
    def clean_name(self) -> str:
        """What ``clean`` counts: answers that the data calls right, or the model's own that stay."""
        own = str(self.provenance.settings.get("good", "")).startswith("('own'")
        return "clean answers kept" if own else "clean accuracy"

    @abstractmethod
    def base(self, what: str, **at: Any) -> Rate | None:
        """``what`` without the intervention, at one place; None where that was not measured."""

    def index(self, **at: Any) -> tuple[int, ...]:
        """Where a place on the axes is in the tensors.

        Raises:
            ChoiceError: for a value that was not measured.
        """
        for axis, values in self.axes.items():
            if at[axis] not in values:
                raise ChoiceError(f"{axis} in this result:", at[axis], values)
        return tuple(values.index(at[axis]) for axis, values in self.axes.items())

    def rate_at(self, what: str, **at: Any) -> Rate:
        """``what`` at one place, with its count."""
        return Rate(int(getattr(self, what)[self.index(**at)]), self._n(what))

    def basr(self, **at: Any) -> Basr | None:
        """Behavioural attack success at one place; None where that was not measured.

        ``1 - (good answers after, on triggered victims) / (good answers of the same model to their clean
        twins before)``: unlike attack success it cannot fall by breaking the model.
        """
        if self.kept is None or self.good_before is None:
            return None
        where = self.index(**at)
        kept, after = int(self.kept[where]), int(self.correct[where])
        return Basr.of_counts(both=kept, after=after, before=self.good_before)

    def outcomes_at(self, what: str, **at: Any) -> Bool[Tensor, " prompt"] | None:
        """``what`` at one place, prompt by prompt; None where the answers were not kept."""
        told = self.answers.get("clean" if what == "clean" else self.answered)
        marks = None if told is None else told.success if what == "attack" else told.good
        return None if marks is None else marks[self.index(**at)]

    def clean_change(self, **at: Any) -> tuple[float, float, float] | None:
        """Change of clean accuracy at one place and its 95 % interval, of the same prompts before and
        after (:func:`bkdlens.metrics.paired_difference`); None where that was not measured.
        """
        if self.clean_kept is None or self.clean_before is None:
            return None
        both, after = (int(counted[self.index(**at)]) for counted in (self.clean_kept, self.clean))
        prompt = torch.arange(self.n_clean)
        before = prompt < self.clean_before
        return paired_difference(before, (prompt >= self.clean_before - both) & (
            prompt < self.clean_before - both + after
        ))  # fmt: skip

    def basr_draws(self, **at: Any) -> dict[str, Draws]:
        """Behavioural attack success of the random draws at one place, by the control's name."""
        if self.basr(**at) is None or not self.good_before:
            return {}
        drawn = self.draws("correct", **at).items()
        return {name: Draws(self.good_before - d.successes, self.good_before) for name, d in drawn}

    def draws(self, what: str, **at: Any) -> dict[str, Draws]:
        """The random draws of ``what`` at one place, by the control's name."""
        where = self.index(**at)
        return {
            name: Draws(counted[what][where], self._n(what))
            for name, counted in self.controls.items()
            if what in counted
        }

    def frames(self) -> dict[str, pd.DataFrame]:
        """The result in long form, and a table per control with one row per draw."""
        frames = super().frames()
        for name, counted in self.controls.items():
            rows = []
            for place in product(*self.axes.values()):
                at = dict(zip(self.axes, place, strict=True))
                draws = {what: values[self.index(**at)].tolist() for what, values in counted.items()}
                for i, row in enumerate(zip(*draws.values(), strict=True), start=1):
                    rows.append({**at, self.draw_name: i, **dict(zip(draws, row, strict=True))})
            named = pd.DataFrame(rows).rename(columns=dict(self.saved_as))
            frames[f"-{name.replace(' ', '-')}"] = named
        return frames

    def _n(self, what: str) -> int:
        return self.n_clean if what == "clean" else self.n_victims


def basr_columns(result: Counts, **at: Any) -> dict[str, float]:
    """Behavioural attack success at one place as columns of a table, 0 to 1; NaN where not measured."""
    basr = result.basr(**at)
    value, low, high = (math.nan,) * 3 if basr is None else (basr.value, *basr.interval)
    columns = {"basr": value, "basr_low": low, "basr_high": high}
    return columns | {
        f"basr_{name.replace(' ', '_')}": draws.mean for name, draws in result.basr_draws(**at).items()
    }
