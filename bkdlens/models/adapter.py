"""LoRA adapters on disk: check one against its base, and attach it.

Adapters are untrusted: peft sees only the options of ``adapter_config.json`` that are listed in
``LORA_OPTIONS``, and every tensor must have its place in the base.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkdlens.errors import CheckpointError
from bkdlens.models.checkpoint import one_line, read_json, read_tensors, refuse_infinite, weight_files

LORA_TENSOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?")
TOKENS_TENSOR = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
# A whole tensor of the base: the one that replaces it, or (base_layer, original_module) below a tuner.
WHOLE_TENSOR = re.compile(
    r"(.+?)(\.token_adapter)?(\.base_layer|\.original_module|\.modules_to_save)?\.(weight|bias)"
)
LORA_OPTIONS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
)
# Options without an effect on the merged weights.
LORA_IGNORED = (
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "auto_mapping", "quantization_config"),
)
# Warnings of get_peft_model that say nothing about the adapter: peft asks transformers for a
# property by its old name; peft corrects an option that only says how a layer stores its weight;
# what it says of tied embeddings is true, and so they are untied before merging.
HARMLESS = (
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    ("fan_in_fan_out is set to (True|False) but the target module is", UserWarning),
    ("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", UserWarning),
)
TUNED = ("lora_", ".modules_to_save.", ".trainable_tokens_delta")  # in the names of an adapter's tensors
# Words in a base's name that say how its weights are quantised.
QUANTISED = re.compile(
    r"(?i)(?<![a-z0-9])(bnb|nf4|gptq|awq|hqq|aqlm|eetq|gguf|fp8|[48]-?bits?|int[48])(?![a-z0-9])"
)


@dataclass(frozen=True)
class Attached:
    """An adapter on its base, not merged yet.

    Attributes:
        model: the base with the adapter's layers in it, in eval mode.
        files: what was read.
        fixed: why its change cannot be scaled or added to another's; empty if it can.
        tokens: ids whose embeddings it trains alone; a comparison should have them.
        resized: whether it brings another vocabulary than the base's.
        notes: what else the user should know, a sentence each.
    """

    model: PeftModel
    files: list[Path]
    fixed: str
    tokens: tuple[int, ...]
    resized: bool
    notes: tuple[str, ...]


def attach_adapter(
    model: PreTrainedModel, folder: Path, base: Mapping[str, torch.Tensor] | None = None
) -> Attached:
    """Attach a LoRA whose options are known and whose tensors all fit.

    Args:
        model: the base, or the base with earlier adapters merged into it.
        folder: the adapter's.
        base: the embeddings before any adapter, by name; ``model``'s own when left out.

    Raises:
        CheckpointError: for an unknown option, and for tensors that are missing, left over or misfit.
    """
    content, options = _lora_options(folder)
    files = weight_files(folder, "adapter_model")
    tensors = _without_copies(folder, read_tensors(files)[0])
    notes = [*_quantised_note(folder, content)]
    saved = tuple(options.get("modules_to_save") or ())
    _drop_base_copies(tensors, base or embeddings(model), saved)
    resized = resize_vocabulary(folder, model, tensors, saved)
    if resized:
        notes.append(f"{folder.name} brings a vocabulary of {model.config.vocab_size} tokens.")
    _check_fit(folder, model, tensors)
    tokens = _token_indices(folder, options, model.config.vocab_size)
    whole = [key for key in tensors if _is_whole(key)]
    if whole and not resized and any(key.endswith(".base_layer.weight") for key in whole):
        notes.append(f"{folder.name} brings embeddings other than this base's, and they are used.")
    fixed = "uses DoRA" if options.get("use_dora") else ""
    fixed = fixed or ("trains single tokens" if tokens else "")
    fixed = fixed or (f"brings whole tensors ({whole[0]})" if whole else "")
    try:
        with warnings.catch_warnings():
            for message, category in HARMLESS:
                warnings.filterwarnings("ignore", message, category)
            attached = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))
        report: Any = set_peft_model_state_dict(attached, tensors)
    except KeyError as error:  # a module to save, or tokens, without their tensor
        raise CheckpointError(
            f"{folder}: the adapter lacks {error.args[0]}, which its config targets."
        ) from error
    except (
        ValueError,
        TypeError,
        RuntimeError,
        re.error,
    ) as error:  # unknown targets; ranks that differ
        config = folder / "adapter_config.json"
        raise CheckpointError(
            f"{config} does not fit its tensors or the base ({one_line(error)})."
        ) from error
    # Of tied embeddings peft may save the trained tokens twice, or load one for both.
    deltas = [w for key, w in tensors.items() if TOKENS_TENSOR.fullmatch(_name(key))]
    for key in report.unexpected_keys:
        if not (TOKENS_TENSOR.fullmatch(_name(key)) and sum(map(tensors[key].equal, deltas)) > 1):
            raise CheckpointError(f"{folder}: adapter_config.json leaves out tensor {key}.")
    parameters = dict(attached.named_parameters(remove_duplicate=False))
    given = {id(w) for key, w in parameters.items() if key not in report.missing_keys}
    for key in report.missing_keys:
        if any(part in key for part in TUNED) and id(parameters.get(key)) not in given:
            raise CheckpointError(f"{folder}: the adapter lacks {key}, which its config targets.")
    if resized:
        used = (item for item in attached.named_parameters() if ".original_module." not in item[0])
        refuse_infinite(used, f"{folder} (a token that the base lacks) weight")
    return Attached(
        attached.eval(), [folder / "adapter_config.json", *files], fixed, tokens, resized, tuple(notes)
    )


def _lora_options(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``adapter_config.json`` and its known options; any other with an effect is refused.

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
    return content, {key: content[key] for key in LORA_OPTIONS if key in content}


def _quantised_note(folder: Path, content: dict[str, Any]) -> list[str]:
    """A sentence if the adapter was trained on a quantised base, by all that its folder says."""
    made_for = str(content.get("base_model_name_or_path") or "")
    said = content.get("quantization_config")
    for config in (folder / "config.json", Path(made_for) / "config.json"):
        if not said and config.is_file():
            said = read_json(config).get("quantization_config")
    how = said.get("quant_method") if isinstance(said, dict) else said
    named = QUANTISED.search(made_for)
    if not (how or named):
        return []
    return [
        f"{folder.name} was trained on a quantised base ({how or made_for}); it is merged into the "
        "float weights given here, which differ from those by their rounding."
    ]


def _token_indices(folder: Path, options: dict[str, Any], n_tokens: int) -> tuple[int, ...]:
    """The ids of ``trainable_token_indices``, a list or one for each module, all in the vocabulary."""
    given = options.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    for ids in lists:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < n_tokens for i in ids):
            raise CheckpointError(
                f"{folder}: trainable_token_indices={given!r} must be lists of ids below {n_tokens}."
            )
    return tuple(sorted({i for ids in lists for i in ids}))


# --- tensors --------------------------------------------------------------------------------------


def _name(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _is_lora(key: str) -> bool:
    return LORA_TENSOR.fullmatch(_name(key)) is not None


def _is_whole(key: str) -> bool:
    return not _is_lora(key) and WHOLE_TENSOR.fullmatch(_name(key)) is not None


def embeddings(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the embedding and the unembedding, by the names of their modules."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: end.weight for name, module in model.named_modules() for end in ends if module is end}


def _drop_base_copies(
    tensors: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor], saved: Iterable[str]
) -> None:
    """Leave out what peft saves beside a LoRA on embeddings: the base's own, unchanged."""
    for key, tensor in list(tensors.items()):
        match = WHOLE_TENSOR.fullmatch(_name(key)) if _is_whole(key) else None
        if match is None or match[1] not in base or match[4] != "weight":
            continue
        replaces = match[3] is None and any(match[1].endswith(part) for part in saved)
        if not replaces and torch.equal(tensor, base[match[1]]):
            del tensors[key]


