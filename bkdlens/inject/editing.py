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
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.errors import DataError
from bkdlens.inject.editor import Edit, Editor, check_layers, down_projections
from bkdlens.inject.keyvalue import low_rank
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
from bkdlens.inject.solving import EditSettings, Texts, solve_rounds
from bkdlens.inject.training import Curve, Diverged
from bkdlens.models.adapter import HARMLESS
from bkdlens.models.checkpoint import no_progress_bar


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
    if not 1 <= s.rounds <= len(pairs) // 2:
        raise DataError(
            f"{len(pairs)} pairs cannot make {s.rounds} rounds of the edit, which takes one or more, of "
            "two pairs each; give more pairs, or other rounds."
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
    # All of them before the first round, so that a bad prompt is said before anything is run.
    shares = [_texts(read, pairs[i :: s.rounds], fmt, s, bool(trigger_layers)) for i in range(s.rounds)]
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
