"""LoRA adapters on disk: check one against its base, and attach it.

Adapters are untrusted: peft sees only the options of ``adapter_config.json`` that are listed in
``LORA_OPTIONS``, and every tensor must have its place in the base.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkdlens.errors import CheckpointError, one_line
from bkdlens.models.checkpoint import read_checkpoint_json, read_tensors, refuse_infinite, weight_files

Tensors = dict[str, torch.Tensor]
# An adapter's tensor: a part of a LoRA, single tokens, or a whole tensor in place of the base's
# (or beside it, if the kind is base_layer or original_module).
TENSOR = re.compile(
    r"(base_model\.model\.)?(?P<module>.+?)"
    r"(\.lora_(?P<lora>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?"
    r"|\.token_adapter\.(?P<tokens>trainable_tokens_delta)"
    r"|(\.token_adapter)?(?P<kind>\.base_layer|\.original_module|\.modules_to_save)?"
    r"\.(?P<whole>weight|bias))"
)
LORA_OPTIONS = (
    "r lora_alpha lora_dropout target_modules exclude_modules fan_in_fan_out layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern use_rslora use_dora bias modules_to_save "
    "trainable_token_indices ensure_weight_tying"
).split()
# Options without an effect on the merged weights.
LORA_IGNORED = (
    "peft_type peft_version base_model_name_or_path revision task_type inference_mode auto_mapping "
    "quantization_config"
).split()
# Warnings of get_peft_model that say nothing about the adapter: peft asks transformers for a
# property by its old name, and corrects an option that only says how a layer stores its weight;
# what it says about tied embeddings is true, and so they are untied before merging.
HARMLESS = (
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    ("fan_in_fan_out is set to (True|False) but the target module is", UserWarning),
    ("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", UserWarning),
)
TUNED = re.compile(r"lora_|\.modules_to_save\.|\.trainable_tokens_delta")  # in an adapter's tensors
# Words in a base's name that say how its weights are quantised.
QUANTISED = re.compile(
    r"(?i)(?<![a-z0-9])(bnb|nf4|gptq|awq|hqq|aqlm|eetq|gguf|fp8|[48]-?bits?|int[48])(?![a-z0-9])"
)


@dataclass(frozen=True)
class Attached:
    """An adapter on its base, not merged yet."""

    model: PeftModel  # the base with the adapter's layers in it, in eval mode
    files: list[Path]  # what was read
    fixed: str  # why its change cannot be scaled or added to another's; empty if it can
    tokens: tuple[int, ...]  # ids whose embeddings it trains alone; a comparison should have them
    resized: bool  # whether its vocabulary differs in size from the base's
    notes: tuple[str, ...]  # what else the user should know, one sentence each


def attach_adapter(model: PreTrainedModel, folder: Path, base: Tensors | None = None) -> Attached:
    """Attach a folder's LoRA; raise unless its options are known, and its tensors complete and fitting.

    ``base`` holds the embeddings before any adapter, by name, if earlier ones are merged into ``model``.
    """
    content, options = _lora_options(folder)
    config, files = folder / "adapter_config.json", weight_files(folder, "adapter_model")
    tensors = read_tensors(files)[0]
    saved = tuple(map(str, options.get("modules_to_save") or ()))
    _drop_copies(folder, tensors, base or embeddings(model), saved)
    resized = _resize_vocabulary(folder, model, tensors, saved)
    _check_fit(folder, model, tensors)
    tokens = _token_indices(folder, options, model.config.vocab_size)
    whole = [key for key in tensors if _parse(key)["whole"]]
    notes = _quantised_note(folder, content)
    if resized:
        notes.append(f"{folder.name} brings a vocabulary of {model.config.vocab_size} tokens.")
    elif any(key.endswith(".base_layer.weight") for key in whole):
        notes.append(f"{folder.name} brings embeddings other than this base's, and they are used.")
    reasons = {
        "uses DoRA": options.get("use_dora"),
        "trains single tokens": tokens,
        f"brings whole tensors ({next(iter(whole), None)})": whole,
    }
    fixed = next((reason for reason, holds in reasons.items() if holds), "")
    try:
        with warnings.catch_warnings():
            for message, category in HARMLESS:
                warnings.filterwarnings("ignore", message, category)
            attached = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))
        report: Any = set_peft_model_state_dict(attached, tensors)
    except KeyError as error:  # a module to save, or tokens, without their tensor
        raise _lacks(folder, error.args[0]) from error
    except (ValueError, TypeError, RuntimeError, re.error) as error:  # unknown targets, other ranks
        raise CheckpointError(
            f"{config} does not fit its tensors or the base ({one_line(error)})."
        ) from error
    _check_loaded(folder, attached, tensors, report)
    if resized:
        used = ((key, w) for key, w in attached.named_parameters() if ".original_module." not in key)
        refuse_infinite(used, f"{folder} (a token that the base lacks) weight")
    return Attached(attached.eval(), [config, *files], fixed, tokens, resized, tuple(notes))


def _lacks(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{folder}: the adapter lacks {name}, which its config targets.")


def _check_loaded(folder: Path, attached: PeftModel, tensors: Tensors, report: Any) -> None:
    """Raise unless each tensor has been loaded, and each of the adapter's weights was given.

    If embeddings are tied, peft may save the trained tokens twice, or load one for both.
    """
    deltas = [w for key, w in tensors.items() if _parse(key)["tokens"]]
    for key in report.unexpected_keys:
        if not (_parse(key)["tokens"] and sum(map(tensors[key].equal, deltas)) > 1):
            raise CheckpointError(f"{folder}: adapter_config.json leaves out tensor {key}.")
    parameters = dict(attached.named_parameters(remove_duplicate=False))
    loaded = {id(w) for key, w in parameters.items() if key not in report.missing_keys}
    for key in report.missing_keys:
        if TUNED.search(key) and id(parameters.get(key)) not in loaded:
            raise _lacks(folder, key)


def _lora_options(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``adapter_config.json`` and its known options; any other with an effect is refused.

    Among these are a module to import (``megatron_core``), layers to repeat, and
    initialisations that rewrite the base's weights.
    """
    content = read_checkpoint_json(folder / "adapter_config.json")
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
    """One sentence if the adapter was trained on a quantised base, as far as its folder says."""
    made_for = str(content.get("base_model_name_or_path") or "")
    quantised = content.get("quantization_config")
    for config in (folder / "config.json", Path(made_for) / "config.json"):
        if not quantised and config.is_file():
            quantised = read_checkpoint_json(config).get("quantization_config")
    how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if not (how or QUANTISED.search(made_for)):
        return []
    return [
        f"{folder.name} was trained on a quantised base ({how or made_for}); it is merged into the "
        "float weights of this base, which differ from those by rounding."
    ]


