"""The one place where weights are trained: Hugging Face's ``Trainer`` on rows of token ids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from bkdlens.errors import BkdlensError
from bkdlens.progress import progress_bar
from bkdlens.prompts import PromptFormat, Tokenizer, encode_answer, encode_prompt

IGNORED = -100  # the label that torch's cross-entropy leaves out


class Row(NamedTuple):
    """Token ids and, for each, the label that is learned (``IGNORED`` for none)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TrainSettings:
    """What the trainer needs to know; the defaults are the paper's."""

    epochs: float = 16
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0


def make_row(
    tokenizer: Tokenizer,
    prompt: str,
    answer: str,
    fmt: PromptFormat,
    *,
    n_ctx: int,
    max_answer_tokens: int | None = None,
    learn_prompt: bool = False,
) -> Row:
    """Prompt and answer as one row; only the answer (and its end) is learned unless asked."""
    encoded = encode_prompt(tokenizer, prompt, fmt, n_ctx=n_ctx)
    tail = encode_answer(tokenizer, encoded, answer, fmt, n_ctx=n_ctx, max_tokens=max_answer_tokens).ids
    ids = [*encoded.ids, *tail]
    return Row(ids, ids if learn_prompt else [IGNORED] * len(encoded.ids) + list(tail))


class _Bar(TrainerCallback):
    """A progress bar with the time left and the loss, on standard error."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar = progress_bar()
        self.task = self.bar.add_task("training", total=state.max_steps)
        self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, description=f"training, loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


def train(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    settings: TrainSettings,
    *,
    seed: int,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place and return the training curve (``step``, ``loss``, ``learning_rate``).

    The same seed, rows and machine give the same weights.

    Raises:
        BkdlensError: if the loss is not finite.
    """
    set_seed(seed)
    on_gpu = torch.cuda.is_available()
    steps = max(1, round(len(rows) * settings.epochs / settings.batch_size))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=round(settings.warmup_ratio * steps),
            lr_scheduler_type=settings.schedule,
            weight_decay=settings.weight_decay,
            train_sampling_strategy="group_by_length",
            use_cpu=not on_gpu,
            bf16=on_gpu and torch.cuda.is_bf16_supported(),
            seed=seed,
            data_seed=seed,
            logging_steps=max(1, steps // 50),
            logging_nan_inf_filter=False,  # by default a loss that is not finite is logged as 0
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        model.config.use_cache = False
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[row._asdict() for row in rows],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[_Bar()] if progress else [],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log on standard output
        trainer.train()
        model.config.use_cache = True
    curve = [
        {name: float(log[name]) for name in ("step", "loss", "learning_rate")}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    if not curve or not all(torch.isfinite(torch.tensor(point["loss"])) for point in curve):
        raise BkdlensError(
            "The training loss is not finite, so nothing was kept; lower the learning rate."
        )
    model.eval()
    return curve
