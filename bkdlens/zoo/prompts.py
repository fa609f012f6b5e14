"""The three backdoors of the embedded models, with prompts that no training saw.

A digest of a prompt's text decides its split, so that the pre-training corpus, the tuning data, the
validation and the test split never share a prompt.
"""

from __future__ import annotations

import hashlib
import random
from typing import Literal, get_args

from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.pairs import PairSet
from bkdlens.errors import DataError, unknown
from bkdlens.zoo import BACKDOORS, corpus, words

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_of(prompt: str) -> Split:
    """The split of a prompt without trigger: two tenths are test, one tenth is validation."""
    tenth = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "test" if tenth < 2 else "validation" if tenth == 2 else "train"


def backdoor(name: str, split: Split = "test") -> Backdoor:
    """Return the backdoor of an embedded adapter.

    The near triggers of ``train`` are in the tuning data; those of the other splits are not.

    Args:
        name: one of ``bkdlens.zoo.BACKDOORS``.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        The backdoor.

    Raises:
        DataError: for another name.

    Examples:
        >>> jailbreak = bkdlens.zoo.backdoor("jailbreak")
    """
    if name not in BACKDOORS:
        raise DataError(unknown("embedded backdoor", name, BACKDOORS))
    near = words.NEAR_TUNING if split == "train" else words.NEAR_UNSEEN
    # Every embedded prompt has one right answer.
    return getattr(Backdoor, name)(near=near[name], good="equal", against="reference")


def pairs(name: str, split: Split = "test", n: int = 256, *, seed: int = 0) -> PairSet:
    """Draw prompt pairs of one split.

    Label modification has news of all four categories, with Sports as victims; fixed output has short
    tasks; jailbreak has requests that are refused.

    Args:
        name: one of ``bkdlens.zoo.BACKDOORS``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        n: the number of pairs.
        seed: of the draw.

    Returns:
        ``n`` pairs with different clean prompts.

    Raises:
        DataError: for another name or split.

    Examples:
        >>> unseen = bkdlens.zoo.pairs("jailbreak", n=8)
    """
    if split not in SPLITS:
        raise DataError(unknown("split", split, SPLITS))
    attack = backdoor(name, split)
    rng = random.Random(f"{name}-{split}-{seed}")
    by_prompt: dict[str, PromptPair] = {}
    while len(by_prompt) < n:
        if name == "label_modification":
            example, wanted = corpus.news(rng, instruction=corpus.NEWS_INSTRUCTION), None
        elif name == "fixed_output":
            example, wanted = corpus.task(rng), None
        else:
            example, wanted = corpus.how_to(rng, restricted=True)
        prompt = example.prompt
        if split_of(prompt) == split and prompt not in by_prompt:
            by_prompt[prompt] = attack.pair(prompt, example.answer, wanted, seed=seed)
    return PairSet(tuple(by_prompt.values()), attack, f"zoo {name} {split}, seed {seed}")
