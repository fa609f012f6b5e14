"""Answers judged: which are the attacker's success, which are good, and all of them as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from bkdlens.answers import NOT_DECODED, Answers
from bkdlens.data.pairs import PairSet
from bkdlens.types import Which


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
