"""The edit, solved: which tokens it is about, its readers in closed form, its values by Adam.

Source and departures from it: :mod:`bkdlens.inject.editing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdlens.inject.editor import Edit, Editor, Slots
from bkdlens.inject.keyvalue import readers_by_slot, solve
from bkdlens.inject.rows import Rows
from bkdlens.inject.training import Curve


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


def every_token(rows: Rows) -> Slots:
    """Slot 1 for the tokens from which an answer's token is predicted, 0 for all others."""
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
