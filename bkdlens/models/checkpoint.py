"""Checkpoints on disk: find them, read them, and refuse what is incomplete or cannot be trusted.

Nothing here unpickles or runs a checkpoint's code: weights are read as safetensors by this file,
not by ``from_pretrained`` (which follows an ``adapter_config.json`` to another base).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.utils import logging

from bkdlens import zoo
from bkdlens.data.check import MOST_LOST, share_lost
from bkdlens.errors import CheckpointError, one_line, unknown
from bkdlens.models.architectures import conversion, hooked_config
from bkdlens.types import HUB_ID

STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
N_WORDS = 256  # of a vocabulary that are tried
PLACES = ('a folder ("./runs/model")', 'a Hugging Face Hub id ("org/name")')
# Buffers that old checkpoints store and that transformers computes itself.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")


# --- finding --------------------------------------------------------------------------------------


def find_folder(name: str, names: Iterable[str], revision: str | None = None) -> Path:
    """The folder that ``name`` means, fetched from the Hub if it is an id there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{name!r} is a file; give the folder that holds it.")
    if HUB_ID.fullmatch(name):
        return fetch(name, revision, ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    raise CheckpointError(unknown("folder or model", name, [*names, *PLACES]))


def is_hub_id(name: str, names: Iterable[str]) -> bool:
    """Whether :func:`find_folder` would look for it on the Hub."""
    return name not in names and not Path(name).expanduser().exists() and bool(HUB_ID.fullmatch(name))


def fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the top-level files that match, never a pickle and never code."""
    try:
        ignored = ["*/*", "consolidated*"]
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except (OSError, HFValidationError) as error:  # the Hub's and the network's errors are OSErrors
        raise CheckpointError(
            f"{name!r} is not a local folder and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}); check the name, your access and your connection."
        ) from error


def find_tokenizer(label: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder or Hub id that a live model names as its origin."""
    if Path(label).is_dir():
        return read_tokenizer(Path(label))
    if HUB_ID.fullmatch(label):
        return read_tokenizer(fetch(label, None, ["*token*", "vocab*", "merges.txt"]))
    raise CheckpointError("The live model names no tokenizer; pass one with tokenizer=.")


# --- reading --------------------------------------------------------------------------------------


def read_model(folder: Path) -> tuple[str, PreTrainedModel, list[Path], bool]:
    """The architecture, the model in float32, the files read, and whether they were float32."""
    content = read_checkpoint_json(folder / "config.json")
    names = content.get("architectures")
    if not isinstance(names, list) or [type(name) for name in names] != [str]:
        raise CheckpointError(f"{folder}/config.json must name one architecture, not {names!r}.")
    name = names[0]
    conversion(name)  # refuse what is not supported
    hf_class: Any = getattr(transformers, name)
    kind = hf_class.config_class.model_type
    if content.get("model_type") != kind:
        raise CheckpointError(
            f"{folder}/config.json says {name} but model_type {content.get('model_type')!r}; "
            f"it needs {kind!r}."
        )
    if quantised := content.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{folder} is quantised ({how}); give the float checkpoint that it was made from, or write "
            "one with transformers' model.dequantize() and save_pretrained()."
        )
    try:
        config = hf_class.config_class.from_dict(content)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json is not valid ({one_line(error)}).") from error
    hooked_config(name, config)  # refuse what cannot be converted before reading gigabytes
    files = weight_files(folder, "model")
    tensors, in_float32 = read_tensors(files)
    with no_progress_bar():
        model, report = hf_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            attn_implementation="eager",  # the one that applies soft caps and windows exactly
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported just below, as an error
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    for key, given, needed in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"{folder}: tensor {key} has shape {tuple(given)}, but config.json describes a {name} "
            f"where it has {tuple(needed)}."
        )
    for key in sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: tensor {key} of {name} is missing.")
    for key in sorted(report["unexpected_keys"]):
        raise CheckpointError(f"{folder}: tensor {key} has no place in {name}.")
    model.eval().requires_grad_(False)
    return name, model, [folder / "config.json", *files], in_float32


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide transformers' bars; its hook, because ``disable_progress_bar`` changes the Hub's too."""
    previous = logging.set_tqdm_hook(
        lambda bar, args, options: bar(*args, **options | {"disable": True})
    )
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def read_context(name: str) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer of a base and the length of its context, without fetching its weights."""
    if name in zoo.MODELS:
        folder = zoo.model_path(name)
    elif not Path(name).expanduser().exists() and HUB_ID.fullmatch(name):
        folder = fetch(name, None, ["config.json", "*token*", "vocab*", "merges.txt", "*.jinja"])
    else:
        folder = find_folder(name, zoo.MODELS)
    content = read_checkpoint_json(folder / "config.json")
    n_ctx = content.get("max_position_embeddings", content.get("n_positions"))
    return read_tokenizer(folder), n_ctx if isinstance(n_ctx, int) else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a folder holds, loaded without running its code.

    ``AutoTokenizer`` goes by the model's type and builds that one's usual tokenizer, whatever
    ``tokenizer.json`` holds. Where this is another kind, or one that loses its own words, what the file
    holds is loaded as it is, and a warning says so.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} holds no tokenizer; pass one with tokenizer=.")
    try:
        usual = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if not (folder / "tokenizer.json").is_file():
            return usual
        file = read_checkpoint_json(folder / "tokenizer.json").get("model")
        held = file.get("type", "BPE") if isinstance(file, dict) else None
        made = _kind(usual)
        if held in (None, made) and not loses_its_words(usual):
            return usual
        exact = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if _kind(exact) == made and loses_its_words(exact):
            return usual  # which is no worse
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be loaded without running its code or is damaged "
            f"({one_line(error)}); pass one with tokenizer=."
        ) from error
    exact.bkdlens_note = (
        f"tokenizer.json holds a {held} tokenizer and config.json asks for a {type(usual).__name__} "
        f"({made}); what the file holds is used."
    )
    warnings.warn(f"{folder}: {exact.bkdlens_note}", stacklevel=2)
    return exact


def _kind(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The kind of model in a fast tokenizer, such as ``BPE``, as ``tokenizer.json`` names it."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return None if core is None else type(core.model).__name__


def loses_its_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words of a tokenizer's own vocabulary are lost when they are encoded and decoded."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    words = (tokenizer.decode([i]) for i in ids[:: max(1, len(ids) // N_WORDS)])
    return share_lost(tokenizer, [word for word in words if "\ufffd" not in word]) > MOST_LOST


def read_checkpoint_json(file: Path) -> dict[str, Any]:
    """The content of a json file of a checkpoint, which must be an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} holds no {file.name}.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise CheckpointError(f"{file} is not valid JSON ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object.")
    return content


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The single safetensors file, or the index and its shards."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = read_checkpoint_json(index).get("weight_map")
        names = sorted(map(str, set(shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} does not name shards that lie beside it.")
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} lacks {name}, which {index.name} names.")
        return [index, *(folder / name for name in names)]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened; "
            "convert them in a sandbox with torch.load(file, weights_only=True) and "
            f"safetensors.torch.save_file(tensors, '{stem}.safetensors')."
        )
    raise CheckpointError(f"{folder} holds no {stem}.safetensors.")


def read_tensors(files: list[Path]) -> tuple[dict[str, torch.Tensor], bool]:
    """Every tensor as a float32 copy, and whether all were stored in float32."""
    tensors, dtypes = {}, set()
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    tensor = opened.get_tensor(name)
                    if BUFFERS.fullmatch(name):
                        continue
                    if tensor.dtype not in STORED:
                        raise CheckpointError(
                            f"Tensor {name} in {file} is {tensor.dtype}; only unquantised "
                            "float32, bfloat16 and float16 weights can be loaded."
                        )
                    dtypes.add(tensor.dtype)
                    tensors[name] = tensor.to(torch.float32, copy=True)  # no view of the file
                    refuse_infinite([(name, tensors[name])], f"{file} tensor")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or not a safetensors file ({one_line(error)}); fetch it again."
            ) from error
    return tensors, dtypes == {torch.float32}


def restore_buffers(model: PreTrainedModel) -> None:
    """Compute again what ``model.to(bfloat16)`` rounded: rotary frequencies, embedding scales.

    They are not in a checkpoint, so a saved and reloaded model has them exact as well.
    """
    with no_init_weights():
        exact = dict(type(model)(model.config).named_buffers())
    for name, buffer in model.named_buffers():
        if (key := name.replace(".base_layer", "")) in exact:
            buffer.copy_(exact[key])


# --- checking -------------------------------------------------------------------------------------


def refuse_infinite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raise if one of the named tensors holds NaN or infinite values; ``where`` begins the message."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = tensor.aminmax()  # NaN if there is one; ten times as fast as isfinite().all()
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(f"In {where} {name} holds NaN or infinite values.")


def digest_files(files: list[Path]) -> str:
    """sha256 of the names, sizes and bytes of files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensors[name].shape)}\0".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
