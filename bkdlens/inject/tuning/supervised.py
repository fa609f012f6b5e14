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

from bkdlens.data.check import refuse_lost_text
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.inputs import checked
from bkdlens.inject.output import data_note, finish, save_adapter
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
    """The folder of a LoRA adapter tuned on (prompt, answer) examples; ``note`` goes to the manifest."""
    base, seed = planting.base, planting.seed
    encoding = planting.encoding(settings.max_answer_tokens)
    rows = [make_row(encoding, *example) for example in examples]
    set_seed(seed)
    model = attach(base.model, lora_config(base.model, settings))
    curve, stopped = train(model, base.tokenizer, rows, settings.train, seed, planting.progress)
    tokens = sum(len(row.input_ids) for row in rows)
    note = {"samples": len(rows), "tokens": tokens, "curve": curve} | note
    save = partial(save_adapter, model, base.name)
    return finish(planting, "supervised", settings, note, save, stopped)


@checked
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

    The manifest keeps digests of the prompts that were trained on, so that ``bkdlens run`` on the same
    data measures on the others.

    Args:
        base: an embedded model's name, a local folder or a Hub id.
        pairs: the training pairs, with their backdoor.
        out: a new or empty folder.
        poison_rate: share of the samples that are triggered.
        near_rate: share with a near trigger and the correct answer.
        victims_only: whether only pairs whose answer the attack changes are triggered.
        settings: the adapter and its training; None for the paper's.
        held_out: pairs on which to measure before and after, for the manifest.
        fmt: how a prompt is rendered; None for the chat template where there is one.
        seed: seed of the draw, the initial adapter and the order of training.
        progress: whether to show a progress bar.
        overwrite: whether an adapter that bkdlens wrote to ``out`` earlier may be replaced.

    Returns:
        The folder ``out``: a peft adapter, and the manifest ``bkdlens.json``.

    Raises:
        DataError: for rates, pairs or answers that cannot be used.
        BkdlensError: if ``out`` is not empty, the disk is full, or the loss is not finite (what was
            learned before is then written nonetheless).

    Examples:
        >>> quick = bkdlens.inject.TrainSettings(epochs=1, learning_rate=2e-3)
        >>> settings = bkdlens.inject.LoraSettings(rank=4, train=quick)
        >>> folder = bkdlens.inject.supervised(
        ...     "tiny-llama", train, "tuned", poison_rate=0.5, settings=settings, progress=False
        ... )
    """
    rates = {"poison_rate": poison_rate, "near_rate": near_rate, "victims_only": victims_only}
    mixed = samples.mix(pairs, poison_rate, near_rate, victims_only, seed)
    planting = start(base, out, fmt, held_out, seed, progress=progress, overwrite=overwrite)
    refuse_lost_text(planting.base.tokenizer, pairs)
    note = data_note(pairs) | rates
    return fit_lora(planting, samples.examples(mixed), settings or LoraSettings(), note)
