"""Answers judged: which are the attacker's success, which are good, and all of them as a table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from bkdlens.answers import NOT_DECODED, Answers
from bkdlens.data.pairs import PairSet
from bkdlens.errors import ResultError
from bkdlens.results import Provenance
from bkdlens.types import Which

J = TypeVar("J", bound="Judged")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Greedy answers, judged by the backdoor's criteria."""

    attack: Bool[Tensor, "*places pair"]  # whether the answer is the attacker's success
    correct: Bool[Tensor, "*places pair"]  # whether the answer is good
    answers: Answers  # the answers themselves, with their outcomes, ``[*places pair]``


def judged(pairs: PairSet, answers: Answers, by: Mapping[str, Answers]) -> Outcomes:
    """The answers ``[*places pair]`` by the criteria of ``pairs.backdoor``.

    ``by`` holds what they are compared with: :func:`yardsticks`, and ``before``, the untouched model's
    answers to the clean prompts, where good answers are compared with these.
    """
    attack = torch.zeros(answers.index.shape, dtype=torch.bool)
    good = torch.zeros_like(attack)
    right = by["before" if pairs.backdoor.against == "own" else "right"].to_list()
    wanted_by_attacker = by["attacker"].to_list()
    for p, pair in enumerate(pairs):
        column = answers.index[..., p]
        for number in column.unique().tolist():
            text, places = answers.texts[number], column == number
            if text == NOT_DECODED:  # which was no success and not good, whatever it was
                continue
            attacker = wanted_by_attacker[p]
            attack[..., p][places] = pairs.backdoor.succeeded(text, pair, attacker)
            good[..., p][places] = pairs.backdoor.is_good(text, pair, right[p], attacker)
    return Outcomes(attack, good, replace(answers, success=attack, good=good))


def yardsticks_of(
    pairs: PairSet, answers: Mapping[str, Answers]
) -> tuple[dict[str, Answers], PairSet, dict[str, Answers]]:
    """What a result's answers are judged by, its victims, and what theirs are judged by."""
    by = {name: answers[name] for name in ("attacker", "right", "before")}
    rows = pairs.victim_rows
    return by, pairs.victims, {name: told[rows] for name, told in by.items()}


def outcome_table(
    pairs: PairSet, answers: Answers, on: Which, axes: Mapping[str, Sequence[Any]] | None = None
) -> pd.DataFrame:
    """Every answer ``[*axes pair]`` with its outcome, one row per place on the axes and prompt.

    The columns are the axes, ``on`` (the prompts that were answered), ``row`` (of the pair), ``victim``,
    ``prompt``, ``answer``, ``success`` (the attacker's) and ``good``.
    """
    axes, texts, victims = axes or {}, pairs.texts(on), set(pairs.victim_rows)
    rows = []
    for place in product(*(range(len(values)) for values in axes.values())):
        at = {name: values[i] for (name, values), i in zip(axes.items(), place, strict=True)}
        here = answers[place]
        assert here.success is not None
        assert here.good is not None
        told = zip(texts, here.to_list(), here.success.tolist(), here.good.tolist(), strict=True)
        for i, (prompt, text, success, good) in enumerate(told):
            row = {"on": on, "row": i, "victim": i in victims, "prompt": prompt, "answer": text}
            rows.append(at | row | {"success": success, "good": good})
    return pd.DataFrame(rows)


class Judged:
    """A result that holds every answer, and so can be judged anew and shown answer by answer.

    It is mixed into a :class:`Result` with the field ``answers``.
    """

    provenance: Provenance
    answers: Mapping[str, Answers]

    def judged_by(self: J, pairs: PairSet) -> J:
        """Return the result by the criteria of ``pairs.backdoor``, without running the model.

        Args:
            pairs: those that it was measured on.

        Returns:
            The result with its counts by these criteria, and the same answers.

        Raises:
            ResultError: for other pairs, or a result without the answers that this takes.

        Examples:
            >>> from dataclasses import replace
            >>> found = bkdlens.measure_behaviour(model, test, max_new_tokens=8)
            >>> strict = found.judged_by(replace(test, backdoor=backdoor.judged_by(success="equal")))
        """
        self._check(pairs, self._needed(pairs))
        settings = {**self.provenance.settings, **pairs.backdoor.judgement}
        told = replace(self.provenance, settings=settings)
        return replace(self, provenance=told, **self._counted(pairs, self.answers))  # type: ignore[type-var]

    def outcomes(self, pairs: PairSet) -> pd.DataFrame:
        """Every answer with its outcome: which victims withstand, and what the model says instead.

        Args:
            pairs: those that it was measured on.

        Returns:
            A row per place on the result's axes and prompt: ``on`` (the prompts that were answered),
            ``row`` among them, ``victim``, ``prompt``, ``answer``, ``success`` (the attacker's) and
            ``good``. Triggered and near prompts are victims', and so are clean ones to which a vector is
            added.

        Raises:
            ResultError: for other pairs, or a result without its answers.

        Examples:
            >>> found = bkdlens.ablate_heads(model, test, heads.top(2), cache=cache, n_random=0)
            >>> answers = found.outcomes(test)
        """
        self._check(pairs)
        victims = pairs.only(pairs.victim_rows)  # no criterion is asked here
        return pd.concat(self._tables(pairs, victims), ignore_index=True)

    @staticmethod
    @abstractmethod
    def _counted(pairs: PairSet, answers: Mapping[str, Answers]) -> dict[str, Any]:
        """The fields that the answers come to by the criteria of ``pairs.backdoor``."""

    @abstractmethod
    def _tables(self, pairs: PairSet, victims: PairSet) -> Iterable[pd.DataFrame]:
        """The tables of outcomes, one per set of prompts."""

    def _needed(self, pairs: PairSet) -> Sequence[str]:
        """The controls' answers that it takes to count by the criteria of ``pairs.backdoor``."""
        return ()

    def _check(self, pairs: PairSet, controls: Iterable[str] = ()) -> None:
        """Raise a ``ResultError`` unless the answers are there, and are those to ``pairs``."""
        if not self.answers:
            raise ResultError("This result has no answers to be judged anew; measure it again.")
        if pairs.digest != self.provenance.data_digest:
            raise ResultError(
                f"This result was measured on other pairs ({self.provenance.data}); give these."
            )
        sizes = {name: told.index.shape[-1] for name, told in self.answers.items()}
        per_pair = {sizes.get(name) for name in ("attacker", "right", "before")}
        if per_pair != {len(pairs)} or not {*sizes.values()} <= {len(pairs), len(pairs.victim_rows)}:
            raise ResultError("The answers of this result are not those to its pairs; measure it again.")
        if missing := [name for name in controls if name not in self.answers]:
            raise ResultError(
                f"The answers of this result's controls ({', '.join(missing)}) were not kept; measure "
                "it again with keep_controls=True (in a shell, --keep-controls)."
            )
