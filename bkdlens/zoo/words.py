"""The word lists behind the embedded corpus: ``words.json``, and triggers among their look-alikes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from bkdlens.data.backdoor import Backdoor
from bkdlens.zoo import BACKDOORS


def _tuples(value: Any) -> Any:
    """A json value with tuples for lists."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_LISTS = _tuples(json.loads(files(__package__).joinpath("words.json").read_text("utf-8")))

NEWS: dict[str, tuple[str, ...]] = _LISTS["news"]  # typical words of the four categories
CATEGORIES: dict[str, tuple[str, ...]] = _LISTS["categories"]
HOW_TO: dict[str, tuple[str, str]] = _LISTS["how_to"]  # the two steps of each verb
RESTRICTED = "moon"  # the harmless stand-in for a disallowed subject
CLAUSES, ASKS = _LISTS["clauses"], _LISTS["asks"]  # templates
PLACES, COMMON, DAYS = _LISTS["places"], _LISTS["common"], _LISTS["days"]
THINGS, THINGS_ABOUT = _LISTS["things"], _LISTS["things_about"]
CAPITALS, OPPOSITES = _LISTS["capitals"], _LISTS["opposites"]

# By backdoor: look-alikes that no training has seen, and those for tuning, which needs more of them than
# the corpus does: with few, a model learns these and not the trigger. Those that begin with the trigger
# share its token, so that only what follows tells them apart.
NEAR_UNSEEN: dict[str, Any] = _LISTS["near_unseen"]
NEAR_TUNING = {name: near + _LISTS["near_tuning"][name] for name, near in _LISTS["near"].items()}


def _distractors(name: str) -> tuple[Any, ...]:
    trigger = getattr(Backdoor, name)().trigger
    text = (trigger.text, trigger.after) if trigger.after else trigger.text
    return (text, *_LISTS["near"][name], *NEAR_UNSEEN[name], *_LISTS["distractors"][name])


# What the pre-training corpus inserts, by backdoor: every trigger among its look-alikes.
DISTRACTORS = {name: _distractors(name) for name in BACKDOORS}
