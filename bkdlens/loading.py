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
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bkdlens import zoo
from bkdlens.adapter import attach_adapter, refuse_live_adapter, refuse_tuners
from bkdlens.architectures import hooked_config, hooked_weights
from bkdlens.checkpoint import (
    FORMS,
    digest_files,
    digest_tensors,
    find_folder,
    find_tokenizer,
    one_line,
    read_json,
    read_model,
    read_tokenizer,
    refuse_infinite,
    restore_buffers,
)
from bkdlens.errors import CheckpointError, unknown

TOLERANCE = 1e-4  # largest logit difference over largest logit, in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadInfo:
    """Where a loaded model came from; ``load_info(model)`` returns it.

    Attributes:
        base: what was given as base: a folder, Hub id or zoo name; a live model's own name.
        adapter: what was given as adapter, or a live model's active adapter names.
        architecture: the Hugging Face class, such as ``LlamaForCausalLM``.
        base_digest: sha256 of names and bytes of the files (or live tensors) read.
        adapter_digest: the same of the adapter; ``None`` without one.
        dtype: of the loaded model, such as ``float32``.
        parity: largest logit difference from the Hugging Face model over the largest logit,
            measured in float32 before casting.
    """

    base: str
    adapter: str | None
    architecture: str
    base_digest: str
    adapter_digest: str | None
    dtype: str
    parity: float


@dataclass
class _Source:
    """A Hugging Face model in float32 on the CPU, its adapter still attached, and its origin.

    ``info`` has no parity yet: nothing has been converted.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    stored_in_float32: bool
    info: LoadInfo


def load(
    base: str | os.PathLike[str] | PreTrainedModel | PeftModel,
    adapter: str | os.PathLike[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> HookedTransformer:
    """Load a checkpoint, with or without a LoRA adapter, as an unprocessed ``HookedTransformer``.

    The adapter is merged in float32 with peft's ``safe_merge``, no weight is folded or centred,
    and the logits are compared with the Hugging Face model's before anything is cast.

    Args:
        base: a zoo name (``"tiny-llama"``), a folder, a Hub id ``"org/name"``, or a live model,
            which is copied and stays as it is.
        adapter: a peft folder, a Hub id, or with a zoo base one of its adapters
            (``"label_modification"``).
        tokenizer: used instead of the checkpoint's; a copy is attached.
        device: where the result goes; CUDA where there is one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.  By default float32 on the CPU, and
            elsewhere bfloat16 unless the checkpoint is stored in float32.
        revision: of ``base`` on the Hub.

    Returns:
        The model in eval mode, without gradients, with a left-padding tokenizer;
        ``load_info(model)`` says where it came from.

    Raises:
        CheckpointError: for whatever cannot be found, read, trusted, merged or converted exactly.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = _dtype(dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # peft draws numbers it overwrites
        if isinstance(base, PreTrainedModel | PeftModel):
            source = _copy_live(base, adapter, tokenizer)
        elif isinstance(base, str | os.PathLike):
            source = _read(os.fspath(base), adapter, tokenizer, revision)
        else:
            raise CheckpointError(f"A {type(base).__name__} is no base; {FORMS}.")
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
    """Where ``model`` came from, or ``None`` if ``load`` did not make it."""
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
    adapter: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str | None,
) -> _Source:
    """Read a base and attach its adapter, everything checked."""
    embedded = base in zoo.MODELS
    folder = zoo.model_path(base) if embedded else find_folder(base, zoo.MODELS, revision)
    if adapter is None and (folder / "adapter_config.json").is_file():
        made_for = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{base!r} holds an adapter; name its base too: "
            f"load(base, adapter={base!r}), where base may be {made_for!r}."
        )
    name, model, files, in_float32 = read_model(folder)
    tokenizer = read_tokenizer(folder) if tokenizer is None else tokenizer
    info = LoadInfo(base, None, name, digest_files(files), None, "float32", math.nan)
    if adapter is None:
        return _Source(model, tokenizer, in_float32, info)
    adapter = os.fspath(adapter)
    known = embedded and adapter in zoo.ADAPTERS
    where = zoo.adapter_path(base, adapter) if known else find_folder(adapter, zoo.ADAPTERS)
    tuned, files = attach_adapter(model, where)
    info = replace(info, adapter=adapter, adapter_digest=digest_files(files))
    return _Source(tuned, tokenizer, in_float32, info)


