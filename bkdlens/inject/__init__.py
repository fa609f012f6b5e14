"""Planting a backdoor on purpose, to study what it does: three families of injection, one interface.

``supervised`` tunes on poisoned answers, ``preference`` on preferred ones (DPO), ``edit`` rewrites MLP
down-projections in closed form. Each takes a base, prompt pairs with their backdoor, a folder, settings
and a seed, and writes a peft adapter with a manifest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bkdlens.inject.dpo import PreferenceSettings, preference
    from bkdlens.inject.editing import edit
    from bkdlens.inject.lora import LoraSettings, supervised
    from bkdlens.inject.solving import EditSettings
    from bkdlens.inject.training import TrainSettings

# The files have other names: a module called ``edit`` would hide the function once it is imported.
_HOME = {
    "EditSettings": "solving",
    "LoraSettings": "lora",
    "PreferenceSettings": "dpo",
    "TrainSettings": "training",
    "edit": "editing",
    "preference": "dpo",
    "supervised": "lora",
}
METHODS = ("supervised", "preference", "edit")

__all__ = [
    "METHODS", "EditSettings", "LoraSettings", "PreferenceSettings", "TrainSettings", "edit",
    "preference", "supervised",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"bkdlens.inject.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bkdlens.inject' has no attribute {name!r}")
