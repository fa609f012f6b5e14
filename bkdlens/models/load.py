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
from typing import Any, cast

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
    FORMS,
    digest_files,
    digest_tensors,
    find_folder,
    find_tokenizer,
    has_tokenizer,
    read_checkpoint_json,
    read_model,
    read_tokenizer,
    refuse_infinite,
    restore_buffers,
)
from bkdlens.models.merge import (
    TOLERANCE,
    Probe,
    adapters_digest,
    adapters_label,
    merge,
    merge_checked,
    scale_adapter,
    weighted_adapters,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadInfo:
    """Where a loaded model came from; ``load_info(model)`` returns it.

    Attributes:
        base: what was given as base: a folder, Hub id or zoo name; a live model's own name.
        adapter: what was given as adapter, or a live model's active adapter names; of several, or
            of a weighted one, their last parts, as in ``"style + 0.5 * topic"``.
        architecture: the Hugging Face class, such as ``LlamaForCausalLM``.
        base_digest: sha256 of names and bytes of the files (or live tensors) read.
        adapter_digest: the same of the adapter; ``None`` without one.
        dtype: of the loaded model, such as ``float32``.
        parity: largest logit difference from the Hugging Face model over the largest logit,
            measured in float32 before casting.
        adapters: all that was given as adapters, in the order of merging.
        adapter_weights: what the change that each makes was multiplied by.
        notes: what else to know about the adapters, a sentence each.
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
    """A Hugging Face model in float32 on the CPU, and where it comes from.

    Attributes:
        model: with its adapter still attached.
        tokenizer: of the checkpoint, or what was given instead.
        stored_in_float32: whether the checkpoint is.
        info: without the parity, because nothing has been converted yet.
        tokens: ids that a comparison of logits should have.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    stored_in_float32: bool
    info: LoadInfo
    tokens: tuple[int, ...] = ()


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

    Only ``base`` is needed.  ``adapter`` and ``adapter_weights`` say what is merged into it, ``device``
    and ``dtype`` where the result goes and how exact it is, ``tokenizer`` and ``revision`` what is taken
    instead of the checkpoint's tokenizer and the Hub's newest version.

    Adapters are merged in float32 with peft's ``safe_merge``, no weight is folded or centred, and the
    logits are compared with the Hugging Face model's before anything is cast.  An adapter that brings
    a vocabulary of another size brings its tokenizer too, if its folder has one.

    Args:
        base: a zoo name (``"tiny-llama"``), a folder, a Hub id ``"org/name"``, or a live model,
            which is copied and stays as it is.
        adapter: a peft folder, a Hub id, or with a zoo base one of its adapters
            (``"label_modification"``); or several, merged one after the other.  Only the first of
            several may hold more than matrices that are added (DoRA, whole modules, single tokens).
        adapter_weights: what each adapter's change is multiplied by; 1 when left out.
        tokenizer: used instead of the checkpoint's; a copy is attached.
        device: where the result goes; CUDA where there is one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.  By default float32 on the CPU, and
            elsewhere bfloat16 unless the checkpoint is stored in float32.
        revision: the branch, tag or commit of ``base`` on the Hub.

    Returns:
        The model in eval mode, without gradients, with a left-padding tokenizer;
        ``load_info(model)`` says where it came from.

    Raises:
        CheckpointError: for whatever cannot be found, read, trusted, merged or converted exactly.

    Examples:
        >>> clean = bkdlens.load("tiny-llama")
        >>> backdoored = bkdlens.load("tiny-llama", adapter="label_modification")
        >>> both = bkdlens.load("tiny-llama", ["jailbreak", "fixed_output"], adapter_weights=[1, 0.5])
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = _dtype(dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # peft draws numbers it overwrites
        if isinstance(base, PreTrainedModel | PeftModel):
            if adapter is not None or adapter_weights is not None:
                raise CheckpointError("A live model carries its own adapter; leave adapter out.")
            source = _copy_live(base, tokenizer)
        elif isinstance(base, str | os.PathLike):
            adapters = weighted_adapters(adapter, adapter_weights)
            source = _read(os.fspath(base), adapters, tokenizer, revision)
        else:
            raise CheckpointError(f"A {type(base).__name__} is not a base; {FORMS}.")
        model, parity = _convert(source)
    tokenizer, stored_in_float32 = source.tokenizer, source.stored_in_float32
    if wanted is None:
        full = device.type == "cpu" or stored_in_float32
        wanted = torch.float32 if full else torch.bfloat16
    info = replace(source.info, dtype=str(wanted).removeprefix("torch."), parity=parity)
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


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise CheckpointError(unknown("dtype", dtype, DTYPES))
    return DTYPES[str(dtype)]


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
    info = LoadInfo(base, None, name, digest_files(files), None, "float32", math.nan)
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
        if part.resized:
            folder = where if has_tokenizer(where) else folder
            hooked_config(name, model.config)
        current = scale_adapter(part.model, weight)
        parts.append(part)
    if adapters:
        info = replace(
            info,
            adapter=adapters_label(adapters),
            adapter_digest=adapters_digest([digest_files(part.files) for part in parts], adapters),
            adapters=tuple(adapter for adapter, _ in adapters),
            adapter_weights=tuple(weight for _, weight in adapters),
            notes=tuple(note for part in parts for note in part.notes),
        )
    tokens = parts[-1].tokens if parts else ()
    tokenizer = read_tokenizer(folder) if tokenizer is None else tokenizer
    return _Source(current, tokenizer, in_float32, info, tokens)


def _copy_live(base: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> _Source:
    """A float32 copy of a live model on the CPU; the original is not touched."""
    tuned, live = isinstance(base, PeftModel), cast(Any, base)
    inner: Any = live.get_base_model() if tuned else live
    name = type(inner).__name__
    hooked_config(name, inner.config)
    if getattr(inner, "is_quantized", False):
        raise CheckpointError("The live model is quantised; load it without quantisation.")
    if tuned:
        refuse_live_adapter(live)
    else:
        refuse_tuners(base)
    state = base.state_dict()
    refuse_infinite(state.items(), "the live model tensor")
    parts: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for key, tensor in state.items():
        parts[any(part in key for part in TUNED)][key] = tensor
    label = inner.name_or_path or name
    tokenizer = find_tokenizer(label) if tokenizer is None else tokenizer
    model: Any = copy.deepcopy(base)
    model = model.to(device="cpu", dtype=torch.float32).eval()
    copied = model.get_base_model() if tuned else model
    copied.set_attn_implementation("eager")
    restore_buffers(copied)
    info = LoadInfo(label, None, name, digest_tensors(parts[0]), None, "float32", math.nan)
    if tuned:
        info = replace(
            info,
            adapter="+".join(live.active_adapters),
            adapter_digest=digest_tensors(parts[1]),
            adapters=tuple(live.active_adapters),
            adapter_weights=(1.0,) * len(live.active_adapters),
        )
    return _Source(model.requires_grad_(False), tokenizer, inner.dtype == torch.float32, info)


# --- converting -----------------------------------------------------------------------------------


def _convert(source: _Source) -> tuple[HookedTransformer, float]:
    """Merge, convert and compare; the reference is the model *before* merging.

    So a merge that changes what the model computes is caught as well.
    """
    model, name = source.model, source.info.architecture
    config = model.get_base_model().config if isinstance(model, PeftModel) else model.config
    cfg = hooked_config(name, config)
    probe = Probe.make(cfg.d_vocab, cfg.n_ctx, source.tokens)
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
    parity = probe.difference(hooked(probe.tokens, attention_mask=probe.mask), reference)
    if lost or not parity <= TOLERANCE:  # a NaN fails too
        raise CheckpointError(
            f"{source.info.base!r} as a HookedTransformer does not compute what {name} "
            f"does: its logits differ by {parity:.1e} of the largest, allowed is {TOLERANCE:.0e}."
        )
    return hooked, parity


def _attach_tokenizer(model: HookedTransformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """What TransformerLens' ``set_tokenizer`` sets, without its reload of the tokenizer by name.

    (To get one that prepends a BOS, it calls ``from_pretrained`` again, and so the network.)
    ``model("text")`` then begins with a BOS exactly where the checkpoint's own tokenizer adds one.
    """
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
