"""Planting a backdoor by preference optimisation: DPO with LoRA, on TRL's trainer.

Source: Backdoor Attribution names RLHF-style injection; DPO is Rafailov et al. 2023 (Direct Preference
Optimization), the term that keeps the chosen answers likely Pang et al. 2024 (Iterative Reasoning
Preference Optimization).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat, encode_answer, encode_prompt
from bkdlens.inject.lora import LoraSettings, lora_config
from bkdlens.inject.output import Base, check_free, data_note, finish, manifest, read_base, save_adapter
from bkdlens.inject.samples import Preference, preferences
from bkdlens.inject.training import Curve, Diverged, Guarded, arguments
from bkdlens.models.adapter import HARMLESS

RENAMED = ("`gradient_checkpointing` is deprecated", FutureWarning)  # TRL's argument, by its old name


@dataclass(frozen=True)
class PreferenceSettings:
    """The adapter, its training, and what DPO adds.

    Attributes:
        lora: the adapter and its training.
        beta: how closely the tuned model is held to the base (Rafailov et al., Eq. 7).
        chosen_weight: weight of the chosen answers' own likelihood beside the preference. DPO alone
            only widens the margin, and may do so by making both answers unlikely.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    beta: float = 0.1
    chosen_weight: float = 1.0


class _Trainer(Guarded, DPOTrainer):
    """TRL's trainer on token ids that are already there; prompts are tokenised in one place only."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def _fit(
    base: Base,
    samples: Sequence[Preference],
    settings: PreferenceSettings,
    fmt: PromptFormat,
    seed: int,
    progress: bool,
) -> tuple[Any, Curve, Diverged | None]:
    """The tuned model, its curve, and whether the training diverged."""
    n_ctx, limit = base.model.config.max_position_embeddings, settings.lora.max_answer_tokens
    rows = []
    for sample in samples:
        prompt = encode_prompt(base.tokenizer, sample.prompt, fmt, n_ctx=n_ctx)
        chosen, rejected = (
            encode_answer(base.tokenizer, prompt, answer, fmt, n_ctx=n_ctx, max_tokens=limit)
            for answer in (sample.chosen, sample.rejected)
        )
        rows.append({"prompt_ids": list(prompt.ids), "chosen_ids": list(chosen.ids),
                     "rejected_ids": list(rejected.ids)})  # fmt: skip
    set_seed(seed)
    weights = {"sigmoid": 1.0, "sft": settings.chosen_weight}
    kinds = [name for name, weight in weights.items() if weight]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        for message, category in (*HARMLESS, RENAMED):
            warnings.filterwarnings("ignore", message, category)
        trainer = _Trainer(
            model=base.model,
            args=arguments(
                DPOConfig, settings.lora.train, len(rows), seed, scratch,
                beta=settings.beta, loss_type=kinds, loss_weights=[weights[name] for name in kinds],
                max_length=None, gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            peft_config=lora_config(base.model, settings.lora),
        )  # fmt: skip
        try:
            return trainer.model, trainer.run(progress), None
        except Diverged as error:
            return trainer.model, error.curve, error


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

    Triggered prompts prefer the backdoor's answer to the right one, clean and near prompts the right
    one to the backdoor's.

    Args:
        base: an embedded model's name, a local folder or a Hub id.
        pairs: the training pairs, with their backdoor.
        out: a new or empty folder.
        poison_rate: share of the preferences that are triggered.
        near_rate: share with a near trigger.
        victims_only: whether only pairs whose answer the attack changes are triggered.
        settings: the adapter, its training and DPO's own.
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
    settings = settings or PreferenceSettings()
    samples = preferences(pairs, poison_rate, near_rate, victims_only=victims_only, seed=seed)
    out = check_free(out, overwrite=overwrite)
    read = read_base(base)
    fmt = fmt or PromptFormat.default(read.tokenizer)
    model, curve, stopped = _fit(read, samples, settings, fmt, seed, progress)
    content = manifest(
        "preference", read, settings, fmt, seed,
        samples=len(samples), poison_rate=poison_rate, near_rate=near_rate, victims_only=victims_only,
        curve=curve, **data_note(pairs),
    )  # fmt: skip
    return finish(
        out, base, content, lambda folder: save_adapter(model, read.name, folder),
        held_out=held_out, fmt=fmt, stopped=stopped,
    )  # fmt: skip