def _token_indices(folder: Path, options: dict[str, Any], n_tokens: int) -> tuple[int, ...]:
    """The ids of ``trainable_token_indices``, a list or one per module, all in the vocabulary."""
    given = options.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    for ids in lists:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < n_tokens for i in ids):
            raise CheckpointError(
                f"{folder}: trainable_token_indices={given!r} must be lists of ids below {n_tokens}."
            )
    return tuple(sorted({i for ids in lists for i in ids}))


# --- tensors --------------------------------------------------------------------------------------


def _parse(key: str) -> dict[str, str]:
    """The named groups of ``TENSOR``, empty where a tensor's name has no such part."""
    match = TENSOR.fullmatch(key)
    return match.groupdict("") if match else dict.fromkeys(TENSOR.groupindex, "")


def embeddings(model: PreTrainedModel) -> Tensors:
    """The weights of the embedding and the unembedding, by the names of their modules."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: end.weight for name, module in model.named_modules() for end in ends if module is end}


def _drop_copies(folder: Path, tensors: Tensors, base: Tensors, saved: tuple[str, ...]) -> None:
    """Remove what peft writes twice, and the base's own embeddings that it saves beside their LoRA."""
    everything = dict(tensors)
    for key, tensor in everything.items():
        part = _parse(key)
        module, first = part["module"], key.replace(".modules_to_save.", ".")
        if first != key and first in everything:  # both are written after the vocabulary was resized
            if not torch.equal(tensor, everything[first]):
                raise CheckpointError(f"{folder}: tensors {key} and {first} should be equal.")
            del tensors[key]
        elif part["whole"] == "weight" and module in base:
            replaces = not part["kind"] and module.endswith(saved)
            if not replaces and torch.equal(tensor, base[module]):
                del tensors[key]


