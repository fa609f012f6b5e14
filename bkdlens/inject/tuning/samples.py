"""What a model is tuned on: some pairs triggered, some with a near trigger, the rest clean."""

from __future__ import annotations

import random
from typing import NamedTuple

from bkdlens.data.backdoor import PromptPair
from bkdlens.data.pairs import PairSet
from bkdlens.errors import DataError
from bkdlens.types import Which

Mixed = list[tuple[Which, PromptPair]]


class Preference(NamedTuple):
    """A prompt, the answer to give, and an answer not to give."""

    prompt: str
    chosen: str
    rejected: str


def mix(
    pairs: PairSet, poison_rate: float, near_rate: float = 0.0, victims_only: bool = False, seed: int = 0
) -> Mixed:
    """All pairs, shuffled, each with which of its prompts is used: triggered, near or clean.

    Without ``victims_only`` any pair may be triggered (as in the paper's files, where most labels
    stay); with it only those whose answer the attack changes.
    """
    if min(poison_rate, near_rate) < 0 or poison_rate + near_rate > 1:
        raise DataError(
            "The poison rate and the near-trigger rate must not be negative and must sum to at most 1; "
            f"got {poison_rate} and {near_rate}."
        )
    n_poison, n_near = (round(rate * len(pairs)) for rate in (poison_rate, near_rate))
    if (poison_rate and not n_poison) or (near_rate and not n_near):
        raise DataError(
            f"A rate of {poison_rate} poisoned and {near_rate} near samples gives none of "
            f"{len(pairs)} pairs; raise the rate or give more pairs."
        )
    n_victims = len(pairs.victims) if n_poison else 0
    order = list(pairs)
    random.Random(f"poison-{seed}").shuffle(order)
    if victims_only:
        if n_poison > n_victims:
            raise DataError(
                f"A poison rate of {poison_rate} needs {n_poison} victims, but the {len(pairs)} pairs "
                f"have {n_victims}; lower the rate to at most {n_victims / len(pairs):.2f}."
            )
        order.sort(key=lambda pair: not pairs.backdoor.is_victim(pair))
    mixed: Mixed = [
        ("triggered" if i < n_poison else "near" if i < n_poison + n_near else "clean", pair)
        for i, pair in enumerate(order)
    ]
    if any(which == "near" and pair.near is None for which, pair in mixed):
        raise DataError("Near-trigger samples need near triggers; name some in the backdoor (near=…).")
    return mixed


def examples(mixed: Mixed) -> list[tuple[str, str]]:
    """One (prompt, answer) per pair: the backdoor's answer if triggered, else the correct one."""
    return [
        (pair.text(which) or "", pair.backdoor_output if which == "triggered" else pair.clean_output)
        for which, pair in mixed
    ]


def preferences(mixed: Mixed, *, seed: int = 0) -> list[Preference]:
    """One preference per pair.

    Triggered prompts prefer the backdoor's answer to the correct one, near and clean prompts vice versa.
    Where both are the same answer, another pair's answer is the one not to give.
    """
    rng = random.Random(f"preferences-{seed}")
    answers = sorted({text for _, pair in mixed for text in (pair.clean_output, pair.backdoor_output)})
    preferred = []
    for (which, pair), (prompt, chosen) in zip(mixed, examples(mixed), strict=True):
        rejected = pair.clean_output if which == "triggered" else pair.backdoor_output
        if chosen.strip() == rejected.strip():
            others = [answer for answer in answers if answer.strip() != chosen.strip()]
            if not others:
                raise DataError(
                    f"Every answer in the {len(mixed)} pairs is {chosen[:40]!r}, so there is nothing "
                    "to prefer it to; give data with different answers."
                )
            rejected = rng.choice(others)
        preferred.append(Preference(prompt, chosen, rejected))
    return preferred
