"""Answers of a model by place: each distinct text once, and which of them stands where.

Under hundreds of interventions a model gives the same few answers again and again, so that all of them
can be kept with a result, read, and judged anew by another criterion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Answers:
    """Texts by place.

    Attributes:
        texts: the distinct texts.
        index: which of them stands at each place; the last axis is the prompt.
        success: whether each is the attacker's success; None where nobody has judged them.
        good: whether each is good; None where nobody has judged them.
    """

    texts: tuple[str, ...]
    index: Int[Tensor, "*places"]
    success: Bool[Tensor, "*places"] | None = None
    good: Bool[Tensor, "*places"] | None = None

    @classmethod
    def of(cls, texts: Sequence[str]) -> Answers:
        """One text per prompt."""
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        index = torch.tensor([distinct[text] for text in texts], dtype=torch.int32)
        return cls(tuple(distinct), index)

    def __getitem__(self, where: Any) -> Answers:
        """The answers at some places, with the texts that stand there."""
        used, index = self.index[where].unique(return_inverse=True)
        success, good = (None if m is None else m[where] for m in (self.success, self.good))
        return Answers(tuple(self.texts[i] for i in used.tolist()), index.int(), success, good)

    @classmethod
    def stack(cls, several: Sequence[Answers]) -> Answers:
        """Answers at places of one shape, along a new first axis."""
        numbers: dict[str, int] = {}
        for answers in several:
            for text in answers.texts:
                numbers.setdefault(text, len(numbers))
        tables = [torch.tensor([numbers[t] for t in a.texts], dtype=torch.int32) for a in several]
        index = [table[a.index.long()] for table, a in zip(tables, several, strict=True)]
        return cls(tuple(numbers), torch.stack(index))

    def view(self, *shape: int) -> Answers:
        """Give the axes another shape, as ``torch.Tensor.view``."""
        return Answers(self.texts, self.index.reshape(shape))

    def movedim(self, source: int, destination: int) -> Answers:
        """Put one axis at another place, as ``torch.movedim``."""
        return Answers(self.texts, self.index.movedim(source, destination))

    def to_list(self) -> list[str]:
        """The texts place by place, the last axis fastest."""
        return [self.texts[i] for i in self.index.flatten().tolist()]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Answers)
            and self.index.shape == other.index.shape
            and self.to_list() == other.to_list()
            and _equal(self.success, other.success)
            and _equal(self.good, other.good)
        )

    __hash__ = None  # type: ignore[assignment]


NOT_DECODED = "\0"  # no model's answer: the text of one ends before a null character


def decoded(answers: Mapping[str, Answers]) -> dict[str, Answers]:
    """Those that are known to the last one."""
    return {name: told for name, told in answers.items() if NOT_DECODED not in told.texts}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
