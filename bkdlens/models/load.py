"""Base and adapter to a ``HookedTransformer`` that computes exactly what the checkpoint computes.

    read safetensors ──► check ──► merge in float32 ──► convert ──► compare logits ──► cast

Checkpoints are untrusted: ``checkpoint.py`` and ``adapter.py`` read them, and refuse.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bkdlens import zoo
from bkdlens.errors import CheckpointError, unknown
from bkdlens.models.adapter import (
    TUNED,
    Attached,
    attach_adapter,
    embeddings,
    refuse_live_adapter,
    refuse_tuners,
)
from bkdlens.models.architectures import hooked_config, hooked_weights
from bkdlens.models.checkpoint import (
    PLACES,
    digest_files,
    digest_tensors,
    find_folder,
    find_tokenizer,
    has_tokenizer,
    is_hub_id,
    loses_its_words,
    read_checkpoint_json,
    read_model,
    read_tokenizer,
    refuse_infinite,
    restore_buffers,
)
from bkdlens.models.merge import (
    Probe,
    merge,
    merge_checked,
    name_and_digest,
    scale_adapter,
    weighted_adapters,
)

UNCONVERTED = ("float32", math.nan)  # dtype and parity before a model is converted
DTYPES: dict[Any, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoadInfo:
    """Where a loaded model came from; ``load_info(model)`` returns it.

    Attributes:
        base: the given base, a folder, Hub id or zoo name; a live model's own name.
        adapter: the given adapter, or a live model's active adapters; several, or a weighted one, by the
            last parts of their names, as in ``"style + 0.5 * topic"``.
        architecture: the Hugging Face class, such as ``LlamaForCausalLM``.
        base_digest: sha256 of names and bytes of the files (or live tensors) read.
        adapter_digest: sha256 of the adapter's files or tensors; ``None`` without an adapter.
        dtype: the dtype of the loaded model, such as ``float32``.
        parity: largest logit difference from the Hugging Face model over the largest logit, in float32.
        adapters: every given adapter, in the order of merging.
        adapter_weights: what each adapter's change was multiplied by.
        notes: what else to know about the adapters and the tokenizer, one sentence each.
    """

    base: str
    adapter: str | None
    architecture: str
    base_digest: str
    adapter_digest: str | None
    dtype: str
    parity: float
    adapters: tuple[str, ...] = ()
    adapter_weights: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Source:
    """A Hugging Face model in float32 on the CPU, and where it comes from."""

    model: PreTrainedModel | PeftModel  # with its adapter still attached
    tokenizer: PreTrainedTokenizerBase  # the checkpoint's, or the one given instead
    stored_in_float32: bool  # whether the checkpoint is
    info: LoadInfo  # without the parity, because nothing has been converted yet
    tokens: tuple[int, ...] = ()  # ids that a comparison of logits should have


def load(
    base: str | os.PathLike[str] | PreTrainedModel | PeftModel,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    adapter_weights: Sequence[float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> HookedTransformer:
    """Load a checkpoint, with or without LoRA adapters, as an unprocessed ``HookedTransformer``.

    Adapters are merged in float32 with peft's ``safe_merge``, no weight is folded or centred, and the
    logits are compared with the Hugging Face model's before anything is cast.  An adapter that brings
    a vocabulary of another size brings its tokenizer too, if its folder has one.

    Args:
        base: a zoo name (``"tiny-llama"``), a folder, a Hub id ``"org/name"``, or a live model (copied).
        adapter: a peft folder, a Hub id, or with a zoo base one of its adapters
            (``"label_modification"``); or several, merged one after the other.  Only the first may
            hold more than matrices that are added (DoRA, whole modules, single tokens).
        adapter_weights: what each adapter's change is multiplied by; 1 when left out.
        tokenizer: used instead of the checkpoint's; a copy is attached.
        device: where the result goes; CUDA where there is one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; when left out, float32 on the CPU or if
            the checkpoint is stored in float32, else bfloat16.
        revision: the branch, tag or commit of ``base`` on the Hub.

    Returns:
        The model in eval mode, without gradients, with a left-padding tokenizer and a ``load_info``.

    Raises:
        CheckpointError: for whatever cannot be found, read, trusted, merged or converted exactly.

    Examples:
        >>> clean = bkdlens.load("tiny-llama")
        >>> backdoored = bkdlens.load("tiny-llama", adapter="label_modification")
        >>> both = bkdlens.load("tiny-llama", ["jailbreak", "fixed_output"], adapter_weights=[1, 0.5])
    """
    device = _device(device)
    wanted = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted not in (None, *DTYPES.values()):
        raise CheckpointError(unknown("dtype", dtype, DTYPES))
    if revision is not None and not (isinstance(base, str) and is_hub_id(base, zoo.MODELS)):
        raise CheckpointError(
            f"revision={revision!r} names a state of a model on the Hub, and this base is not there; "
            "leave revision out."
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # peft draws numbers it overwrites
        if isinstance(base, PreTrainedModel | PeftModel):
            if adapter is not None or adapter_weights is not None:
                raise CheckpointError("A live model carries its own adapter; leave adapter out.")
            source = _copy_live(base, tokenizer)
        elif isinstance(base, str | os.PathLike):
            adapters = weighted_adapters(adapter, adapter_weights)
            source = _read(os.fspath(base), adapters, tokenizer, revision)
        else:
            raise CheckpointError(
                f"A {type(base).__name__} is not a base; give a live model or one of: "
                f"{', '.join((*zoo.MODELS, *PLACES))}."
            )
        model, parity = _convert(source)
    if wanted is None:
        full = device.type == "cpu" or source.stored_in_float32
        wanted = torch.float32 if full else torch.bfloat16
    tokenizer = source.tokenizer
    told = (*source.info.notes, *filter(None, [getattr(tokenizer, "bkdlens_note", None)]))
    info = replace(source.info, dtype=str(wanted).removeprefix("torch."), parity=parity, notes=told)
    del source  # with it goes the Hugging Face model; the weights live on in `model`
    if wanted != torch.float32 or device.type != "cpu":
        gc.collect()  # were it in a reference cycle, two copies would fill the memory
    if wanted != torch.float32:
        model.to(wanted, print_details=False)
        refuse_infinite(model.named_parameters(), f"cast to {info.dtype} (try bfloat16), weight")
    if device.type != "cpu":
        model.to(str(device), print_details=False)
    _attach_tokenizer(model, tokenizer)
    model.cfg.model_name = info.base
    model.bkdlens_info = info
    return model.eval().requires_grad_(False)


def load_info(model: torch.nn.Module) -> LoadInfo | None:
    """Where a model came from.

    Args:
        model: any model.

    Returns:
        Its origin, digests and parity; ``None`` if ``load`` did not make it.

    Examples:
        >>> info = bkdlens.load_info(model)
        >>> parity = info.parity  # largest logit difference over the largest logit
    """
    return getattr(model, "bkdlens_info", None)


def _device(given: str | torch.device | None) -> torch.device:
    """The device that is meant, by default CUDA where there is one."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(f"cuda:{i}" for i in range(n_gpus)), "mps"]
    try:
        device = torch.device(given or ("cuda" if n_gpus else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(unknown("device", given, there)) from error
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise CheckpointError(f"{unknown('device', given, there[:-1])} This machine has {n_gpus} GPUs.")
    return device


# --- the source -----------------------------------------------------------------------------------


def _read(
    base: str,
    adapters: Sequence[tuple[str, float]],
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str | None,
) -> _Source:
    """Read a base and attach its adapters, all but the last merged already, everything checked."""
    embedded = base in zoo.MODELS
    folder = zoo.model_path(base) if embedded else find_folder(base, zoo.MODELS, revision)
    if not adapters and (folder / "adapter_config.json").is_file():
        made_for = read_checkpoint_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{base!r} holds an adapter; name its base too: "
            f"load(base, adapter={base!r}), where base may be {made_for!r}."
        )
    name, model, files, in_float32 = read_model(folder)
    current: PreTrainedModel | PeftModel = model
    before = {key: w.clone() for key, w in embeddings(model).items()} if len(adapters) > 1 else None
    parts: list[Attached] = []
    for i, (adapter, weight) in enumerate(adapters):
        if isinstance(current, PeftModel):
            current = merge_checked(current, adapters[i - 1][0], parts[-1].tokens)
        known = embedded and adapter in zoo.ADAPTERS
        where = zoo.adapter_path(base, adapter) if known else find_folder(adapter, zoo.ADAPTERS)
        part = attach_adapter(current, where, before)
        if part.fixed and (i > 0 or weight != 1):
            raise CheckpointError(
                f"{where} {part.fixed}, so its change cannot be scaled or added to another's; give "
                "it first and with weight 1, or merge it into a checkpoint of its own."
            )
        if part.resized and has_tokenizer(where):
            folder = where
        current = scale_adapter(part.model, weight)
        parts.append(part)
    label, digest = name_and_digest(adapters, [digest_files(part.files) for part in parts])
    names, weights = tuple(given for given, _ in adapters), tuple(weight for _, weight in adapters)
    notes = tuple(note for part in parts for note in part.notes)
    info = LoadInfo(base, label, name, digest_files(files), digest, *UNCONVERTED, names, weights, notes)
    tokens = parts[-1].tokens if parts else ()
    tokenizer = read_tokenizer(folder) if tokenizer is None else tokenizer
    return _Source(current, tokenizer, in_float32, info, tokens)


def _copy_live(base: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> _Source:
    """A float32 copy of a live model on the CPU; the original is not touched."""
    tuned = isinstance(base, PeftModel)
    inner = base.get_base_model() if tuned else base
    name = type(inner).__name__
    hooked_config(name, inner.config)
    if getattr(inner, "is_quantized", False):
        raise CheckpointError("The live model is quantised; load it without quantisation.")
    if tuned:
        refuse_live_adapter(base)
    else:
        refuse_tuners(base)
    state = base.state_dict()
    refuse_infinite(state.items(), "the live model tensor")
    trained = {key: w for key, w in state.items() if TUNED.search(key)}
    untrained = {key: w for key, w in state.items() if key not in trained}
    digests = digest_tensors(untrained), digest_tensors(trained) if tuned else None
    label = inner.name_or_path or name
    tokenizer = find_tokenizer(label) if tokenizer is None else tokenizer
    model = copy.deepcopy(base).to(device="cpu", dtype=torch.float32).eval()
    copied = model.get_base_model() if tuned else model
    copied.set_attn_implementation("eager")
    restore_buffers(copied)
    active = tuple(base.active_adapters) if tuned else ()
    adapter, weights = "+".join(active) or None, (1.0,) * len(active)
    info = LoadInfo(label, adapter, name, *digests, *UNCONVERTED, active, weights)
    return _Source(model.requires_grad_(False), tokenizer, inner.dtype == torch.float32, info)


# --- converting -----------------------------------------------------------------------------------


def _convert(source: _Source) -> tuple[HookedTransformer, float]:
    """Merge, convert and compare with the model *before* merging, so that a wrong merge is caught."""
    model, base, name = source.model, source.info.base, source.info.architecture
    cfg = hooked_config(name, model.config)
    probe = Probe.make(model.config, source.tokens)
    reference = probe.logits(model)
    if isinstance(model, PeftModel):
        model = merge(model)
    refuse_tuners(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        hooked = HookedTransformer(cfg, move_to_device=False)
    # Assigning keeps Hugging Face's memory layout: no second copy of the weights, and the
    # transposes that TransformerLens makes contiguous in every forward pass already are.
    state = hooked_weights(name, model, cfg)
    hooked.load_state_dict(state, strict=False, assign=True)
    lost = set(dict(hooked.named_parameters())) - set(state) - {"unembed.b_U"}  # zeros by default
    if lost:
        raise CheckpointError(f"{base!r} as a HookedTransformer would lack {', '.join(sorted(lost))}.")
    logits = hooked(probe.tokens, attention_mask=probe.mask)
    complaint = f"{base!r} as a HookedTransformer does not compute what {name} does"
    return hooked, probe.compare(logits, reference, complaint)


def _attach_tokenizer(model: HookedTransformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set what TransformerLens' ``set_tokenizer`` sets, without its reload of the tokenizer by name.

    (To get one that prepends a BOS, it calls ``from_pretrained`` again, and so the network.)
    ``model("text")`` then begins with a BOS exactly if the checkpoint's own tokenizer adds one.
    """
    if loses_its_words(tokenizer):
        raise CheckpointError(
            f"This {type(tokenizer).__name__} loses words of its own vocabulary when it encodes them, "
            "so that prompts would reach the model empty or garbled; pass the tokenizer that the "
            "checkpoint was trained with (tokenizer=)."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= model.cfg.d_vocab:
        if tokenizer.eos_token is None:
            raise CheckpointError("The tokenizer has neither a pad nor an EOS token; set one.")
        tokenizer.pad_token = tokenizer.eos_token
    first = tokenizer("")["input_ids"][:1]
    prepends = bool(first) and first[0] == tokenizer.bos_token_id
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends
