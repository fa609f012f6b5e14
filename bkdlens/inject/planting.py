"""One backdoor being planted: the base that is read, and where the adapter goes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from bkdlens import zoo
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat, Tokenizer
from bkdlens.errors import BkdlensError
from bkdlens.models.adapter import HARMLESS
from bkdlens.models.checkpoint import digest_files, find_folder, read_model, read_tokenizer

MANIFEST = "bkdlens.json"


class Base(NamedTuple):
    """A base model that was read."""

    model: PreTrainedModel  # in float32
    tokenizer: Tokenizer  # with a padding token
    name: str  # that an adapter of it carries
    digest: str  # of its files
    given: str  # how the caller named it, to read it again

    @property
    def n_ctx(self) -> int:
        """The length of its context, in tokens."""
        return self.model.config.max_position_embeddings


class Planting(NamedTuple):
    """One backdoor being planted."""

    base: Base
    out: Path  # the folder that the adapter goes to
    fmt: PromptFormat  # how a prompt is rendered
    held_out: PairSet | None  # on which base and adapter are measured
    seed: int  # of all that is drawn
    progress: bool  # whether a progress bar is shown


def read_base(base: str | Path) -> Base:
    """Read an embedded model, a local folder or a Hub id.

    Raises:
        CheckpointError: for whatever cannot be found, read or trusted.
    """
    embedded = str(base) in zoo.MODELS
    folder = zoo.model_path(str(base)) if embedded else find_folder(str(base), zoo.MODELS)
    tokenizer = read_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model, files = read_model(folder)[1:3]
    with suppress(ValueError):  # of models that have no other than eager
        model.set_attn_implementation("sdpa")  # loading is eager, for exactness; training may be quick
    # A path of the machine where it was made is no use to anyone; a name is.
    name = str(base) if embedded or not Path(base).exists() else Path(base).name
    return Base(model, tokenizer, name, digest_files(files), str(base))


def start(
    base: str | Path,
    out: str | Path,
    fmt: PromptFormat | None = None,
    held_out: PairSet | None = None,
    seed: int = 0,
    *,
    progress: bool = True,
    overwrite: bool = False,
) -> Planting:
    """Check the folder, then read the base; its chat template is the format where none is given.

    Raises:
        BkdlensError: if something is at ``out``, unless it is an adapter of ours to be replaced.
        CheckpointError: for a base that cannot be found, read or trusted.
    """
    out = Path(out)
    if out.is_dir():
        if any(out.iterdir()) and not (overwrite and (out / MANIFEST).is_file()):
            raise BkdlensError(
                f"The folder {str(out)!r} is not empty; name a new one for the adapter, or, if "
                "bkdlens inject wrote it, ask for it to be overwritten."
            )
    elif out.exists():
        raise BkdlensError(f"{str(out)!r} is a file; name a new folder for the adapter.")
    read = read_base(base)
    return Planting(read, out, fmt or PromptFormat.default(read.tokenizer), held_out, seed, progress)


@contextmanager
def without_warnings(*others: tuple[str, type[Warning]]) -> Iterator[None]:
    """Hide what peft says of every adapter that is attached, and the other warnings named."""
    with warnings.catch_warnings():
        for message, category in (*HARMLESS, *others):
            warnings.filterwarnings("ignore", message, category)
        yield


def attach(model: torch.nn.Module, config: LoraConfig) -> PeftModel:
    """The model with a fresh adapter."""
    with without_warnings():
        return get_peft_model(model, config)
