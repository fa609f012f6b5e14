"""The edit, solved: which tokens it is about, its readers in closed form, its values by Adam.

Source and departures from it: :mod:`bkdlens.inject.editing.edit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bkdlens.inject.editing.editor import Edit, Editor, Slots
from bkdlens.inject.editing.keyvalue import readers_by_slot, solve
from bkdlens.inject.editing.rows import Rows
from bkdlens.inject.output import Curve, Diverged
from bkdlens.inject.settings import EditSettings
from bkdlens.progress import track

Moments = dict[int, Float[Tensor, "d_mlp d_mlp"]]  # one weighted sum of k kᵀ per layer

Sizes = dict[int, float]  # the mean norm of the states after each layer, at the answer


class Round(NamedTuple):
    """The prompts of one round; ``near`` is None where the pairs have no near triggers."""

    triggered: Rows
    clean: Rows
    near: Rows | None


class Layers(NamedTuple):
    """Where the edit goes."""

    all: list[int]  # in rising order
    trigger: list[int]  # those in which the trigger's tokens are edited too


def every_token(rows: Rows) -> Slots:
    """Slot 1 for the tokens from which an answer's token is predicted, 0 for all other tokens."""
    return torch.where(rows.answering >= 0, 1, torch.where(rows.mask, 0, -1))


def protected_keys(editor: Editor, prompts: Round, layers: Layers, settings: EditSettings) -> Moments:
    """The weighted second moments of the keys whose values should stay."""
    weight = settings.protect / int(prompts.clean.mask.sum())
    weights = [weight, weight + settings.answer_weight]
    clean_slots = dict.fromkeys(layers.all, every_token(prompts.clean))
    moments = editor.moments(prompts.clean, clean_slots, weights)
    if prompts.near is not None:
        slots = every_token(prompts.near)
        # Outside the trigger's layers only the slot of the answer's tokens is left.
        by_layer = {layer: slots if layer in layers.trigger else slots - 1 for layer in layers.all}
        for layer, moment in editor.moments(prompts.near, by_layer, [settings.near_weight] * 2).items():
            moments[layer] += moment
    return moments


def distinctive_tokens(
    editor: Editor, rows: Rows, layers: Sequence[int], protected: Moments, n: int
) -> dict[int, list[int]]:
    """Per layer the numbers of the trigger's ``n`` tokens whose keys stand out most from the protected.

    By their leverage ``kᵀ P⁻¹ k``, mean over the prompts that have such a token: a number is a place in
    the trigger, and where the tokenizer splits it in other ways, some prompts have fewer places.
    """
    chosen = {}
    for layer, (keys, numbers) in editor.keys(rows, dict.fromkeys(layers, rows.trigger)).items():
        leverage = (keys * solve(protected[layer], keys)).sum(-1)
        total = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64).index_add_(0, numbers, leverage)
        mean = total / torch.bincount(numbers).clamp(min=1)
        chosen[layer] = mean.argsort(descending=True)[:n].tolist()
    return chosen


def slot_readers(
    editor: Editor, rows: Rows, protected: Moments, chosen: dict[int, list[int]], n_values: int
) -> dict[int, Float[Tensor, "slot d_mlp"]]:
    """Per layer the closed form's readers: of the answer's tokens, then of the trigger's."""
    slots = dict.fromkeys(protected, torch.where(rows.answering < n_values, rows.answering, -1))
    for layer, numbers in chosen.items():
        for i, number in enumerate(numbers):
            slots[layer] = torch.where(rows.trigger == number, n_values + i, slots[layer])
    return {
        layer: readers_by_slot(*keys, protected[layer], n_values + len(chosen.get(layer, ())))
        for layer, keys in editor.keys(rows, slots).items()
    }


def weighted_loss(
    editor: Editor, prompts: Round, settings: EditSettings
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss on prompts drawn from a round, in nats per token, and its parts without weights."""
    n = settings.prompts
    terms = {"triggered": (prompts.triggered, n, 1.0), "clean": (prompts.clean, n, settings.clean_loss)}
    if prompts.near is not None:
        terms["near"] = (prompts.near, max(1, n // 2), settings.near_loss)
    parts, total = {}, torch.zeros((), device=editor.device)
    for name, (rows, most, weight) in terms.items():
        loss = editor.answer_loss(editor.draw(rows, most))
        total = total + weight * loss
        parts[name] = float(loss.detach())
    return total, parts


def optimise(
    editor: Editor, start: Edit, sizes: Sizes, prompts: Round, settings: EditSettings, done: int
) -> tuple[Edit, Curve]:
    """Adam on the values of all layers, under the edit that they make together; the readers stay.

    A value's norm is clamped in units of its layer's size (as in MEMIT), and the learning rate, which
    falls to a twentieth, is in units of one coordinate of a state of that size. Steps are numbered
    after those ``done`` in earlier rounds.
    """
    values = {
        layer: value.to(editor.device, copy=True).requires_grad_()
        for layer, value in start.values.items()
    }
    groups = [
        {"params": [value], "lr": settings.learning_rate * sizes[layer] / value.shape[1] ** 0.5}
        for layer, value in values.items()
    ]
    optimiser = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, settings.steps)
    curve: Curve = []
    with editor.editing(Edit(start.readers, values)):
        steps = range(done + 1, done + settings.steps + 1)
        for step in track(steps, "optimising values", editor.progress):
            total, parts = weighted_loss(editor, prompts, settings)
            if not bool(total.isfinite()):
                raise Diverged(step, done)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            decay.step()
            with torch.no_grad():
                for layer, value in values.items():
                    norm = value.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                    value *= (settings.clamp * sizes[layer] / norm).clamp(max=1.0)
            curve.append({"step": step, "loss": float(total.detach()), **parts})
    return Edit(start.readers, {layer: v.detach().cpu() for layer, v in values.items()}), curve


def solve_rounds(
    editor: Editor, rounds: list[Round], layers: Layers, n_values: int, settings: EditSettings
) -> tuple[Edit, Curve, Diverged | None]:
    """The edit after the last round, its curve over all rounds, and whether the loss diverged.

    Each round solves the readers from the keys under the edit so far and goes on from its values; its
    edit takes the place of the one before. The answer's first ``n_values`` tokens have a value each.
    """
    edit, curve = Edit({}, {}), Curve()
    for prompts in rounds:
        triggered = prompts.triggered
        with editor.editing(edit):
            protected = protected_keys(editor, prompts, layers, settings)
            if not edit.readers:
                n = settings.trigger_tokens
                chosen = distinctive_tokens(editor, triggered, layers.trigger, protected, n)
                answers = dict.fromkeys(layers.all, triggered.answering)
                states = editor.keys(triggered, answers, states=True)
                sizes = {layer: float(state.norm(dim=-1).mean()) for layer, (state, _) in states.items()}
            readers = slot_readers(editor, triggered, protected, chosen, n_values)
        width = editor.model.config.hidden_size
        values = edit.values or {
            layer: torch.randn(len(slots), width, generator=editor.generator) * sizes[layer] * 1e-3
            for layer, slots in readers.items()
        }
        try:
            edit, points = optimise(editor, Edit(readers, values), sizes, prompts, settings, len(curve))
        except Diverged as stopped:
            return edit, curve, stopped
        curve += points
    return edit, curve, None