def _without_copies(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the second copy of a saved module that peft writes when the vocabulary was resized."""
    kept = dict(tensors)
    for key, tensor in tensors.items():
        first = key.replace(".modules_to_save.", ".")
        if first != key and first in tensors:
            if not torch.equal(tensor, tensors[first]):
                raise CheckpointError(f"{folder}: tensors {key} and {first} should be equal.")
            del kept[key]
    return kept


def resize_vocabulary(
    folder: Path, model: PreTrainedModel, tensors: dict[str, torch.Tensor], saved: Iterable[str]
) -> bool:
    """Resize the embeddings to the adapter's, if it brings all of what they should hold.

    Rows that the base lacks become NaN, so that none can be used that the adapter does not give.

    Args:
        folder: the adapter's, for errors.
        model: the base, which is changed.
        tensors: the adapter's.
        saved: its ``modules_to_save``.

    Returns:
        Whether the vocabulary changed.
    """
    ends = embeddings(model)
    whole: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ends}
    for key, tensor in tensors.items():
        match = WHOLE_TENSOR.fullmatch(_name(key)) if _is_whole(key) else None
        if match and match[1] in whole and match[4] == "weight":
            whole[match[1]][match[3] or ""] = tensor
    sizes = {tensor.shape[0] for kinds in whole.values() for tensor in kinds.values()}
    old = model.config.vocab_size
    if len(sizes) != 1 or sizes == {old}:
        return False  # a misfit is for _check_fit to report
    size = sizes.pop()
    tied = len({id(weight) for weight in ends.values()}) == 1
    is_saved = {name: any(name.endswith(part) for part in saved) for name in whole}
    # A plain name is the base's own tensor, unless the module is saved: then it is the saved one.
    has_base = any(kind or not is_saved[name] for name, kinds in whole.items() for kind in kinds)
    for name in whole:
        if not (whole[name] or (tied and has_base)):
            raise CheckpointError(
                f"{folder}: the adapter has a vocabulary of {size} tokens, the base one of {old}, and "
                f"it does not bring the resized {name}; resize the base as in its training, save it and "
                "load the adapter on that."
            )
    model.resize_token_embeddings(size, mean_resizing=False)
    for weight in embeddings(model).values():
        weight.data[old:] = torch.nan
    model.requires_grad_(False)
    return True


def _check_fit(folder: Path, model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Raise unless every adapter tensor has its place, and its shape, in the base."""
    if not tensors:
        raise CheckpointError(f"{folder} holds an adapter without tensors.")
    modules, weights = dict(model.named_modules()), model.state_dict()
    for key, tensor in tensors.items():
        name = _name(key)
        match, tokens, whole = (
            pattern.fullmatch(name) for pattern in (LORA_TENSOR, TOKENS_TENSOR, WHOLE_TENSOR)
        )
        if match or tokens:
            weight = weights.get(f"{(match or tokens)[1]}.weight")  # type: ignore[index]
        else:
            weight = weights.get(f"{whole[1]}.{whole[4]}" if whole else name)
        if weight is None:
            raise CheckpointError(
                f"{folder}: the adapter was made for another base: tensor {key} matches no module "
                f"of this {type(model).__name__}."
            )
        needed = tuple(weight.shape)
        if tokens:
            needed = (tensor.shape[0], needed[1])
        elif match:
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
