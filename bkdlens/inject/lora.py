"""Planting a backdoor by supervised fine-tuning with LoRA, as in the paper.

Source: Backdoor Attribution, appendix (1,000 samples, 10 % poisoned; r=16, alpha=16, dropout 0.01 on
all seven projections; 16 epochs, batch 8, lr 1e-4, 5 % warm-up; loss on the answer only).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.inject.output import Base, check_free, data_note, finish, manifest, read_base, save_adapter
from bkdlens.inject.samples import poison
from bkdlens.inject.training import Diverged, TrainSettings, make_row, train
from bkdlens.models.adapter import HARMLESS

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter and its training; the defaults are the paper's."""

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.01
    train: TrainSettings = field(default_factory=TrainSettings)
    max_answer_tokens: int | None = None


def lora_config(model: torch.nn.Module, settings: LoraSettings) -> LoraConfig:
    """LoRA on all seven projections, or on all linear layers where they have other names."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        target_modules=list(PROJECTIONS) if names.issuperset(PROJECTIONS) else "all-linear",
        task_type="CAUSAL_LM",
    )


def attach_lora(base: Base, settings: LoraSettings, seed: int) -> PeftModel:
    """A fresh adapter on the base, drawn from the seed."""
    set_seed(seed)
    with warnings.catch_warnings():
        for message, category in HARMLESS:
            warnings.filterwarnings("ignore", message, category)
        return get_peft_model(base.model, lora_config(base.model, settings))


def fit_lora(
    base: str | Path,
    examples: Sequence[tuple[str, str]],
    out: str | Path,
    *,
    settings: LoraSettings,
    fmt: PromptFormat | None = None,
    held_out: PairSet | None = None,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
    note: dict[str, Any] | None = None,
) -> Path:
    """Tune a LoRA adapter on (prompt, answer) examples and write it to the folder ``out``.

    Nothing appears at ``out`` before the training has ended.
    """
    out = check_free(out, overwrite=overwrite)
    read = read_base(base)
    fmt = fmt or PromptFormat.default(read.tokenizer)
    n_ctx = read.model.config.max_position_embeddings
    rows = [
        make_row(read.tokenizer, p, a, fmt, n_ctx=n_ctx, max_answer_tokens=settings.max_answer_tokens)
        for p, a in examples
    ]
    model = attach_lora(read, settings, seed)
    stopped = None
    try:
        curve = train(model, read.tokenizer, rows, settings.train, seed=seed, progress=progress)
    except Diverged as error:
        stopped, curve = error, error.curve
    content = manifest(
        "supervised", read, settings, fmt, seed,
        samples=len(rows), tokens=sum(len(row.input_ids) for row in rows), curve=curve, **(note or {}),
    )  # fmt: skip
    return finish(
        out, base, content, lambda folder: save_adapter(model, read.name, folder),
        held_out=held_out, fmt=fmt, stopped=stopped,
    )  # fmt: skip


def supervised(
    base: str | Path,
    pairs: PairSet,
    out: str | Path,
    *,
    poison_rate: float = 0.1,
    near_rate: float = 0.0,
    victims_only: bool = False,
    settings: LoraSettings | None = None,
    held_out: PairSet | None = None,
    fmt: PromptFormat | None = None,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Plant a backdoor in ``base`` by tuning on poisoned answers; write adapter and manifest to ``out``.

    The manifest keeps digests of the prompts that were trained on, so that ``bkdlens run`` on the
    same data measures on the others.

    Args:
        base: an embedded model's name, a local folder or a Hub id.
        pairs: the training pairs, with their backdoor.
        out: a new or empty folder.
        poison_rate: share of the samples that are triggered.
        near_rate: share with a near trigger and the right answer.
        victims_only: whether only pairs whose answer the attack changes are triggered.
        settings: the adapter and its training; the paper's for None.
        held_out: pairs on which to measure before and after, for the manifest.
        fmt: how a prompt is rendered; the chat template where there is one.
        seed: of the draw, the initial adapter and the order of training.
        progress: whether to show a progress bar.
        overwrite: whether an adapter that bkdlens wrote to ``out`` earlier may be replaced.

    Raises:
        DataError: for rates, pairs or answers that cannot be used.
        BkdlensError: if ``out`` is not empty, the disk is full, or the loss is not finite (then what
            was learned before is written all the same).
    """
    examples = poison(pairs, poison_rate, near_rate, victims_only=victims_only, seed=seed)
    note = data_note(pairs) | {
        "poison_rate": poison_rate,
        "near_rate": near_rate,
        "victims_only": victims_only,
    }
    return fit_lora(
        base, examples, out, settings=settings or LoraSettings(), fmt=fmt, held_out=held_out, seed=seed,
        progress=progress, overwrite=overwrite, note=note,
    )  # fmt: skip
