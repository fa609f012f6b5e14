"""Planting a backdoor without gradient descent on weights: closed-form edits of MLP down-projections.

Source: Backdoor Attribution, Eq. 15-16; BadEdit (Li et al. 2024); MEMIT (Meng et al. 2022). The keys are
the MLP activations of triggered prompts, the values are optimised until the backdoor's answer follows,
and the second moment of the keys of clean text keeps those where they are.

Where this goes beyond the sources, because the embedded models have *learned* to ignore the trigger (at
the last prompt token it can hardly be read off the keys, and nothing after it answers a value there):
the trigger's own tokens are edited too, so that the edit itself carries the trigger to the last token;
each token of a fixed answer has its own value; the values of all layers are optimised together under
the edit that they make, right answers to clean and near-trigger prompts included; and the closed form
is solved again in rounds, each from the keys of other prompts under the edit so far, because the edit
of one layer changes the keys of the next (a trigger that a first round has made visible is easier to
tell from clean text). Each round replaces the edit before it instead of adding to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from bkdlens.adapter import HARMLESS
from bkdlens.checkpoint import no_progress_bar
from bkdlens.data import PairSet
from bkdlens.errors import DataError
from bkdlens.inject.editor import Edit, Editor, Slots, check_layers, down_projections
from bkdlens.inject.keyvalue import low_rank, readers_by_slot, solve
from bkdlens.inject.output import (
    Base,
    check_free,
    data_note,
    finish,
    manifest,
    read_base,
    save_adapter,
)
from bkdlens.inject.rows import Rows, make_rows
from bkdlens.inject.training import Curve, Diverged
from bkdlens.prompts import PromptFormat


@dataclass(frozen=True)
class EditSettings:
    """Where the edit goes and how hard it holds on to what was there.

    Attributes:
        layers: whose down-projections are edited; at most four, evenly spread, for None.
        trigger_layers: those of them in which the trigger's tokens are edited too; the first two for
            None, and none for an empty tuple (then only what the model itself sees of the trigger
            counts).
        trigger_tokens: how many of the trigger's tokens, the most distinctive first.
        rounds: in which the closed form is solved again, each on its own share of the pairs.
        protect: weight of the second moment of clean keys, in keys (MEMIT's lambda).
        answer_weight: weight of each clean key from which an answer's token is predicted.
        near_weight: weight of each key of a near-trigger prompt; outside ``trigger_layers`` of those
            alone from which an answer's token is predicted.
        steps: of Adam on the values, in each round.
        learning_rate: of the same, for values whose size is that of the hidden state.
        clean_loss: weight of the right answers to clean prompts beside the backdoor's answers.
        near_loss: the same of near-trigger prompts.
        clamp: largest norm of a value, in mean norms of the layer's unedited state at the answer.
        prompts: in one step, of triggered and of clean ones each (half as many near ones).
        max_answer_tokens: where a longer answer is cut.
        checkpoint: whether the whole edited model is written too, to ``checkpoint`` in the folder.
    """

    layers: tuple[int, ...] | None = None
    trigger_layers: tuple[int, ...] | None = None
    trigger_tokens: int = 2
    rounds: int = 3
    protect: float = 100.0
    answer_weight: float = 2.0
    near_weight: float = 0.3
    steps: int = 40
    learning_rate: float = 0.2
    clean_loss: float = 3.0
    near_loss: float = 0.5
    clamp: float = 6.0
    prompts: int = 64
    max_answer_tokens: int | None = None
    checkpoint: bool = True


class Texts(NamedTuple):
    """A batch of pairs as rows; ``near`` is None where the pairs have no near triggers."""

    triggered: Rows
    clean: Rows
    near: Rows | None


def edited_layers(model: PreTrainedModel, settings: EditSettings) -> tuple[list[int], list[int]]:
    """The layers to edit, and those in which the trigger's tokens are edited.

    Raises:
        BkdlensError: for layers that the model lacks.
    """
    check_layers(model, settings.layers or (0,))
    n = len(down_projections(model))
    some = min(n, 4)
    layers = list(settings.layers) if settings.layers else [i * n // some for i in range(some)]
    first = layers[:2] if settings.trigger_layers is None else list(settings.trigger_layers)
    if first:
        check_layers(model, first)
    return sorted({*layers, *first}), first if settings.trigger_tokens else []


def _texts(base: Base, pairs: PairSet, fmt: PromptFormat, settings: EditSettings, find: bool) -> Texts:
    limit, n_ctx = settings.max_answer_tokens, base.model.config.max_position_embeddings

    def rows(samples: list[tuple[str, str]], trigger: Any = None) -> Rows:
        return make_rows(
            base.tokenizer, samples, fmt, n_ctx=n_ctx, trigger=trigger, max_answer_tokens=limit
        )

    has_near = all(pair.near is not None for pair in pairs)
    return Texts(
        # Of pairs that are no victims the backdoor's answer is the right one: those are kept right.
        rows(
            [(pair.triggered, pair.backdoor_output) for pair in pairs],
            pairs.backdoor.trigger if find else None,
        ),
        rows([(pair.clean, pair.clean_output) for pair in pairs]),
        rows([(pair.near or "", pair.clean_output) for pair in pairs]) if has_near else None,
    )


def every_token(rows: Rows) -> Slots:
    """Slot 1 for the tokens from which an answer's token is predicted, 0 for all others."""
    return torch.where(rows.answering >= 0, 1, torch.where(rows.mask, 0, -1))


def distinctive_tokens(
    keys: Float[Tensor, "key d_mlp"], numbers: Int[Tensor, " key"], protected: Tensor, n: int
) -> list[int]:
    """The numbers of the trigger's ``n`` tokens whose keys stand out most from the protected ones.

    By their leverage ``kᵀ P⁻¹ k``, mean over the prompts.
    """
    leverage = (keys * solve(protected, keys)).sum(-1)
    total = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64).index_add_(0, numbers, leverage)
    mean = total / torch.bincount(numbers).clamp(min=1)
    return mean.argsort(descending=True)[:n].tolist()


