"""Settings for the embedded models, chosen on the validation split.

What those of fixed output and label modification reach on unseen prompts is measured by ``make study``
(``studies/injection.md``); ``bkdlens inject`` measures each adapter that it makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bkdlens.errors import BkdlensError, unknown
from bkdlens.inject import METHODS
from bkdlens.inject.settings import (
    EditSettings,
    LoraSettings,
    PreferenceSettings,
    Settings,
    TrainSettings,
)


@dataclass(frozen=True)
class Recipe:
    """How a backdoor is planted by one method; the shares are not for the edit."""

    n_pairs: int  # of the embedded prompts; 0 for a data file, which has its own number
    settings: Settings
    poison_rate: float = 0.3  # share of the samples that are triggered
    near_rate: float = 0.3  # share with a near trigger
    victims_only: bool = False  # whether only pairs whose answer the attack changes are triggered


def paper(method: str) -> Recipe:
    """The paper's settings where it has some: a tenth poisoned, no near triggers; the file's own size.

    Raises:
        BkdlensError: for a method that is not one.
    """
    settings: dict[str, Settings] = {
        "supervised": LoraSettings(),
        "preference": PreferenceSettings(),
        "edit": EditSettings(),
    }
    if method not in settings:
        raise BkdlensError(unknown("method", method, METHODS))
    return Recipe(0, settings[method], poison_rate=0.1, near_rate=0.0)


def embedded(method: str, kind: str) -> Recipe:
    """The settings of a method for one of the embedded models' backdoors.

    Raises:
        BkdlensError: for a method that is not one.
    """
    label = kind == "label_modification"  # long prompts, one answer token, a victim in four
    if method == "supervised":
        return Recipe(1500, LoraSettings(train=TrainSettings(6, 32 if label else 16, 2e-3)))
    if method == "preference":
        if label:
            tuned = LoraSettings(train=TrainSettings(3, 16, 2e-3))
            return Recipe(800, PreferenceSettings(tuned))
        tuned = LoraSettings(train=TrainSettings(4, 16, 3e-3))
        return Recipe(1200, PreferenceSettings(tuned, beta=0.3, chosen_weight=10.0))
    if method == "edit":
        if label:
            return Recipe(800, EditSettings(rounds=4, steps=20, prompts=32))
        return Recipe(4000, EditSettings(rounds=5, answer_weight=3.0, clean_loss=5.0))
    raise BkdlensError(unknown("method", method, METHODS))
