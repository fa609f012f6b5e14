"""The one place where weights are trained: Hugging Face's ``Trainer`` on rows of token ids."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from rich.progress import Progress
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from bkdlens.data.prompts import Tokenizer
from bkdlens.errors import BkdlensError
from bkdlens.inject.output import Curve, Diverged
from bkdlens.inject.planting import Encoding
from bkdlens.inject.settings import TrainSettings
from bkdlens.progress import progress_bar

IGNORED = -100  # the label that torch's cross-entropy leaves out
A = TypeVar("A", bound=TrainingArguments)


class Row(NamedTuple):
    """Token ids and, for each, the label that is learned (``IGNORED`` for none)."""

    input_ids: list[int]
    labels: list[int]


def make_row(encoding: Encoding, prompt: str, answer: str, *, learn_prompt: bool = False) -> Row:
    """Prompt and answer as one row; only the answer (and its end) is learned unless asked."""
    prompt_ids, tail = encoding.ids(prompt, answer)
    ids = prompt_ids + tail
    return Row(ids, ids if learn_prompt else [IGNORED] * len(prompt_ids) + tail)


def share_batch(batch_size: int, device_batch_size: int | None, processes: int) -> tuple[int, int]:
    """Samples at once per device and steps of accumulation, which share the batch evenly."""
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
    """The trainer's arguments for ``n`` samples; the trainer writes to ``out`` only."""
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
        made._n_gpu = 1  # several GPUs in one process would multiply the batch; launching shares it
    return made


class _Stop(Exception):
    """Raised to leave the trainer's loop."""


class Guarded(Trainer):
    """A trainer that stops at a loss that is not finite and goes back to the last good weights.

    Weights are good when the loss that was computed with them is finite.
    """

    good: tuple[int, dict[str, torch.Tensor]] | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of one forward and backward pass, which has to be finite."""
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

    def run(self, progress: bool) -> tuple[Curve, Diverged | None]:
        """Train; returns what was logged with each loss, and whether loss or weights diverged."""
        self.remove_callback(PrinterCallback)  # it prints every log on standard output
        self.model.config.use_cache = False
        stopped = False
        with ExitStack() as stack:
            if progress and self.args.process_index == 0:
                self.add_callback(_Bar(stack.enter_context(progress_bar())))
            try:
                self.train()
            except _Stop:
                stopped = True
            finally:
                self.model.config.use_cache = True
        curve = [
            {name: float(value) for name, value in log.items() if isinstance(value, int | float)}
            for log in self.state.log_history
            if "loss" in log
        ]
        if not stopped and all(bool(p.isfinite().all()) for _, p in self._trained()):
            self.model.eval()
            return curve, None
        kept, weights = self.good or (0, {})
        self.accelerator.unwrap_model(self.model).load_state_dict(weights, strict=False)
        return curve, Diverged(self.state.global_step + 1, kept)


class _Bar(TrainerCallback):
    """A progress bar with the time left and the loss, on standard error."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.task = bar, bar.add_task("training", total=None)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show how many steps are done."""
        self.bar.update(self.task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Show the loss."""
        if "loss" in logs:
            self.bar.update(self.task, description=f"training, loss {float(logs['loss']):.3f}")


def train(
    model: Any, tokenizer: Tokenizer, rows: list[Row], settings: TrainSettings, seed: int, progress: bool
) -> tuple[Curve, Diverged | None]:
    """Train ``model`` in place, reproducibly per machine; returns the curve and whether it diverged."""
    set_seed(seed)
    grouped = {"train_sampling_strategy": "group_by_length"}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Guarded(
            model=model,
            args=arguments(TrainingArguments, settings, len(rows), seed, scratch, **grouped),
            train_dataset=[row._asdict() for row in rows],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        return trainer.run(progress)
