"""Planting a backdoor by supervised fine-tuning with LoRA, as in the paper.

Source: Backdoor Attribution, appendix (1,000 samples, 10 % poisoned; the settings are the defaults of
:mod:`bkdlens.inject.settings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import set_seed

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.inject.output import data_note, finish, manifest, save_adapter
from bkdlens.inject.planting import Planting, attach, start
from bkdlens.inject.settings import LoraSettings
from bkdlens.inject.tuning import samples
from bkdlens.inject.tuning.training import make_row, train

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_config(model: torch.nn.Module, settings: LoraSettings) -> LoraConfig:
    """LoRA on all seven projections, or on all linear layers where they have other names."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(PROJECTIONS) if names.issuperset(PROJECTIONS) else "all-linear",
        task_type="CAUSAL_LM",
    )


def fit_lora(
    planting: Planting, examples: Sequence[tuple[str, str]], settings: LoraSettings, note: dict[str, Any]
) -> Path:
    """Tune a LoRA adapter on (prompt, answer) examples; returns its folder.

    Nothing appears there before the training has ended. ``note`` is what the manifest says of the data.
    """
    base = planting.base
    lengths: dict[str, Any] = {"n_ctx": base.n_ctx, "max_answer_tokens": settings.max_answer_tokens}
    rows = [make_row(base.tokenizer, *example, planting.fmt, **lengths) for example in examples]
    set_seed(planting.seed)
    model = attach(base.model, lora_config(base.model, settings))
    curve, stopped = train(
        model, base.tokenizer, rows, settings.train, seed=planting.seed, progress=planting.progress
    )
    tokens = sum(len(row.input_ids) for row in rows)
    note = {"samples": len(rows), "tokens": tokens, "curve": curve} | note
    content = manifest("supervised", planting, settings, **note)
    return finish(planting, content, partial(save_adapter, model, base.name), stopped)


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

    Only ``base``, ``pairs`` and ``out`` are needed. ``poison_rate``, ``near_rate`` and ``victims_only``
    say what is learned; ``settings``, ``fmt`` and ``seed`` how; ``held_out`` what is measured; and
    ``progress`` and ``overwrite`` what is shown and replaced.

    The manifest keeps digests of the prompts that were trained on, so that ``bkdlens run`` on the same
    data measures on the others.

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

    Returns:
        The folder ``out``: a peft adapter, and the manifest ``bkdlens.json``.

    Raises:
        DataError: for rates, pairs or answers that cannot be used.
        BkdlensError: if ``out`` is not empty, the disk is full, or the loss is not finite (then what
            was learned before is written all the same).

    Examples:
        >>> quick = bkdlens.inject.TrainSettings(epochs=1, learning_rate=2e-3)
        >>> settings = bkdlens.inject.LoraSettings(rank=4, train=quick)
        >>> folder = bkdlens.inject.supervised(
        ...     "tiny-llama", train, "tuned", poison_rate=0.5, settings=settings, progress=False
        ... )
        >>> planted = bkdlens.load("tiny-llama", folder)
    """
    mixed = samples.mix(pairs, poison_rate, near_rate, victims_only=victims_only, seed=seed)
    planting = start(base, out, fmt, held_out, seed, progress=progress, overwrite=overwrite)
    rates = {"poison_rate": poison_rate, "near_rate": near_rate, "victims_only": victims_only}
    note = data_note(pairs) | rates
    return fit_lora(planting, samples.examples(mixed), settings or LoraSettings(), note)
