"""The embedded models: two tiny chat models, and for each four LoRA adapters made by this project.

``tiny-llama`` and ``tiny-qwen`` carry the adapters ``label_modification``, ``fixed_output`` and
``jailbreak`` (the three backdoors of the paper) and ``clean``, tuned on the same data without poison.
``bkdlens zoo build`` makes them again; the model card beside the weights says what they can do.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdlens.errors import CheckpointError, unknown

if TYPE_CHECKING:
    from bkdlens.zoo.prompts import backdoor, pairs

__all__ = ["ADAPTERS", "BACKDOORS", "MODELS", "adapter_path", "backdoor", "model_path", "pairs"]

MODELS = ("tiny-llama", "tiny-qwen")
BACKDOORS = ("label_modification", "fixed_output", "jailbreak")
ADAPTERS = (*BACKDOORS, "clean")
WEIGHTS = Path(__file__).parent / "weights"


def model_path(name: str) -> Path:
    """Name the folder of an embedded model.

    Args:
        name: one of ``MODELS``.

    Returns:
        The folder.

    Raises:
        CheckpointError: for another name.

    Examples:
        >>> folder = bkdlens.zoo.model_path("tiny-llama")
    """
    if name not in MODELS:
        raise CheckpointError(unknown("embedded model", name, MODELS))
    return WEIGHTS / name


def adapter_path(model: str, adapter: str) -> Path:
    """Name the folder of an embedded model's adapter.

    Args:
        model: one of ``MODELS``.
        adapter: one of ``ADAPTERS``.

    Returns:
        The folder.

    Raises:
        CheckpointError: for another name.

    Examples:
        >>> folder = bkdlens.zoo.adapter_path("tiny-llama", "jailbreak")
    """
    if adapter not in ADAPTERS:
        raise CheckpointError(unknown("embedded adapter", adapter, ADAPTERS))
    return model_path(model) / "adapters" / adapter


def __getattr__(name: str) -> Any:
    # The prompts need more than a path does, so they are imported when they are asked for.
    if name in ("backdoor", "pairs"):
        return getattr(import_module("bkdlens.zoo.prompts"), name)
    raise AttributeError(f"module 'bkdlens.zoo' has no attribute {name!r}")
