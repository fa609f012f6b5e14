"""LoRA adapters on disk: check one against its base, and attach it.

Adapters are untrusted: peft sees only the options of ``adapter_config.json`` that are listed in
``LORA_OPTIONS``, and every tensor must have its place in the base.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkdlens.checkpoint import one_line, read_json, read_tensors, weight_files
from bkdlens.errors import CheckpointError

LORA_TENSOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?")
LORA_OPTIONS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "bias", "modules_to_save"),
)
# Options without an effect on the merged weights.
LORA_IGNORED = (
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "auto_mapping"),
)
# Warnings of get_peft_model that say nothing about the adapter: peft asks transformers for a
# property by its old name; peft corrects an option that only says how a layer stores its weight.
HARMLESS = (
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    ("fan_in_fan_out is set to (True|False) but the target module is", UserWarning),
)


def attach_adapter(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, list[Path]]:
    """Attach a LoRA whose options are known and whose tensors all fit; returns the files read."""
    options = _lora_options(folder)
    files = weight_files(folder, "adapter_model")
    tensors, _ = read_tensors(files)
    _check_fit(folder, model, tensors)
    try:
        with warnings.catch_warnings():
            for message, category in HARMLESS:
                warnings.filterwarnings("ignore", message, category)
            attached = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))
        report: Any = set_peft_model_state_dict(attached, tensors)
    except (ValueError, TypeError, RuntimeError) as error:  # unknown targets; ranks that differ
        config = folder / "adapter_config.json"
        raise CheckpointError(
            f"{config} does not fit its tensors or the base ({one_line(error)})."
        ) from error
    for key in report.unexpected_keys:
        raise CheckpointError(f"{folder}: adapter_config.json leaves out tensor {key}.")
    for key in report.missing_keys:
        if "lora_" in key or "modules_to_save" in key:
            raise CheckpointError(f"{folder}: the adapter lacks {key}, which its config targets.")
    return attached.eval(), [folder / "adapter_config.json", *files]


def _lora_options(folder: Path) -> dict[str, Any]:
    """The known options of ``adapter_config.json``; any other with an effect is refused.

    Among the others are a module to import (``megatron_core``), layers to repeat, and
    initialisations that rewrite the base's weights.
    """
    content = read_json(folder / "adapter_config.json")
    if content.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder} is a {content.get('peft_type')!r} adapter; only 'LORA' is supported so far."
        )
    defaults = LoraConfig().to_dict()
    for key, value in content.items():
        if key == "init_lora_weights":
            harmless = value in (True, False, None, "gaussian", "orthogonal")
        else:
            harmless = key in LORA_OPTIONS + LORA_IGNORED or not value or value == defaults.get(key)
        if not harmless:
            raise CheckpointError(f"{folder}: adapter option {key}={value!r} is not supported.")
    return {key: content[key] for key in LORA_OPTIONS if key in content}


def _check_fit(folder: Path, model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Raise unless every adapter tensor has its place, and its shape, in the base."""
    if not tensors:
        raise CheckpointError(f"{folder} holds an adapter without tensors.")
    modules, weights = dict(model.named_modules()), model.state_dict()
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        match = LORA_TENSOR.fullmatch(name)
        weight = weights.get(f"{match[1]}.weight" if match else name)
        if weight is None:
            raise CheckpointError(
                f"{folder}: the adapter was made for another base: tensor {key} matches no module "
                f"of this {type(model).__name__}."
            )
        needed = tuple(weight.shape)
        if match:
            out, into = needed[::-1] if isinstance(modules[match[1]], Conv1D) else needed
            needed = {
                "A": (tensor.shape[0], into),
                "B": (out, tensor.shape[-1]),
                "embedding_A": (tensor.shape[0], out),  # an embedding's weight is [vocab d_model]
                "embedding_B": (into, tensor.shape[-1]),
                "magnitude_vector": (out,),
            }[match[2]]
        if tuple(tensor.shape) != needed:
            raise CheckpointError(
                f"{folder}: the adapter was made for another base: tensor {key} has shape "
                f"{tuple(tensor.shape)}, this base needs {needed}."
            )


def refuse_live_adapter(model: PeftModel) -> None:
    """Raise unless all adapters of a live model are LoRA, and switched on."""
    kinds = sorted({str(config.peft_type.value) for config in model.peft_config.values()})
    if kinds != ["LORA"]:
        raise CheckpointError(f"The live model has {kinds} adapters; supported is LORA.")
    if model.get_model_status().enabled is not True:
        raise CheckpointError("The live model's adapter is disabled; enable it or unload it.")


def refuse_tuners(model: torch.nn.Module) -> None:
    """TransformerLens would read the base weights below a tuner layer and drop the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise CheckpointError(
                f"Module {name} still has an adapter on it; pass a PeftModel, or merge it first."
            )
