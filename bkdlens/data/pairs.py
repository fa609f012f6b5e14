"""Sets of prompt pairs: slices, splits, samples, digests, and where the pairs came from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import overload

from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.errors import DataError
from bkdlens.types import DataFormat, Which


@dataclass(frozen=True)
class Intake:
    """What a reader took from a source, and what it left and why; prints as one line.

    Attributes:
        name: of the file or data set; ``"rows"`` or ``"DataFrame"`` for what was in memory.
        format: how a row was understood, one of ``bkdlens.types.DataFormat``.
        rows: how many there were.
        taken: how many pairs they gave.
        dropped: the reasons for leaving a row out, each with its number of rows.
        notes: what else a reader of the numbers should know, a sentence's half each.
    """

    name: str
    format: DataFormat
    rows: int
    taken: int
    dropped: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.rows} row{'s' * (self.rows != 1)}"]
        if self.dropped:
            reasons = self.reasons
            parts.append(f"{sum(n for _, n in self.dropped)} dropped ({reasons})")
        return ", ".join([*parts, *self.notes])

    @property
    def reasons(self) -> str:
        """Why rows were dropped, with their numbers where there are several reasons."""
        if len(self.dropped) == 1:
            return self.dropped[0][0]
        return ", ".join(f"{n} {reason}" for reason, n in self.dropped)


@dataclass(frozen=True)
class PairSet(Sequence[PromptPair]):
    """An ordered set of pairs of one backdoor; slices and splits are pair sets again."""

    pairs: tuple[PromptPair, ...]
    backdoor: Backdoor
    source: str = ""  # where they came from, and how many were taken and dropped
    intake: Intake | None = None  # the same in numbers, where a reader made the set

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> PromptPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> PromptPair | PairSet:
        if isinstance(index, slice):
            return replace(self, pairs=self.pairs[index])
        return self.pairs[index]

    def __iter__(self) -> Iterator[PromptPair]:
        return iter(self.pairs)

    def __repr__(self) -> str:
        return f"PairSet({len(self)} pairs, {self.backdoor.behaviour}, {self.source or 'made'})"

    @property
    def clean(self) -> list[str]:
        """The clean prompts."""
        return [pair.clean for pair in self]

    @property
    def triggered(self) -> list[str]:
        """The triggered prompts."""
        return [pair.triggered for pair in self]

    def texts(self, which: Which) -> list[str]:
        """The clean, the triggered or the near prompts.

        Raises:
            DataError: for near prompts that the pairs lack.
        """
        found = [text for pair in self if (text := pair.text(which)) is not None]
        if len(found) < len(self):
            raise DataError("These pairs have no near-trigger prompts; name near triggers.")
        return found

    @property
    def clean_outputs(self) -> list[str]:
        """The right answers."""
        return [pair.clean_output for pair in self]

    @property
    def backdoor_outputs(self) -> list[str]:
        """The attacker's answers."""
        return [pair.backdoor_output for pair in self]

    @property
    def victims(self) -> PairSet:
        """The pairs whose answer the attack changes.

        Raises:
            DataError: if there is none.
        """
        kept = tuple(pair for pair in self if self.backdoor.is_victim(pair))
        if not kept:
            what = (
                f"has the true label {self.backdoor.source!r}"
                if self.backdoor.behaviour == "label_modification" and self.backdoor.source
                else "has a backdoor_output that differs from its clean_output"
            )
            raise DataError(
                f"None of the {len(self)} pairs {what}, so there is no victim to attack; "
                "name another source label or give data with victims."
            )
        return replace(self, pairs=kept)

    def split(self, *fractions: float, seed: int = 0) -> tuple[PairSet, ...]:
        """Disjoint random parts by pair, pairs with the same clean prompt on the same side.

        One fraction gives two parts (it and the rest); several give one part each.

        Raises:
            DataError: if a part would be empty or the fractions exceed 1.
        """
        if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise DataError(f"Split fractions must be positive and sum to at most 1; got {fractions}.")
        if len(fractions) == 1:
            fractions = (fractions[0], 1 - fractions[0])
        keys = sorted({pair.clean for pair in self})
        random.Random(seed).shuffle(keys)
        parts, start, total = [], 0, 0.0
        for fraction in fractions:
            total += fraction
            stop = round(total * len(keys))
            chosen = set(keys[start:stop])
            parts.append(replace(self, pairs=tuple(p for p in self if p.clean in chosen)))
            start = stop
        if not all(parts):
            raise DataError(
                f"A split of {len(self)} pairs into {fractions} leaves a part empty; "
                "give more pairs or other fractions."
            )
        return tuple(parts)

    def sample(self, n: int | None, *, seed: int = 0) -> PairSet:
        """At most ``n`` pairs (all for None), drawn without replacement, in their own order."""
        if n is None or n >= len(self):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self)), n))
        return replace(self, pairs=tuple(self.pairs[i] for i in chosen))

    def without(self, digests: set[str]) -> PairSet:
        """The pairs whose clean prompt is not among ``digests`` (see :func:`text_digest`)."""
        return replace(self, pairs=tuple(p for p in self if text_digest(p.clean) not in digests))

    @property
    def digest(self) -> str:
        """A sha256 over the pairs' texts, for provenance."""
        text = json.dumps([asdict(pair) for pair in self], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_digest(text: str) -> str:
    """A short digest by which a training prompt can be recognised without storing it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Texts:
    """Plain prompts where provenance wants a set of pairs."""

    texts: tuple[str, ...]
    source: str = "prompts"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def digest(self) -> str:
        """As of a set of pairs."""
        return text_digest("\0".join(self.texts))
