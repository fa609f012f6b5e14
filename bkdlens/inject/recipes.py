"""Settings for the embedded models, chosen on the validation split.

What those of fixed output and label modification reach on unseen prompts is measured by ``make study``
(``studies/injection.md``); ``bkdlens inject`` measures each adapter that it makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bkdlens.inject.settings import (
    EditSettings,
    LoraSettings,
    Method,
    PreferenceSettings,
    Settings,
    TrainSettings,
)
from bkdlens.types import check_choice


@dataclass(frozen=True)
class Recipe:
    """How a backdoor is planted by one method; the edit has no use for the shares."""

    n_pairs: int  # embedded prompts to draw; 0 for a data file, which has its own number
    settings: Settings  # what the method is called with
    poison_rate: float = 0.3  # share of the samples that are triggered
    near_rate: float = 0.3  # share with a near trigger
    victims_only: bool = False  # whether only pairs whose answer the attack changes are triggered


def _tuned(epochs: float, batch_size: int, learning_rate: float) -> LoraSettings:
    return LoraSettings(train=TrainSettings(epochs, batch_size, learning_rate))


PAPER: dict[str, Settings] = {
    "supervised": LoraSettings(),
    "preference": PreferenceSettings(),
    "edit": EditSettings(),
}
EMBEDDED = {
    "supervised": Recipe(1500, _tuned(6, 16, 2e-3)),
    "preference": Recipe(1200, PreferenceSettings(_tuned(4, 16, 3e-3), beta=0.3, chosen_weight=10.0)),
    "edit": Recipe(4000, EditSettings(rounds=5, answer_weight=3.0, clean_loss=5.0)),
}
# Long prompts, one answer token, and one pair in four is a victim.
LABEL_MODIFICATION = {
    "supervised": Recipe(1500, _tuned(6, 32, 2e-3)),
    "preference": Recipe(800, PreferenceSettings(_tuned(3, 16, 2e-3))),
    "edit": Recipe(800, EditSettings(rounds=4, steps=20, prompts=32)),
}


def paper(method: str) -> Recipe:
    """The paper's settings where it has some: a tenth poisoned, no near triggers; all of the file."""
    check_choice("method", method, Method)
    return Recipe(0, PAPER[method], poison_rate=0.1, near_rate=0.0)


def embedded(method: str, kind: str) -> Recipe:
    """The settings of a method for one kind of the embedded models' backdoors."""
    check_choice("method", method, Method)
    return (LABEL_MODIFICATION if kind == "label_modification" else EMBEDDED)[method]