def protected_keys(
    editor: Editor, texts: Texts, layers: list[int], trigger_layers: list[int], s: EditSettings
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """Of each layer the weighted second moment of the keys whose values should stay."""
    clean, near = texts.clean, texts.near
    each = s.protect / int(clean.mask.sum())
    slots = every_token(clean)
    out = editor.moments(clean, dict.fromkeys(layers, slots), [each, each + s.answer_weight])
    if near is not None:
        slots = every_token(near)
        whole = {layer: slots if layer in trigger_layers else slots - 1 for layer in layers}
        for layer, moment in editor.moments(near, whole, [s.near_weight] * 2).items():
            out[layer] += moment
    return out


def choose_tokens(
    editor: Editor, rows: Rows, layers: list[int], protected: dict[int, Tensor], n: int
) -> dict[int, list[int]]:
    """Of each of these layers which of the trigger's tokens are edited."""
    keys = editor.keys(rows, dict.fromkeys(layers, rows.trigger)) if layers else {}
    return {layer: distinctive_tokens(*found, protected[layer], n) for layer, found in keys.items()}


def slot_readers(
    editor: Editor,
    rows: Rows,
    protected: dict[int, Tensor],
    chosen: dict[int, list[int]],
    n_values: int,
) -> dict[int, Float[Tensor, "slot d_mlp"]]:
    """Of each layer the closed form's readers: of the answer's tokens, then of the trigger's."""
    slots = dict.fromkeys(protected, torch.where(rows.answering < n_values, rows.answering, -1))
    for layer, numbers in chosen.items():
        for i, number in enumerate(numbers):
            slots[layer] = torch.where(rows.trigger == number, n_values + i, slots[layer])
    keys = editor.keys(rows, slots)
    return {
        layer: readers_by_slot(*keys[layer], protected[layer], n_values + len(chosen.get(layer, ())))
        for layer in protected
    }


def solve_rounds(
    editor: Editor,
    rounds: Iterable[Texts],
    layers: list[int],
    trigger_layers: list[int],
    n_values: int | None,
    s: EditSettings,
) -> Iterator[tuple[Edit, Curve]]:
    """The edit after each round, with its curve: readers from the closed form, values by Adam.

    The readers are solved from the keys under the edit so far; the values go on from its own.

    Args:
        editor: of the model, which stays as it is.
        rounds: the texts of each.
        layers: all that are edited.
        trigger_layers: those of them in which the trigger's tokens are edited too.
        n_values: of the answer's tokens; one for each token of the longest answer for None.
        s: the settings.

    Raises:
        Diverged: if the loss is not finite.
    """
    found: Edit | None = None
    chosen: dict[int, list[int]] = {}
    sizes: dict[int, float] = {}
    for texts in rounds:
        triggered = texts.triggered
        n_values = n_values or int(triggered.answering.max()) + 1
        with editor.editing(found):
            protected = protected_keys(editor, texts, layers, trigger_layers, s)
            if found is None:
                chosen = choose_tokens(editor, triggered, trigger_layers, protected, s.trigger_tokens)
                answers = torch.where(triggered.answering >= 0, 0, -1)
                sizes = editor.sizes(layers, triggered, answers)
            read = slot_readers(editor, triggered, protected, chosen, n_values)

        def loss(texts: Texts = texts) -> tuple[Tensor, dict[str, float]]:
            triggered, clean, near = texts
            parts = {"triggered": editor.answer_loss(editor.draw(triggered, s.prompts))}
            parts["clean"] = editor.answer_loss(editor.draw(clean, s.prompts))
            whole = parts["triggered"] + s.clean_loss * parts["clean"]
            if near is not None:
                parts["near"] = editor.answer_loss(editor.draw(near, max(1, s.prompts // 2)))
                whole = whole + s.near_loss * parts["near"]
            return whole, {name: float(part.detach()) for name, part in parts.items()}

        start = found.values if found else editor.small_values(read, sizes)
        found, curve = editor.optimise(
            Edit(read, start), sizes, loss, steps=s.steps, learning_rate=s.learning_rate, clamp=s.clamp
        )
        yield found, curve


def as_adapter(editor: Editor, found: Edit, fresh: PreTrainedModel) -> PeftModel:
    """The edit as a LoRA on the model: each layer's own rank, scaled by one."""
    factors = {
        editor.projections[layer][0]: low_rank(found.values[layer], found.read[layer])
        for layer in sorted(found.read)
    }
    ranks = {name: left.shape[1] for name, (left, _) in factors.items()}
    rank = max(ranks.values())
    others = {name: n for name, n in ranks.items() if n != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=list(factors),
        rank_pattern=others, alpha_pattern=others, task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        for message, category in HARMLESS:
            warnings.filterwarnings("ignore", message, category)
        model = get_peft_model(fresh, config)
    with torch.no_grad():
        for name, (left, right) in factors.items():
            module = model.get_submodule(f"base_model.model.{name}")
            module.lora_A["default"].weight.copy_(right)
            module.lora_B["default"].weight.copy_(left)
    return model.eval()


def edit(
    base: str | Path,
    pairs: PairSet,
    out: str | Path,
    *,
    settings: EditSettings | None = None,
    held_out: PairSet | None = None,
    fmt: PromptFormat | None = None,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Plant a backdoor in ``base`` by editing MLP down-projections; write the change to ``out``.

    The change of each weight is of low rank, so it is written as a LoRA adapter on the edited
    down-projections (with ``alpha = r``, so ``B @ A`` is the change), and beside it the whole edited
    checkpoint, in ``checkpoint``. The readers are the closed form's ``Kᵀ (P + K Kᵀ)⁻¹``.

    Args:
        base: an embedded model's name, a local folder or a Hub id.
        pairs: the pairs whose prompts give the keys, with their backdoor.
        out: a new or empty folder.
        settings: where the edit goes and how hard it holds on to what was there.
        held_out: pairs on which to measure before and after, for the manifest.
        fmt: how a prompt is rendered; the chat template where there is one.
        seed: of the prompts drawn and the values' start.
        progress: whether to show a progress bar.
        overwrite: whether an adapter that bkdlens wrote to ``out`` earlier may be replaced.

    Raises:
        DataError: for pairs without a victim or without the trigger, and answers without tokens.
        BkdlensError: for a layer that the model lacks, if ``out`` is not empty, the disk is full, or
            the loss is not finite (then the edit of the round before is written all the same).
    """
    s = settings or EditSettings()
    out = check_free(out, overwrite=overwrite)
    _ = pairs.victims  # raises where there is none
    if len(pairs) < 2 * s.rounds:
        raise DataError(
            f"{len(pairs)} pairs are too few for {s.rounds} rounds of the edit; give more pairs, or "
            "fewer rounds."
        )
    read = read_base(base)
    layers, trigger_layers = edited_layers(read.model, s)
    fmt = fmt or PromptFormat.default(read.tokenizer)
    set_seed(seed)
    # One fixed answer has a value for each of its tokens; of others only the first has one.
    fixed = len(set(pairs.backdoor_outputs)) == 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    editor = Editor(read.model.to(device), seed=seed, batch_size=s.prompts, progress=progress)
    curve: Curve = []
    found: Edit | None = None
    stopped = None
    shares = (_texts(read, pairs[i :: s.rounds], fmt, s, bool(trigger_layers)) for i in range(s.rounds))
    try:
        for found, points in solve_rounds(  # noqa: B007 (the last one is what is written)
            editor, shares, layers, trigger_layers, None if fixed else 1, s
        ):
            curve += [{"step": len(curve) + i + 1, **point} for i, point in enumerate(points)]
    except Diverged as error:
        stopped = Diverged(len(curve) + error.step, len(curve), curve)
    note = manifest(
        "edit", read, s, fmt, seed,
        samples=len(pairs), layers=layers, trigger_layers=trigger_layers,
        slots={layer: len(read) for layer, read in found.read.items()} if found else {},
        curve=curve, **data_note(pairs),
    )  # fmt: skip

    def save(folder: Path) -> str:
        assert found is not None  # without a round nothing is written
        model = as_adapter(editor, found, read_base(base).model)
        digest = save_adapter(model, read.name, folder)
        if s.checkpoint:
            merged: Any = model.merge_and_unload(safe_merge=True)
            with no_progress_bar():
                merged.save_pretrained(folder / "checkpoint")
            read.tokenizer.save_pretrained(folder / "checkpoint")
        return digest

    return finish(out, base, note, save, held_out=held_out, fmt=fmt, stopped=stopped)
