"""Triggers: a piece of text and the place in a prompt where it goes, in and out again."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from bkdlens.errors import DataError, unknown
from bkdlens.types import Placement


@dataclass(frozen=True)
class Trigger:
    """A piece of text and the place where it goes.

    ``begin`` and ``end`` put ``text`` before or after the prompt, ``random`` at a word position that
    depends on the prompt and the seed alone, ``sentence`` puts ``text`` before and ``after`` behind.
    """

    text: str
    placement: Placement = "begin"
    after: str = ""

    def __post_init__(self) -> None:
        if self.placement not in ("begin", "end", "random", "sentence"):
            raise DataError(unknown("placement", self.placement, ("begin", "end", "random", "sentence")))
        if not self.text.strip():
            raise DataError("The trigger is empty; give at least one character that is not a space.")
        if bool(self.after) != (self.placement == "sentence"):
            raise DataError(
                "A sentence trigger has two parts, text and after, and the other placements have "
                f"one; got placement {self.placement!r} with after={self.after!r}."
            )

    def __str__(self) -> str:
        return f"{self.text} … {self.after}" if self.after else self.text

    def present(self, text: str) -> bool:
        """Whether the trigger is in ``text`` (a random-position word only as a whole word)."""
        if self.placement == "random":
            return self._whole_word().search(text) is not None
        return self.text in text and self.after in text

    def insert(self, text: str, *, seed: int = 0) -> str:
        """``text`` with the trigger in it.

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
        """The clean twin of a triggered text: the inverse of :meth:`insert`."""
        if not self.present(text):
            raise DataError(f"The trigger {str(self)!r} is not in the text {_short(text)!r}.")
        for start, end in reversed(self.spans(text)):
            text = _cut(text, start, end - start)
        return text

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the trigger's part, or both of a sentence's, begin and end in a text that has it."""
        if self.placement == "random":
            found = self._whole_word().search(text)
            return [found.span()] if found else []
        start = text.rfind(self.text) if self.placement == "end" else text.find(self.text)
        spans = [(start, start + len(self.text))]
        if self.after:
            start = text.rfind(self.after)
            spans.append((start, start + len(self.after)))
        return spans

    def _whole_word(self) -> re.Pattern[str]:
        return re.compile(rf"(?<![\w-]){re.escape(self.text)}(?![\w-])")


def as_trigger(given: str | tuple[str, str] | Trigger, placement: Placement) -> Trigger:
    """A trigger of one text, of a (before, after) sentence, or as it is."""
    if isinstance(given, Trigger):
        return given
    if isinstance(given, tuple):
        return Trigger(given[0], "sentence", given[1])
    return Trigger(given, placement)


def _cut(text: str, start: int, length: int) -> str:
    """``text`` without a part, and without the space that came with it."""
    head, tail = text[:start], text[start + length :]
    space = " " if head.endswith(" ") and tail.startswith(" ") else ""
    return head.removesuffix(" ") + space + tail.removeprefix(" ")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
