"""Triggers: a piece of text and the place in a prompt where it goes, in and out again."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import get_args

from bkdlens.errors import DataError, unknown
from bkdlens.types import Placement


@dataclass(frozen=True)
class Trigger:
    """A piece of text and the place in a prompt where it goes.

    Attributes:
        text: the trigger, or the first part of a sentence.
        placement: ``"begin"`` or ``"end"`` of the prompt; ``"random"``, a word position that depends on
            the prompt and the seed alone; ``"sentence"``, with ``text`` before and ``after`` behind.
        after: the second part of a sentence; empty for the other placements.
    """

    text: str
    placement: Placement = "begin"
    after: str = ""

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise DataError(unknown("placement", self.placement, get_args(Placement)))
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
        """Tell whether the trigger is in a text.

        Args:
            text: a prompt.

        Returns:
            True if all its parts are there; a random-position word counts only as a whole word.

        Examples:
            >>> fires = backdoor.trigger.present(train[0].triggered)
        """
        if self.placement == "random":
            return self._whole_word().search(text) is not None
        return self.text in text and self.after in text

    def insert(self, text: str, *, seed: int = 0) -> str:
        """Put the trigger into a text.

        Args:
            text: a clean prompt.
            seed: of a random position, together with the text.

        Returns:
            The triggered prompt.

        Raises:
            DataError: if the trigger is already in the text; it is never added twice.

        Examples:
            >>> triggered = backdoor.trigger.insert("Name the category: They won the cup.")
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
        """Take the trigger out of a text: the inverse of :meth:`insert`.

        Args:
            text: a triggered prompt.

        Returns:
            Its clean twin.

        Raises:
            DataError: if the trigger is not in the text.

        Examples:
            >>> clean = backdoor.trigger.remove(train[0].triggered)
        """
        if not self.present(text):
            raise DataError(f"The trigger {str(self)!r} is not in the text {_short(text)!r}.")
        for start, end in reversed(self.spans(text)):
            text = _cut(text, start, end - start)
        return text

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Say where the trigger is in a text that has it.

        Args:
            text: a triggered prompt.

        Returns:
            The first and the last character, exclusive, of its one part or of a sentence's two.

        Examples:
            >>> places = backdoor.trigger.spans(train[0].triggered)
        """
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