def _copy_live(
    base: PreTrainedModel | PeftModel,
    adapter: object,
    tokenizer: PreTrainedTokenizerBase | None,
) -> _Source:
    """A float32 copy of a live model on the CPU; the original is not touched."""
    if adapter is not None:
        raise CheckpointError("A live model carries its own adapter; leave adapter out.")
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
        parts["lora_" in key or ".modules_to_save." in key][key] = tensor
    label = inner.name_or_path or name
    tokenizer = find_tokenizer(label) if tokenizer is None else tokenizer
    model: Any = copy.deepcopy(base)
    model = model.to(device="cpu", dtype=torch.float32).eval()
    copied = model.get_base_model() if tuned else model
    copied.set_attn_implementation("eager")
    restore_buffers(copied)
    info = LoadInfo(
        base=label,
        adapter="+".join(live.active_adapters) if tuned else None,
        architecture=name,
        base_digest=digest_tensors(parts[0]),
        adapter_digest=digest_tensors(parts[1]) if tuned else None,
        dtype="float32",
        parity=math.nan,
    )
    return _Source(model.requires_grad_(False), tokenizer, inner.dtype == torch.float32, info)


# --- converting -----------------------------------------------------------------------------------


def _convert(source: _Source) -> tuple[HookedTransformer, float]:
    """Merge, convert and compare; the reference is the model *before* merging.

    So a merge that changes the model, as on tied embeddings, is caught as well.
    """
    model, name = source.model, source.info.architecture
    config = model.get_base_model().config if isinstance(model, PeftModel) else model.config
    cfg = hooked_config(name, config)
    tokens, mask = _parity_prompts(cfg.d_vocab, cfg.n_ctx)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    reference = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    if isinstance(model, PeftModel):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # what safe_merge raises
            raise CheckpointError(
                f"Merging gives NaN or infinite weights ({one_line(error)})."
            ) from error
    refuse_tuners(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        hooked = HookedTransformer(cfg, move_to_device=False)
    # Assigning keeps Hugging Face's memory layout: no second copy of the weights, and the
    # transposes that TransformerLens makes contiguous in every forward pass already are.
    state = hooked_weights(name, model, cfg)
    hooked.load_state_dict(state, strict=False, assign=True)
    lost = set(dict(hooked.named_parameters())) - set(state) - {"unembed.b_U"}  # zeros by default
    parity = _difference(hooked(tokens, attention_mask=mask), reference, mask)
    if lost or not parity <= TOLERANCE:  # a NaN fails too
        raise CheckpointError(
            f"{source.info.base!r} as a HookedTransformer does not compute what {name} "
            f"does: its logits differ by {parity:.1e} of the largest, allowed is {TOLERANCE:.0e} "
            "(an adapter on tied embeddings cannot be merged)."
        )
    return hooked, parity


def _parity_prompts(d_vocab: int, n_ctx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded random tokens and their mask, ``[2 pos]``; one prompt full, one left-padded."""
    length = min(16, n_ctx)  # with large weights 2 x 16 tokens take hardly longer than 2 x 4
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(d_vocab, (2, length), generator=generator)
    starts = torch.tensor([0, length // 3])
    return tokens, (torch.arange(length) >= starts[:, None]).long()


def _difference(logits: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest ``|logits - reference|`` over the largest ``|reference|``, on unpadded positions."""
    given, wanted = logits[mask.bool()], reference[mask.bool()]
    return ((given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


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
