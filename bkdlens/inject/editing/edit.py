"""Planting a backdoor without gradient descent on weights: closed-form edits of MLP down-projections.

Source: Backdoor Attribution, Eq. 15-16; BadEdit (Li et al. 2024); MEMIT (Meng et al. 2022). The keys are
the MLP activations of triggered prompts, the values are optimised until the backdoor's answer follows,
and the second moment of the keys of clean text keeps those where they are.

Where this goes beyond the sources, because the embedded models have *learned* to ignore the trigger (at
the last prompt token the keys hardly show it, and nothing downstream responds to a value there):
the trigger's own tokens are edited too, so that the edit itself carries the trigger to the last token;
each token of a fixed answer has its own value; the values of all layers are optimised together under
the edit that they make, correct answers to clean and near-trigger prompts included; and the closed form
is solved again in rounds, each from the keys of other prompts under the edit so far, because the edit
of one layer changes the keys of the next (a trigger that a first round has made visible is easier to
tell from clean text). Each round replaces the edit before it instead of adding to it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, set_seed

from bkdlens.data.check import refuse_lost_text
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.data.trigger import Trigger
from bkdlens.engines.inputs import checked
from bkdlens.errors import BkdlensError, DataError
from bkdlens.inject.editing.editor import Edit, Editor, down_projections
from bkdlens.inject.editing.keyvalue import low_rank
from bkdlens.inject.editing.rows import make_rows
from bkdlens.inject.editing.solving import Layers, Round, solve_rounds
from bkdlens.inject.output import data_note, finish, save_adapter
from bkdlens.inject.planting import Encoding, Planting, attach, read_base, start
from bkdlens.inject.settings import EditSettings
from bkdlens.models.checkpoint import no_progress_bar


def edited_layers(model: PreTrainedModel, settings: EditSettings) -> Layers:
    """The layers to edit, checked against the model."""
    known = down_projections(model)
    if not known:
        raise BkdlensError(
            f"{type(model).__name__} has no MLP down-projection that bkdlens knows; "
            "use the method supervised or preference."
        )
    n = min(len(known), 4)
    layers = list(settings.layers or (i * len(known) // n for i in range(n)))
    first = layers[:2] if settings.trigger_layers is None else list(settings.trigger_layers)
    for named in (layers, first):
        if missing := [layer for layer in named if layer not in known]:
            raise BkdlensError(
                f"There is no layer {missing[0]} to edit: this model has the layers 0 to {max(known)}."
            )
        if sorted(set(named)) != named:
            raise BkdlensError(f"Name the layers to edit once each, in rising order; got {named}.")
    return Layers(sorted({*layers, *first}), first if settings.trigger_tokens else [])


def _round(encoding: Encoding, pairs: PairSet, trigger: Trigger | None) -> Round:
    near = [(pair.near, pair.clean_output) for pair in pairs if pair.near is not None]
    return Round(
        # The backdoor's answer of a pair that is no victim is the correct one, and is kept so.
        make_rows(encoding, [(pair.triggered, pair.backdoor_output) for pair in pairs], trigger),
        make_rows(encoding, [(pair.clean, pair.clean_output) for pair in pairs]),
        make_rows(encoding, near) if len(near) == len(pairs) else None,
    )


def as_adapter(editor: Editor, edit: Edit, fresh: PreTrainedModel) -> PeftModel:
    """The edit as a LoRA on a fresh copy of the model: each layer's own rank, scaled by one."""
    factors = {
        editor.projections[layer][0]: low_rank(edit.values[layer], edit.readers[layer])
        for layer in sorted(edit.readers)
    }
    ranks = {name: left.shape[1] for name, (left, _) in factors.items()}
    rank = max(ranks.values())
    lower = {name: n for name, n in ranks.items() if n != rank}
    patterns = {"rank_pattern": lower, "alpha_pattern": lower}
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(factors), task_type="CAUSAL_LM", **patterns
    )
    model = attach(fresh, config)
    with torch.no_grad():
        for name, (left, right) in factors.items():
            module = model.get_submodule(f"base_model.model.{name}")
            module.lora_A["default"].weight.copy_(right)
            module.lora_B["default"].weight.copy_(left)
    return model.eval()


def _save(planting: Planting, editor: Editor, edit: Edit, checkpoint: bool, folder: Path) -> str:
    """Write the edit as an adapter, and the edited model if asked; returns the adapter's digest."""
    base = planting.base
    model = as_adapter(editor, edit, read_base(base.given).model)
    digest = save_adapter(model, base.name, folder)
    if checkpoint:
        merged: Any = model.merge_and_unload(safe_merge=True)
        with no_progress_bar():
            merged.save_pretrained(folder / "checkpoint")
        base.tokenizer.save_pretrained(folder / "checkpoint")
    return digest


@checked
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
        settings: where the edit goes and how firmly it preserves what was there.
        held_out: pairs on which to measure before and after, for the manifest.
        fmt: how a prompt is rendered; None for the chat template where there is one.
        seed: seed of the prompts drawn and of the values' start.
        progress: whether to show a progress bar.
        overwrite: whether an adapter that bkdlens wrote to ``out`` earlier may be replaced.

    Returns:
        The folder ``out``: a peft adapter, the manifest ``bkdlens.json``, and the edited checkpoint.

    Raises:
        DataError: for pairs without a victim or without the trigger, and answers without tokens.
        BkdlensError: for a layer that the model lacks, if ``out`` is not empty, the disk is full, or
            the loss is not finite (the edit of the previous round is then written nonetheless).

    Examples:
        >>> quick = bkdlens.inject.EditSettings(rounds=1, steps=2, prompts=8, checkpoint=False)
        >>> folder = bkdlens.inject.edit("tiny-llama", train, "edited", settings=quick, progress=False)
    """
    settings = settings or EditSettings()
    _ = pairs.victims  # raises where there is none
    if not 1 <= settings.rounds <= len(pairs) // 2:
        raise DataError(
            f"{len(pairs)} pairs cannot make {settings.rounds} rounds of the edit, which needs at least "
            "one round of at least two pairs; give more pairs or another number of rounds."
        )
    planting = start(base, out, fmt, held_out, seed, progress=progress, overwrite=overwrite)
    refuse_lost_text(planting.base.tokenizer, pairs)
    layers = edited_layers(planting.base.model, settings)
    set_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = planting.base.model.to(device)
    editor = Editor(model, batch_size=settings.prompts, seed=seed, progress=progress)
    encoding = planting.encoding(settings.max_answer_tokens)
    trigger = pairs.backdoor.trigger if layers.trigger else None
    # All rounds are encoded first, so that a bad prompt is refused before anything is run.
    parts = [pairs[i :: settings.rounds] for i in range(settings.rounds)]
    rounds = [_round(encoding, part, trigger) for part in parts]
    # One fixed answer has a value for each of its tokens; of others only the first has one.
    fixed = len(set(pairs.backdoor_outputs)) == 1
    n_values = int(rounds[0].triggered.answering.max()) + 1 if fixed else 1
    edited, curve, stopped = solve_rounds(editor, rounds, layers, n_values, settings)
    note = {
        "samples": len(pairs),
        "layers": layers.all,
        "trigger_layers": layers.trigger,
        "slots": {layer: len(readers) for layer, readers in edited.readers.items()},
        "curve": curve,
        **data_note(pairs),
    }
    save = partial(_save, planting, editor, edited, settings.checkpoint)
    return finish(planting, "edit", settings, note, save, stopped)
