"""What a model does before anyone looks inside: attack success, false triggers, right answers."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from transformer_lens import HookedTransformer

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.generate import evaluate
from bkdlens.metrics import Rate
from bkdlens.results import Result, provenance
from bkdlens.types import MAX_NEW_TOKENS, Which


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BehaviourResult(Result):
    """Counts of one model on held-out pairs.

    Attributes:
        label: names the model in tables.
        n_victims: pairs whose answer the attack changes.
        n_clean: all pairs.
        attack_triggered: victims that get the backdoor's answer with the trigger.
        attack_clean: victims that get it without.
        attack_near: victims that get it with a look-alike; None where the pairs have none.
        correct_clean: exactly correct answers to clean prompts.
    """

    label: str
    n_victims: int
    n_clean: int
    attack_triggered: int
    attack_clean: int
    attack_near: int | None
    correct_clean: int

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
        """Rate of exactly right answers to clean prompts."""
        return Rate(self.correct_clean, self.n_clean)

    def to_frame(self) -> pd.DataFrame:
        """One row per rate (0 to 1), with its interval and count."""
        named = {"asr": self.asr, "ftr": self.ftr, "near": self.near,
                 "clean_accuracy": self.clean_accuracy}  # fmt: skip
        return pd.DataFrame(
            [
                {"condition": self.label, "rate": name, "value": rate.value,
                 "low": rate.interval[0], "high": rate.interval[1], "n": rate.n}
                for name, rate in named.items() if rate is not None
            ]
        )  # fmt: skip

    def __repr__(self) -> str:
        near = f", near trigger {self.near}" if self.near else ""
        return (
            f"BehaviourResult({self.label}: ASR {self.asr}, FTR {self.ftr}{near}, "
            f"clean accuracy {self.clean_accuracy})"
        )


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

    def attacks(on: Which) -> int:
        out = evaluate(model, victims, on=on, fmt=fmt, max_new_tokens=max_new_tokens,
                       memory_gb=memory_gb, progress=progress)  # fmt: skip
        return int(out.attack.sum())

    clean = evaluate(model, pairs, on="clean", only_correct=True, fmt=fmt,
                     max_new_tokens=max_new_tokens, memory_gb=memory_gb)  # fmt: skip
    has_near = all(pair.near is not None for pair in victims)
    return BehaviourResult(
        provenance=provenance(model, pairs, fmt, 0, max_new_tokens=max_new_tokens),
        label=label,
        n_victims=len(victims),
        n_clean=len(pairs),
        attack_triggered=attacks("triggered"),
        attack_clean=attacks("clean"),
        attack_near=attacks("near") if has_near else None,
        correct_clean=int(clean.correct.sum()),
    )