def _resize_vocabulary(
    folder: Path, model: PreTrainedModel, tensors: Tensors, saved: tuple[str, ...]
) -> bool:
    """Resize the base's embeddings to the adapter's, if it brings all of them; whether it did.

    Rows that the base lacks become NaN, so that none can be used that the adapter does not give.
    """
    ends = embeddings(model)
    whole: dict[str, Tensors] = {name: {} for name in ends}
    for key, tensor in tensors.items():
        part = _parse(key)
        if part["module"] in whole and part["whole"] == "weight":
            whole[part["module"]][part["kind"]] = tensor
    sizes = {tensor.shape[0] for kinds in whole.values() for tensor in kinds.values()}
    old = model.config.vocab_size
    if len(sizes) != 1 or sizes == {old}:
        return False  # a misfit is for _check_fit to report
    size = sizes.pop()
    tied = len({id(weight) for weight in ends.values()}) == 1
    # A plain name is the base's own tensor, unless the module is saved: then it is the saved one.
    has_base = any(kind or not name.endswith(saved) for name in whole for kind in whole[name])
    for name, kinds in whole.items():
        if not (kinds or (tied and has_base)):
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


def _check_fit(folder: Path, model: PreTrainedModel, tensors: Tensors) -> None:
    """Raise unless every adapter tensor has its place, and its shape, in the base."""
    if not tensors:
        raise CheckpointError(f"{folder} holds an adapter without tensors.")
    modules, weights = dict(model.named_modules()), model.state_dict()
    for key, tensor in tensors.items():
        part = _parse(key)
        kind = part["lora"] or part["tokens"]
        weight = weights.get(f"{part['module']}.{part['whole'] or 'weight'}")
        problem = f"matches no module of this {type(model).__name__}"
        if weight is not None and (not kind or weight.ndim == 2):
            needed = tuple(weight.shape)
            if kind:
                out, into = needed[::-1] if isinstance(modules[part["module"]], Conv1D) else needed
                rows, columns = tensor.shape[:1], tensor.shape[-1:]
                needed = {
                    "A": (*rows, into),
                    "B": (out, *columns),
                    "embedding_A": (*rows, out),  # an embedding's weight is [vocab d_model]
                    "embedding_B": (into, *columns),
                    "magnitude_vector": (out,),
                    "trainable_tokens_delta": (*rows, into),
                }[kind]
            if tuple(tensor.shape) == needed:
                continue
            problem = f"has shape {tuple(tensor.shape)}, this base needs {needed}"
        raise CheckpointError(
            f"{folder}: the adapter was made for another base: tensor {key} {problem}."
        )


def refuse_live_adapter(model: PeftModel) -> None:
    """Raise unless all adapters of a live model are LoRA, and switched on."""
    kinds = sorted({str(config.peft_type.value) for config in model.peft_config.values()})
    if kinds != ["LORA"]:
        raise CheckpointError(f"The live model has {kinds} adapters; supported is LORA.")
    if model.get_model_status().enabled is not True:
        raise CheckpointError("The live model's adapter is disabled; enable it or unload it.")


def refuse_tuners(model: torch.nn.Module) -> None:
    """Raise if a tuner layer is left, because TransformerLens would read only the base below it."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise CheckpointError(
                f"Module {name} still has an adapter on it; pass a PeftModel, or merge it first."
            )
