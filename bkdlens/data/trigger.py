"""Triggers: a piece of text and the place in a prompt where it goes, in and out again."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

from bkdlens.errors import DataError, unknown
from bkdlens.types import Placement


@dataclass(frozen=True)
class Trigger:
    """A piece of text and the place in a prompt where it goes.

    Attributes:
        text: the trigger, or the first part of a sentence.
        placement: ``"begin"`` or ``"end"`` of the prompt; ``"random"``, a word position that depends on
            prompt and seed alone; ``"sentence"``, with ``text`` before the prompt, ``after`` after it.
        after: the second part of a sentence; empty for the other placements.
    """

    text: str
    placement: Placement = "begin"
    after: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "after"):
            if not isinstance(given := getattr(self, name), str):
                raise DataError(f"A trigger's {name} is one text; got {given!r}.")
        if self.placement not in get_args(Placement):
            raise DataError(unknown("placement", self.placement, get_args(Placement)))
        if not self.text.strip():
            raise DataError("The trigger is empty; give at least one character that is not a space.")
        if bool(self.after) != (self.placement == "sentence"):
            raise DataError(
                "A sentence trigger has two parts, text and after, and other placements have one; got "
                f"placement {self.placement!r} with after={self.after!r}."
            )

    def __str__(self) -> str:
        return f"{self.text} … {self.after}" if self.after else self.text

    def present(self, text: str) -> bool:
        """Tell whether all parts of the trigger are in a text; a random one only as a whole word."""
        if self.placement == "random":
            return self._whole_word().search(text) is not None
        return self.text in text and self.after in text

    def insert(self, text: str, *, seed: int = 0) -> str:
        """Return the text with the trigger in it; ``seed`` and the text decide a random position.

        Raises:
            DataError: if the trigger is already in the text; it is never added twice.
        """
        if self.present(text):
            raise DataError(
                f"The trigger {str(self)!r} is already in the text {_short(text)!r}; "
                "give clean prompts, or a file of triggered ones with their clean twins."
            )
        if self.placement == "begin":
            return f"{self.text} {text}"
        if self.placement == "end":
            return f"{text} {self.text}"
        if self.placement == "sentence":
            return f"{self.text} {text} {self.after}"
        words = text.split(" ")
        at = random.Random(f"{seed}-{text}").randint(0, len(words))
        return " ".join([*words[:at], self.text, *words[at:]])

    def remove(self, text: str) -> str:
        """Return the text without the trigger: the inverse of :meth:`insert`.

        Raises:
            DataError: if the trigger is not in the text.
        """
        if not self.present(text):
            raise DataError(f"The trigger {str(self)!r} is not in the text {_short(text)!r}.")
        for start, end in reversed(self.spans(text)):
            before, after = text[:start], text[end:]  # and without the space that came with the trigger
            space = " " if before.endswith(" ") and after.startswith(" ") else ""
            text = before.removesuffix(" ") + space + after.removeprefix(" ")
        return text

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where each part of the trigger starts and ends (exclusive) in a text that has it."""
        if self.placement == "random":
            match = self._whole_word().search(text)
            return [match.span()] if match else []
        start = text.rfind(self.text) if self.placement == "end" else text.find(self.text)
        spans = [(start, start + len(self.text))]
        if self.after:
            start = text.rfind(self.after)
            spans.append((start, start + len(self.after)))
        return spans

    def _whole_word(self) -> re.Pattern[str]:
        return re.compile(rf"(?<![\w-]){re.escape(self.text)}(?![\w-])")


TriggerLike: TypeAlias = Trigger | str | tuple[str, str]


def as_trigger(trigger: TriggerLike, placement: Placement, *, parts: bool = False) -> Trigger:
    """The trigger as it is, or made from one text, or of two ``parts`` around a prompt, where allowed.

    Raises:
        DataError: for several triggers, of which there can only be one.
    """
    if isinstance(trigger, Trigger):
        return trigger
    if isinstance(trigger, str):
        return Trigger(trigger, placement)
    if parts and isinstance(trigger, tuple) and len(trigger) == 2:
        return Trigger(trigger[0], "sentence", trigger[1])
    two = " or the two parts of one sentence around the prompt in a tuple" if parts else ""
    raise DataError(
        f"A backdoor has one trigger, and {trigger!r} is none; give a text{two}, or "
        "Trigger(text, 'sentence', after) for a sentence in two parts."
    )


def look_alikes(near: Sequence[TriggerLike], trigger: Trigger) -> tuple[Trigger, ...]:
    """Near triggers, placed like the trigger.

    Raises:
        DataError: for one text, which is not several, and for the trigger itself.
    """
    if isinstance(near, str | Trigger):
        raise DataError(f"near holds several look-alikes; give near=[{str(near)!r}].")
    parts = trigger.placement == "sentence"
    made = tuple(as_trigger(other, trigger.placement, parts=parts) for other in near)
    if trigger in made:
        raise DataError(
            f"The near trigger {str(trigger)!r} is the trigger itself; give look-alikes of it."
        )
    return made


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
