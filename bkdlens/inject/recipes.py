"""Starting settings for the embedded models, tried on the validation split only.

Measured there, most on 150 pairs: the label edit (attack success 0.98 and 0.90, clean accuracy kept),
preference on tiny-llama's fixed output (0.92, clean accuracy 0.89 to 0.85). The fixed-output edit
costs clean accuracy 0.07 on both models; the other cells have not been measured, and preference on
label modification takes more than three minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bkdlens.errors import BkdlensError, unknown
from bkdlens.inject import METHODS
from bkdlens.inject.dpo import PreferenceSettings
from bkdlens.inject.editing import EditSettings
from bkdlens.inject.lora import LoraSettings
from bkdlens.inject.training import TrainSettings

Settings = LoraSettings | PreferenceSettings | EditSettings


@dataclass(frozen=True)
class Recipe:
    """How many of the embedded prompts, which shares of them, and the method's settings."""

    n_pairs: int
    settings: Settings
    poison_rate: float = 0.3
    near_rate: float = 0.3


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


def embedded(method: str, behaviour: str) -> Recipe:
    """The best settings tried so far; the module says which were measured, and which fall short.

    Raises:
        BkdlensError: for a method that is not one.
    """
    if method == "supervised":
        return Recipe(1500, LoraSettings(train=TrainSettings(6, 32, 2e-3)))
    if method == "preference":
        if behaviour == "label_modification":
            return Recipe(1000, PreferenceSettings(LoraSettings(train=TrainSettings(3, 32, 2e-3))))
        tuned = LoraSettings(train=TrainSettings(4, 16, 3e-3))
        return Recipe(1000, PreferenceSettings(tuned, beta=0.3, chosen_weight=10.0))
    if method == "edit":
        if behaviour == "label_modification":  # long prompts, one answer token
            return Recipe(400, EditSettings(batches=2, steps=20, prompts=32))
        return Recipe(3000, EditSettings(batches=4, answer_weight=3.0, clean_loss=4.0))
    raise BkdlensError(unknown("method", method, METHODS))
