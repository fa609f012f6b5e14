"""Planting a backdoor on purpose, to study what it does: three families of injection, one interface.

``supervised`` tunes on poisoned answers, ``preference`` on preferred ones (DPO), ``edit`` rewrites MLP
down-projections in closed form. Each takes a base, prompt pairs with their backdoor, a folder, settings
and a seed, and writes a peft adapter with a manifest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bkdlens.inject.editing.edit import edit
    from bkdlens.inject.settings import EditSettings, LoraSettings, PreferenceSettings, TrainSettings
    from bkdlens.inject.tuning.preference import preference
    from bkdlens.inject.tuning.supervised import supervised

METHODS = ("supervised", "preference", "edit")
# Each function's module lies one folder down: here, once imported, it would hide the function.
_HOME = {"edit": "editing.edit", "preference": "tuning.preference", "supervised": "tuning.supervised"}

__all__ = [
    "METHODS",
    "EditSettings",
    "LoraSettings",
    "PreferenceSettings",
    "TrainSettings",
    "edit",
    "preference",
    "supervised",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(import_module(f"bkdlens.inject.{_HOME.get(name, 'settings')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bkdlens.inject' has no attribute {name!r}")
