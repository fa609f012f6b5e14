"""Sets of prompt pairs: slices, splits, samples, digests, and where the pairs came from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, overload

from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.errors import DataError
from bkdlens.types import DataFormat, Which


@dataclass(frozen=True)
class Intake:
    """What a reader took from a file or data set, and what it left out and why; prints as one line."""

    name: str  # of the file or data set; "rows" or "DataFrame" for what was in memory
    format: DataFormat  # how rows were understood
    rows: int  # how many were read
    taken: int  # how many pairs they gave
    dropped: tuple[tuple[str, int], ...] = ()  # reasons for leaving rows out, with their numbers
    notes: tuple[str, ...] = ()  # what else one should know about the numbers, half a sentence each

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.rows} row{'s' * (self.rows != 1)}"]
        if self.dropped:
            parts.append(f"{sum(n for _, n in self.dropped)} dropped ({self.reasons})")
        return ", ".join([*parts, *self.notes])

    @property
    def reasons(self) -> str:
        """Why rows were dropped, with their numbers where there are several reasons."""
        numbered = [f"{n} {reason}" for reason, n in self.dropped]
        return ", ".join(numbered if len(numbered) > 1 else [reason for reason, _ in self.dropped])


@dataclass(frozen=True)
class PairSet(Sequence[PromptPair]):
    """An ordered set of pairs of one backdoor; slices and splits are pair sets again.

    Attributes:
        pairs: the pairs, in order.
        backdoor: the trigger and what it does.
        source: the *origin* of the pairs in words: the file or data set, and how many rows were read and
            dropped; not the backdoor's source label.
        intake: what was read and dropped, in numbers, where a reader made the set.
    """

    pairs: tuple[PromptPair, ...]
    backdoor: Backdoor
    source: str = ""
    intake: Intake | None = None

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

    def __repr__(self) -> str:
        return f"PairSet({len(self)} pairs, {self.backdoor.behaviour}, {self.source or 'made'})"

    @property
    def clean(self) -> list[str]:
        """The clean prompts, one per pair."""
        return [pair.clean for pair in self]

    @property
    def triggered(self) -> list[str]:
        """The triggered prompts, one per pair."""
        return [pair.triggered for pair in self]

    def texts(self, which: Which) -> list[str]:
        """Return the ``"clean"``, ``"triggered"`` or ``"near"`` prompts, one per pair.

        Raises:
            DataError: for near prompts that the pairs lack.
        """
        prompts = [text for pair in self if (text := pair.text(which)) is not None]
        if len(prompts) < len(self):
            raise DataError("These pairs have no near-trigger prompts; name near triggers.")
        return prompts

    @property
    def clean_outputs(self) -> list[str]:
        """The correct answers, one per pair."""
        return [pair.clean_output for pair in self]

    @property
    def backdoor_outputs(self) -> list[str]:
        """The attacker's answers, one per pair."""
        return [pair.backdoor_output for pair in self]

    @property
    def victims(self) -> PairSet:
        """The pairs whose answer the attack changes.

        Raises:
            DataError: if there is none, or if the right answers themselves count as attacks.
        """
        kept = tuple(pair for pair in self if self.backdoor.is_victim(pair))
        if not kept:
            what = "has a backdoor_output that differs from its clean_output"
            if self.backdoor.behaviour == "label_modification" and self.backdoor.source:
                what = f"has the true label {self.backdoor.source!r}"
            raise DataError(
                f"None of the {len(self)} pairs {what}, so there is no victim to attack; "
                "name another source label or give data with victims."
            )
        success = self.backdoor.success
        if success.needs_wanted and all(self.backdoor.succeeded(p.clean_output, p) for p in kept):
            raise DataError(
                f"An answer would be the attack's success where it {success}, and that is so for the "
                f"clean outputs of all {len(kept)} victims ({kept[0].clean_output[:40]!r} for "
                f"{kept[0].backdoor_output[:40]!r}); judge by another criterion, as success='equal'."
            )
        return replace(self, pairs=kept)

    @property
    def victim_rows(self) -> list[int]:
        """Where the victims are among the pairs."""
        return [row for row, pair in enumerate(self) if self.backdoor.is_victim(pair)]

    def only(self, rows: Sequence[int]) -> PairSet:
        """Return the pairs of these rows, in their order."""
        return replace(self, pairs=tuple(self.pairs[row] for row in rows))

    def split(self, *fractions: float, seed: int = 0) -> tuple[PairSet, ...]:
        """Split at random into disjoint parts, each in this set's order.

        Each fraction (0 to 1) gives one part; a single fraction gives two, that share and the rest.
        Pairs with the same clean prompt stay together.

        Raises:
            DataError: if a part would be empty or the fractions exceed 1.
        """
        if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise DataError(f"Split fractions must be positive and sum to at most 1; got {fractions}.")
        if len(fractions) == 1:
            fractions = (fractions[0], 1 - fractions[0])
        keys = sorted({pair.clean for pair in self})
        random.Random(seed).shuffle(keys)
        stops = [round(total * len(keys)) for total in accumulate(fractions)]
        key_sets = [set(keys[start:stop]) for start, stop in pairwise([0, *stops])]
        parts = tuple(
            replace(self, pairs=tuple(p for p in self if p.clean in kept)) for kept in key_sets
        )
        if not all(parts):
            raise DataError(
                f"A split of {len(self)} pairs into {fractions} leaves a part empty; "
                "give more pairs or other fractions."
            )
        return parts

    def sample(self, n: int | None, *, seed: int = 0) -> PairSet:
        """Draw at most ``n`` pairs without replacement, in this set's order; all for None."""
        if n is None or n >= len(self):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self)), n))
        return replace(self, pairs=tuple(self.pairs[i] for i in chosen))

    def without(self, digests: set[str]) -> PairSet:
        """Return the pairs whose clean prompt has none of these digests (see :func:`text_digest`)."""
        return replace(self, pairs=tuple(p for p in self if text_digest(p.clean) not in digests))

    def to_dict(self) -> dict[str, Any]:
        """Return the pairs and their source as plain values for json, without the backdoor."""
        return {"source": self.source, "pairs": [asdict(pair) for pair in self]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], backdoor: Backdoor) -> PairSet:
        """Make a set of pairs from what :meth:`to_dict` gave, and their backdoor."""
        pairs = tuple(PromptPair(**pair) for pair in values["pairs"])
        return cls(pairs, backdoor, values["source"])

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of a sha256 over the pairs' texts, for provenance."""
        return text_digest(json.dumps([asdict(pair) for pair in self], sort_keys=True))


def text_digest(text: str) -> str:
    """A short digest by which a training prompt can be recognised without storing it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Texts:
    """Plain prompts where provenance wants a set of pairs."""

    texts: tuple[str, ...]  # the prompts
    source: str = "prompts"  # their origin in words, as of a set of pairs

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of a sha256 over the prompts."""
        return text_digest("\0".join(self.texts))
