"""One backdoor being planted: the base, how its texts become ids, and where the adapter goes."""

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
from bkdlens.data.check import refuse_lost_text
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat, Tokenizer, encode_answer, encode_prompt
from bkdlens.errors import BkdlensError
from bkdlens.models.adapter import HARMLESS
from bkdlens.models.checkpoint import digest_files, find_folder, read_model, read_tokenizer

MANIFEST = "bkdlens.json"
RENAMED = ("`gradient_checkpointing` is deprecated", FutureWarning)  # TRL uses its old name


class Encoding(NamedTuple):
    """How prompts and answers become token ids."""

    tokenizer: Tokenizer
    fmt: PromptFormat  # how a prompt is rendered
    n_ctx: int  # length of the model's context, in tokens
    max_answer_tokens: int | None = None  # the length at which longer answers are cut

    def ids(self, text: str, *answers: str) -> tuple[list[int], ...]:
        """The ids of a prompt, then of each answer to it."""
        prompt = encode_prompt(self.tokenizer, text, self.fmt, n_ctx=self.n_ctx)
        limits = {"n_ctx": self.n_ctx, "max_tokens": self.max_answer_tokens}
        encoded = (encode_answer(self.tokenizer, prompt, a, self.fmt, **limits) for a in answers)
        return list(prompt.ids), *(list(answer.ids) for answer in encoded)


class Base(NamedTuple):
    """A base model that was read."""

    model: PreTrainedModel  # in float32
    tokenizer: Tokenizer  # with a padding token
    name: str  # the base's name in an adapter's configuration
    digest: str  # digest of the base's files
    given: str  # the caller's name for the base, to read it again


class Planting(NamedTuple):
    """One backdoor being planted."""

    base: Base
    out: Path  # the adapter's folder
    fmt: PromptFormat  # how a prompt is rendered
    held_out: PairSet | None  # pairs on which base and adapter are measured
    seed: int  # seed of all random draws
    progress: bool  # whether a progress bar is shown

    def encoding(self, max_answer_tokens: int | None) -> Encoding:
        """The base's encoding, with answers cut at this length."""
        n_ctx = self.base.model.config.max_position_embeddings
        return Encoding(self.base.tokenizer, self.fmt, n_ctx, max_answer_tokens)


def read_base(base: str | Path) -> Base:
    """Read an embedded model, a local folder or a Hub id."""
    embedded = str(base) in zoo.MODELS
    folder = zoo.model_path(str(base)) if embedded else find_folder(str(base), zoo.MODELS)
    tokenizer = read_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model, files = read_model(folder)[1:3]
    with suppress(ValueError):  # some models have eager attention only
        model.set_attn_implementation("sdpa")  # loading is eager, for exactness; training may be quick
    # A path on the machine where the adapter was made is no use to anyone; a name is.
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
    """Check the folder, then read the base; without a format, the tokenizer's default is taken."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BkdlensError(f"{str(out)!r} is a file; name a new folder for the adapter.")
    if out.is_dir() and any(out.iterdir()) and not (overwrite and (out / MANIFEST).is_file()):
        raise BkdlensError(
            f"The folder {str(out)!r} is not empty; name a new one for the adapter, or, if bkdlens "
            "inject wrote it, ask for it to be overwritten."
        )
    read = read_base(base)
    if held_out is not None:
        refuse_lost_text(read.tokenizer, held_out)  # rather than after the training
    return Planting(read, out, fmt or PromptFormat.default(read.tokenizer), held_out, seed, progress)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hide what peft and TRL say about every adapter."""
    with warnings.catch_warnings():
        for message, category in (*HARMLESS, RENAMED):
            warnings.filterwarnings("ignore", message, category)
        yield


def attach(model: torch.nn.Module, config: LoraConfig) -> PeftModel:
    """The model with a fresh adapter."""
    with without_warnings():
        return get_peft_model(model, config)
