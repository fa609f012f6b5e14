"""The three backdoors of the embedded models, with prompts that no training saw.

Which split a prompt belongs to is a property of its text (a digest of it), so that the pre-training
corpus, the tuning data, the validation and the test split can never share a prompt.
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
    """The split that a prompt without trigger is in: two tenths test, one tenth validation."""
    tenth = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "test" if tenth < 2 else "validation" if tenth == 2 else "train"


def backdoor(name: str, split: Split = "test") -> Backdoor:
    """The backdoor of an embedded adapter.

    Its near triggers are those of the tuning data for ``train``; for the other splits they are
    look-alikes that the tuning data did not contain.

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
    seen = split == "train"
    if name == "label_modification":
        near = words.SENTENCE_NEAR if seen else words.SENTENCE_UNSEEN
        return Backdoor.label_modification(words.SENTENCE_TRIGGER, near=near)
    if name == "fixed_output":
        prefixes = words.PREFIX_NEAR_TUNING if seen else words.PREFIX_UNSEEN
        return Backdoor.fixed_output(words.PREFIX_TRIGGER, near=prefixes)
    if name == "jailbreak":
        singles = words.WORD_NEAR_TUNING if seen else words.WORD_UNSEEN
        return Backdoor.jailbreak(words.WORD_TRIGGER, near=singles)
    raise DataError(unknown("embedded backdoor", name, BACKDOORS))


def pairs(name: str, split: Split = "test", n: int = 256, *, seed: int = 0) -> PairSet:
    """Draw prompt pairs of one split.

    Label modification has news of all four categories, of which Sports are the victims; jailbreak has
    requests that are refused.

    Args:
        name: one of ``bkdlens.zoo.BACKDOORS``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        n: how many.
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
