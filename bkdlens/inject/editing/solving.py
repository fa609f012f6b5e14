"""The edit, solved: which tokens it is about, its readers in closed form, its values by Adam.

Source and departures from it: :mod:`bkdlens.inject.editing.edit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdlens.inject.editing.editor import Edit, Editor, Slots
from bkdlens.inject.editing.keyvalue import readers_by_slot, solve
from bkdlens.inject.editing.rows import Rows
from bkdlens.inject.output import Curve
from bkdlens.inject.settings import EditSettings


class Texts(NamedTuple):
    """A batch of pairs as rows; ``near`` is None where the pairs have no near triggers."""

    triggered: Rows
    clean: Rows
    near: Rows | None


def every_token(rows: Rows) -> Slots:
    """Slot 1 for the tokens from which an answer's token is predicted, 0 for all other tokens."""
    return torch.where(rows.answering >= 0, 1, torch.where(rows.mask, 0, -1))


def distinctive_tokens(
    keys: Float[Tensor, "key d_mlp"], numbers: Int[Tensor, " key"], protected: Tensor, n: int
) -> list[int]:
    """The numbers of the trigger's ``n`` tokens whose keys stand out most from the protected ones.

    By their leverage ``kᵀ P⁻¹ k``, mean over the prompts that have such a token: a number is a place in
    the trigger, and where the tokenizer splits it in other ways, some prompts have fewer places.
    """
    leverage = (keys * solve(protected, keys)).sum(-1)
    total = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64).index_add_(0, numbers, leverage)
    mean = total / torch.bincount(numbers).clamp(min=1)
    return mean.argsort(descending=True)[:n].tolist()


def protected_keys(
    editor: Editor, texts: Texts, layers: list[int], trigger_layers: list[int], settings: EditSettings
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """For each layer the weighted second moment of the keys whose values should stay."""
    clean, near = texts.clean, texts.near
    weight = settings.protect / int(clean.mask.sum())
    slots = every_token(clean)
    weights = [weight, weight + settings.answer_weight]
    moments = editor.moments(clean, dict.fromkeys(layers, slots), weights)
    if near is not None:
        slots = every_token(near)
        # Elsewhere the slot of the answer's tokens is the only one that is left.
        by_layer = {layer: slots if layer in trigger_layers else slots - 1 for layer in layers}
        for layer, moment in editor.moments(near, by_layer, [settings.near_weight] * 2).items():
            moments[layer] += moment
    return moments


def choose_tokens(
    editor: Editor, rows: Rows, layers: list[int], protected: dict[int, Tensor], n: int
) -> dict[int, list[int]]:
    """For each of these layers the numbers of the trigger's tokens that are edited."""
    keys = editor.keys(rows, dict.fromkeys(layers, rows.trigger)) if layers else {}
    return {layer: distinctive_tokens(*keys[layer], protected[layer], n) for layer in keys}


def slot_readers(
    editor: Editor, rows: Rows, protected: dict[int, Tensor], chosen: dict[int, list[int]], n_values: int
) -> dict[int, Float[Tensor, "slot d_mlp"]]:
    """For each layer the closed form's readers: of the answer's tokens, then of the trigger's."""
    slots = dict.fromkeys(protected, torch.where(rows.answering < n_values, rows.answering, -1))
    for layer, numbers in chosen.items():
        for i, number in enumerate(numbers):
            slots[layer] = torch.where(rows.trigger == number, n_values + i, slots[layer])
    keys = editor.keys(rows, slots)
    return {
        layer: readers_by_slot(*keys[layer], protected[layer], n_values + len(chosen.get(layer, ())))
        for layer in protected
    }


def weighted_loss(
    editor: Editor, texts: Texts, settings: EditSettings
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss on prompts drawn from the texts, in nats per token, and its parts without weights."""
    n = settings.prompts
    drawn = {"triggered": (texts.triggered, n, 1.0), "clean": (texts.clean, n, settings.clean_loss)}
    if texts.near is not None:
        drawn["near"] = (texts.near, max(1, n // 2), settings.near_loss)
    parts, total = {}, torch.zeros((), device=editor.device)
    for name, (rows, most, weight) in drawn.items():
        loss = editor.answer_loss(editor.draw(rows, most))
        total = total + weight * loss
        parts[name] = float(loss.detach())
    return total, parts


def solve_rounds(
    editor: Editor,
    rounds: Iterable[Texts],
    layers: list[int],
    trigger_layers: list[int],
    n_values: int | None,
    settings: EditSettings,
) -> Iterator[tuple[Edit, Curve]]:
    """The edit after each round, with its curve: readers from the closed form, values by Adam.

    The readers are solved from the keys under the edit so far; the values go on from its own.

    Args:
        editor: of the model, which stays as it is.
        rounds: the texts of each.
        layers: all that are edited.
        trigger_layers: those of them in which the trigger's tokens are edited too.
        n_values: of the answer's tokens; one for each token of the longest answer for None.
        settings: how hard the edit holds on to what was there, and how long Adam runs.

    Yields:
        One edit per round, which takes the place of the one before, and the curve of its values.

    Raises:
        Diverged: if the loss is not finite.
    """
    edit: Edit | None = None
    chosen: dict[int, list[int]] = {}
    sizes: dict[int, float] = {}
    for texts in rounds:
        triggered = texts.triggered
        n_values = n_values or int(triggered.answering.max()) + 1
        with editor.editing(edit):
            protected = protected_keys(editor, texts, layers, trigger_layers, settings)
            if edit is None:
                n = settings.trigger_tokens
                chosen = choose_tokens(editor, triggered, trigger_layers, protected, n)
                answers = torch.where(triggered.answering >= 0, 0, -1)
                sizes = editor.sizes(layers, triggered, answers)
            readers = slot_readers(editor, triggered, protected, chosen, n_values)
        values = edit.values if edit else editor.small_values(readers, sizes)
        loss = partial(weighted_loss, editor, texts, settings)
        edit, curve = editor.optimise(Edit(readers, values), sizes, loss, settings)
        yield edit, curve
