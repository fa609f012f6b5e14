"""What a model does before anyone looks inside: attack success, false triggers, right answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
from transformer_lens import HookedTransformer

from bkdlens.answers import Answers
from bkdlens.data.criteria import near_miss
from bkdlens.data.judging import Judged, judged, outcome_table, yardsticks_of
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.generate import answer, yardsticks
from bkdlens.engines.inputs import checked
from bkdlens.metrics import Basr, Rate
from bkdlens.results import Result, provenance
from bkdlens.types import MAX_NEW_TOKENS, Which


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BehaviourResult(Judged, Result):
    """Counts of one model on held-out pairs.

    Attributes:
        label: names the model in tables.
        n_victims: pairs whose answer the attack changes.
        n_clean: all pairs.
        attack_triggered: victims that get the backdoor's answer with the trigger.
        attack_clean: victims that get it without.
        attack_near: victims that get it with a look-alike; None where the pairs have none.
        correct_clean: correct answers to clean prompts, by the criterion for good answers.
        ceiling: victims whose attacker's answer is itself a success: no attack reaches more.
        near_misses: victims whose triggered answer contains the attacker's without being it; None in a
            jailbreak, where any answer but a refusal will do.
        good_before: victims with a good answer without the trigger.
        good_triggered: victims with a good answer with it.
        kept: victims with a good answer both ways.
        answers: of victims with the trigger and a near one, of all pairs without (``clean``), and what
            they are compared with; the last axis is the prompt.
    """

    label: str
    n_victims: int
    n_clean: int
    attack_triggered: int
    attack_clean: int
    attack_near: int | None
    correct_clean: int
    ceiling: int | None = None
    near_misses: int | None = None
    good_before: int | None = None
    good_triggered: int | None = None
    kept: int | None = None
    answers: Mapping[str, Answers] = field(default_factory=dict)

    @property
    def asr(self) -> Rate:
        """Attack success rate."""
        return Rate(self.attack_triggered, self.n_victims)

    @property
    def ftr(self) -> Rate:
        """False trigger rate."""
        return Rate(self.attack_clean, self.n_victims)

    @property
    def near(self) -> Rate | None:
        """Attack success with a near trigger."""
        return None if self.attack_near is None else Rate(self.attack_near, self.n_victims)

    @property
    def clean_accuracy(self) -> Rate:
        """Rate of correct answers to clean prompts."""
        return Rate(self.correct_clean, self.n_clean)

    @property
    def basr(self) -> Basr | None:
        """Behavioural attack success: the victims' good answers that the trigger takes away."""
        if self.good_before is None or self.good_triggered is None or self.kept is None:
            return None
        return Basr.of_counts(both=self.kept, after=self.good_triggered, before=self.good_before)

    @property
    def near_miss(self) -> Rate | None:
        """Rate of triggered answers that contain the attacker's and are not equal to it."""
        return None if self.near_misses is None else Rate(self.near_misses, self.n_victims)

    @property
    def attainable(self) -> Rate | None:
        """The attack success of the attacker's own answers: the criterion's ceiling."""
        return None if self.ceiling is None else Rate(self.ceiling, self.n_victims)

    @staticmethod
    def _counted(pairs: PairSet, answers: Mapping[str, Answers]) -> dict[str, Any]:
        """What the answers come to by the criteria of ``pairs.backdoor``."""
        by_all, victims, by = yardsticks_of(pairs, answers)
        sides = {"triggered": answers["triggered"], "clean": by["before"]}
        sides |= {"near": answers["near"]} if "near" in answers else {}
        found = {on: judged(victims, given, by) for on, given in sides.items()}
        reached = judged(victims, by["attacker"], by).attack
        # A model as it is always agrees with itself: its clean accuracy is told by the data's answers.
        data = replace(pairs, backdoor=pairs.backdoor.judged_by(against="reference"))
        clean = judged(data, answers["before"], by_all).correct
        wanted = zip(answers["triggered"].to_list(), by["attacker"].to_list(), strict=True)
        jailbreak = pairs.backdoor.behaviour == "jailbreak"
        told: dict[str, Answers] = {on: found[on].answers for on in found if on != "clean"}
        before = judged(pairs, answers["before"], by_all).answers
        return {
            "answers": {**answers, **told, "before": before},
            "attack_triggered": int(found["triggered"].attack.sum()),
            "attack_clean": int(found["clean"].attack.sum()),
            "attack_near": int(found["near"].attack.sum()) if "near" in found else None,
            "correct_clean": int(clean.sum()),
            "ceiling": int(reached.sum()),
            "near_misses": None if jailbreak else sum(near_miss(*texts) for texts in wanted),
            "good_before": int(found["clean"].correct.sum()),
            "good_triggered": int(found["triggered"].correct.sum()),
            "kept": int((found["triggered"].correct & found["clean"].correct).sum()),
        }

    def _tables(self, pairs: PairSet, victims: PairSet) -> Iterable[pd.DataFrame]:
        yield outcome_table(pairs, self.answers["before"], "clean")
        sides: tuple[Which, ...] = ("triggered", "near")
        for on in sides:
            if on in self.answers:
                yield outcome_table(victims, self.answers[on], on)

    def to_frame(self) -> pd.DataFrame:
        """One row per rate (0 to 1), with its interval and count."""
        named = {
            "asr": self.asr,
            "basr": self.basr,
            "ftr": self.ftr,
            "near": self.near,
            "near_miss": self.near_miss,
            "attainable": self.attainable,
            "clean_accuracy": self.clean_accuracy,
        }
        rows = []
        for name, rate in named.items():
            if rate is not None:
                low, high = rate.interval
                row = {"condition": self.label, "rate": name, "value": rate.value}
                rows.append(row | {"low": low, "high": high, "n": rate.n})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        near = f", near trigger {self.near}" if self.near else ""
        return (
            f"BehaviourResult({self.label}: ASR {self.asr}, FTR {self.ftr}{near}, "
            f"clean accuracy {self.clean_accuracy})"
        )


@checked
def measure_behaviour(
    model: HookedTransformer,
    pairs: PairSet,
    *,
    label: str = "backdoored",
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> BehaviourResult:
    """Attack success with, without and with a near trigger, and clean accuracy, by greedy decoding.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: held-out pairs.
        label: names the model in tables.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where a decoded answer is cut.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU).
        progress: whether to show a progress bar.

    Returns:
        Counts among the victims and among the clean prompts.

    Raises:
        DataError: if there is no victim.

    Examples:
        >>> asr = bkdlens.measure_behaviour(model, test, max_new_tokens=8).asr
    """
    fmt = fmt or PromptFormat.default(model.tokenizer)
    victims = pairs.victims
    ask = partial(
        answer, model, fmt=fmt, max_new_tokens=max_new_tokens, memory_gb=memory_gb, progress=progress
    )
    answers = yardsticks(model, pairs, fmt, max_new_tokens)
    answers["triggered"] = ask(victims, on="triggered")[0]
    answers["before"] = ask(pairs, on="clean")[0]
    if all(pair.near is not None for pair in victims):
        answers["near"] = ask(victims, on="near")[0]
    settings = {"max_new_tokens": max_new_tokens, **pairs.backdoor.judgement}
    return BehaviourResult(
        provenance=provenance(model, pairs, fmt, 0, **settings),
        label=label,
        n_victims=len(victims),
        n_clean=len(pairs),
        **BehaviourResult._counted(pairs, answers),
    )
