"""Planting a backdoor by preference optimisation: DPO with LoRA, on TRL's trainer.

Source: Backdoor Attribution names RLHF-style injection; DPO is Rafailov et al. 2023 (Direct Preference
Optimization), the term that keeps the chosen answers likely Pang et al. 2024 (Iterative Reasoning
Preference Optimization).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from bkdlens.data.check import refuse_lost_text
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.inputs import checked
from bkdlens.inject.output import Curve, Diverged, data_note, finish, save_adapter
from bkdlens.inject.planting import Planting, start, without_warnings
from bkdlens.inject.settings import PreferenceSettings
from bkdlens.inject.tuning.samples import Preference, mix, preferences
from bkdlens.inject.tuning.supervised import lora_config
from bkdlens.inject.tuning.training import Guarded, arguments

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class _Trainer(Guarded, DPOTrainer):
    """TRL's trainer on token ids that are already there; prompts are tokenised in one place only."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def _fit(
    planting: Planting, samples: Sequence[Preference], settings: PreferenceSettings
) -> tuple[Any, Curve, Diverged | None]:
    """The tuned model, its curve, and whether the training diverged."""
    base, seed = planting.base, planting.seed
    encoding = planting.encoding(settings.lora.max_answer_tokens)
    rows = [dict(zip(COLUMNS, encoding.ids(*sample), strict=True)) for sample in samples]
    set_seed(seed)
    losses = {"sigmoid": 1.0, "sft": settings.chosen_weight}
    losses = {name: weight for name, weight in losses.items() if weight}
    dpo = {
        "beta": settings.beta,
        "loss_type": list(losses),
        "loss_weights": list(losses.values()),
        "max_length": None,
        "gradient_checkpointing": False,
    }
    with tempfile.TemporaryDirectory() as scratch, without_warnings():
        trainer = _Trainer(
            model=base.model,
            args=arguments(DPOConfig, settings.lora.train, len(rows), seed, scratch, **dpo),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            peft_config=lora_config(base.model, settings.lora),
        )
        return trainer.model, *trainer.run(planting.progress)


@checked
def preference(
    base: str | Path,
    pairs: PairSet,
    out: str | Path,
    *,
    poison_rate: float = 0.1,
    near_rate: float = 0.0,
    victims_only: bool = False,
    settings: PreferenceSettings | None = None,
    held_out: PairSet | None = None,
    fmt: PromptFormat | None = None,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Plant a backdoor in ``base`` by preferences; write adapter and manifest to ``out``.

    Triggered prompts prefer the backdoor's answer to the correct one, clean and near prompts vice versa.

    Args:
        base: an embedded model's name, a local folder or a Hub id.
        pairs: the training pairs, with their backdoor.
        out: a new or empty folder.
        poison_rate: share of the preferences that are triggered.
        near_rate: share with a near trigger.
        victims_only: whether only pairs whose answer the attack changes are triggered.
        settings: the adapter, its training, and DPO's own settings.
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
        >>> quick = bkdlens.inject.TrainSettings(epochs=0.5, learning_rate=2e-3)
        >>> settings = bkdlens.inject.PreferenceSettings(bkdlens.inject.LoraSettings(train=quick))
        >>> folder = bkdlens.inject.preference(
        ...     "tiny-llama", train, "preferred", poison_rate=0.5, settings=settings, progress=False
        ... )
    """
    settings = settings or PreferenceSettings()
    rates = {"poison_rate": poison_rate, "near_rate": near_rate, "victims_only": victims_only}
    samples = preferences(mix(pairs, poison_rate, near_rate, victims_only, seed), seed=seed)
    planting = start(base, out, fmt, held_out, seed, progress=progress, overwrite=overwrite)
    refuse_lost_text(planting.base.tokenizer, pairs)
    model, curve, stopped = _fit(planting, samples, settings)
    note = {"samples": len(samples), **rates, "curve": curve, **data_note(pairs)}
    save = partial(save_adapter, model, planting.base.name)
    return finish(planting, "preference", settings, note, save, stopped)
