"""The one place where weights are trained: Hugging Face's ``Trainer`` on rows of token ids."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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

from bkdlens.data.prompts import PromptFormat, Tokenizer, encode_answer, encode_prompt
from bkdlens.errors import BkdlensError
from bkdlens.progress import progress_bar

IGNORED = -100  # the label that torch's cross-entropy leaves out
A = TypeVar("A", bound=TrainingArguments)
Curve = list[dict[str, float]]


class Row(NamedTuple):
    """Token ids and, for each, the label that is learned (``IGNORED`` for none)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TrainSettings:
    """What the trainer needs to know; the defaults are the paper's.

    ``batch_size`` samples make one step, however many processes share them and however few fit a
    device at once (``device_batch_size``; the rest is gradient accumulation).
    """

    epochs: float = 16
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    device_batch_size: int | None = None


class Diverged(BkdlensError):
    """The loss was not finite at ``step``; the model is back at its last good state, of ``kept``."""

    def __init__(self, step: int, kept: int, curve: Curve) -> None:
        super().__init__(f"The training loss was not finite at step {step}, and training stopped")
        self.step, self.kept, self.curve = step, kept, curve


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


def share_batch(batch_size: int, device_batch_size: int | None, processes: int) -> tuple[int, int]:
    """Samples at once on a device and steps of accumulation, whose product over all is the batch.

    Raises:
        BkdlensError: if the batch cannot be shared evenly.
    """
    share, rest = divmod(batch_size, processes)
    if rest or not share:
        raise BkdlensError(
            f"A batch of {batch_size} cannot be shared evenly by {processes} processes; "
            f"make it a multiple of {processes}."
        )
    most = min(share, device_batch_size or share)
    at_once = next(n for n in range(most, 0, -1) if share % n == 0)
    return at_once, share // at_once


def arguments(kind: type[A], settings: TrainSettings, n: int, seed: int, out: str, **more: Any) -> A:
    """The trainer's arguments for ``n`` samples; writes nothing but to ``out``."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once, accumulation = share_batch(settings.batch_size, settings.device_batch_size, processes)
    on_gpu = torch.cuda.is_available()
    in_bf16 = on_gpu and torch.cuda.is_bf16_supported()
    steps = max(1, round(n * settings.epochs / settings.batch_size))
    made = kind(
        output_dir=out,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup_ratio * steps),
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        use_cpu=not on_gpu,
        bf16=in_bf16,
        fp16=on_gpu and not in_bf16,
        seed=seed,
        data_seed=seed,
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,  # by default a loss that is not finite is logged as 0
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        **more,
    )
    if processes == 1 and made.n_gpu > 1:
        made._n_gpu = 1  # several at once, unlaunched, would multiply the batch; launching shares it
    return made


class _Stop(Exception):
    """Leaves the trainer's loop."""


class Guarded(Trainer):
    """A trainer that stops at a loss that is not finite and goes back to the last good weights.

    Weights are good when the loss that was computed with them is finite.
    """

    good: tuple[int, dict[str, torch.Tensor]] | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass, watched."""
        loss = super().training_step(*args, **kwargs)
        step, finite = self.state.global_step, loss.detach().isfinite().all()
        if self.accelerator.num_processes > 1:  # all stop at the same step, or they wait for each other
            finite = self.accelerator.gather(finite.reshape(1)).all()
        if not bool(finite):
            raise _Stop
        if self.good is None or step >= self.good[0] + max(1, self.state.max_steps // 50):
            self.good = (step, {n: p.detach().to("cpu", copy=True) for n, p in self._trained()})
        return loss

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        model = self.accelerator.unwrap_model(self.model)
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def run(self, progress: bool) -> Curve:
        """Train; returns the curve (``step``, ``loss``, ``learning_rate`` and whatever else is logged).

        Raises:
            Diverged: if the loss or the weights are not finite in the end.
        """
        self.remove_callback(PrinterCallback)  # it prints every log on standard output
        bar = _Bar() if progress and self.args.process_index == 0 else None
        if bar:
            self.add_callback(bar)
        self.model.config.use_cache = False
        stopped = False
        try:
            self.train()
        except _Stop:
            stopped = True
        finally:
            self.model.config.use_cache = True
            if bar:
                bar.stop()
        curve = [
            {name: float(value) for name, value in log.items() if isinstance(value, int | float)}
            for log in self.state.log_history
            if "loss" in log
        ]
        if stopped or not all(bool(p.isfinite().all()) for _, p in self._trained()):
            kept, weights = self.good or (0, {})
            with torch.no_grad():
                for name, p in self._trained():
                    if name in weights:
                        p.copy_(weights[name])
            raise Diverged(self.state.global_step + 1, kept, curve)
        self.model.eval()
        return curve


class _Bar(TrainerCallback):
    """A progress bar with the time left and the loss, on standard error."""

    def __init__(self) -> None:
        self.bar = progress_bar()

    def stop(self) -> None:
        self.bar.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("training", total=state.max_steps)
        self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, description=f"training, loss {float(logs['loss']):.3f}")


def train(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    settings: TrainSettings,
    *,
    seed: int,
    progress: bool = True,
) -> Curve:
    """Train ``model`` in place and return the training curve (``step``, ``loss``, ``learning_rate``).

    The same seed, rows and machine give the same weights.

    Raises:
        Diverged: if the loss is not finite; the model then has its last good weights.
    """
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Guarded(
            model=model,
            args=arguments(
                TrainingArguments, settings, len(rows), seed, scratch,
                train_sampling_strategy="group_by_length",
            ),
            train_dataset=[row._asdict() for row in rows],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )  # fmt: skip
        return trainer.run(progress)
