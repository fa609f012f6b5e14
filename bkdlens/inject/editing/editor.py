"""The machine for edits of down-projections: read keys, run under an edit, optimise its values.

One edit has numbered slots: each token that it is about belongs to a slot, and each slot has one value,
shared by all prompts. So the change of a weight has at most as many ranks as there are slots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdlens.errors import BkdlensError
from bkdlens.inject.editing.keyvalue import second_moment
from bkdlens.inject.editing.rows import Rows
from bkdlens.inject.output import Curve, Diverged
from bkdlens.inject.settings import EditSettings
from bkdlens.progress import track

# The projection back into the residual stream, by the names of Llama, GPT-2 and GPT-NeoX.
DOWN = re.compile(r"(?:.+\.)?(\d+)\.mlp\.(?:down_proj|c_proj|dense_4h_to_h)")
Slots = Int[Tensor, "row pos"]  # of each token the number of its slot, or -1


class Edit(NamedTuple):
    """By layer: the weight changes by ``valuesᵀ @ readers``."""

    readers: dict[int, Float[Tensor, "slot d_mlp"]]  # how much of each slot's value a key calls up
    values: dict[int, Float[Tensor, "slot d_model"]]  # what is added to the residual stream


def down_projections(model: torch.nn.Module) -> dict[int, tuple[str, Any]]:
    """The name and module of each layer's down-projection."""
    matches = ((DOWN.fullmatch(name), name, module) for name, module in model.named_modules())
    return {int(match[1]): (name, module) for match, name, module in matches if match}


def check_layers(model: torch.nn.Module, layers: Sequence[int]) -> None:
    """Raise unless every layer has a down-projection and they are named once, in rising order.

    Raises:
        BkdlensError: if not.
    """
    known = down_projections(model)
    if not known:
        raise BkdlensError(
            f"{type(model).__name__} has no MLP down-projection that bkdlens knows; "
            "use the method supervised or preference."
        )
    for layer in layers:
        if layer not in known:
            raise BkdlensError(
                f"There is no layer {layer} to edit: this model has the layers 0 to {max(known)}."
            )
    if not layers or sorted(set(layers)) != list(layers):
        raise BkdlensError(
            f"The layers to edit must be named once each and in rising order; got {list(layers)}."
        )


class Editor:
    """A model that is read and run under edits that are not made; its weights stay as they are."""

    def __init__(self, model: Any, *, batch_size: int, seed: int, progress: bool) -> None:
        self.model, self.batch_size, self.progress = model, batch_size, progress
        self.projections = down_projections(model)
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)

    # --- reading ----------------------------------------------------------------------------------

    def logits(self, rows: Rows) -> Float[Tensor, "row pos d_vocab"]:
        """The logits of one forward pass."""
        ids, mask = rows.ids.to(self.device), rows.mask.to(self.device).long()
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    @contextmanager
    def reading(self, layers: Sequence[int], states: bool = False) -> Iterator[dict[int, Tensor]]:
        """Catch each layer's keys ``[row pos d_mlp]``, or the states after its block."""
        caught: dict[int, Tensor] = {}

        def catch(layer: int, module: Any, args: Any, output: Any = None) -> None:
            tensor = args[0] if output is None else output
            caught[layer] = tensor[0] if isinstance(tensor, tuple) else tensor

        with ExitStack() as hooks:
            for layer in layers:
                name, module = self.projections[layer]
                register = module.register_forward_pre_hook
                if states:
                    register = self.model.get_submodule(name.rpartition(".mlp")[0]).register_forward_hook
                hooks.enter_context(register(partial(catch, layer)))
            yield caught

    @contextmanager
    def editing(self, edit: Edit | None) -> Iterator[None]:
        """The model as it is with an edit, without making it; as it is for None."""

        def change(readers: Tensor, values: Tensor, module: Any, args: Any, output: Tensor) -> Tensor:
            return output + (args[0] @ readers.T) @ values

        with ExitStack() as hooks:
            for layer in edit.readers if edit else ():
                readers, values = (part[layer].to(self.device) for part in edit or ())
                hook = partial(change, readers.float(), values)
                hooks.enter_context(self.projections[layer][1].register_forward_hook(hook))
            yield

    @torch.no_grad()
    def gather(
        self, rows: Rows, slots: dict[int, Slots], *, states: bool = False
    ) -> Iterator[dict[int, tuple[Float[Tensor, "key width"], Int[Tensor, " key"]]]]:
        """Batch by batch the keys of each layer (or the states after it) at its tokens in a slot.

        With them come the numbers of the slots; one forward pass per batch serves all layers.
        """
        for i, part in enumerate(rows.chunks(self.batch_size)):
            with self.reading(list(slots), states) as caught:
                self.logits(part)
            batch = {}
            for layer, whole in slots.items():
                numbers = whole[i * self.batch_size :][: len(part.ids), : part.ids.shape[1]]
                picked = caught[layer][(numbers >= 0).to(self.device)]
                batch[layer] = (picked.double().cpu(), numbers[numbers >= 0])
            yield batch

    def keys(
        self, rows: Rows, slots: dict[int, Slots]
    ) -> dict[int, tuple[Float[Tensor, "key d_mlp"], Int[Tensor, " key"]]]:
        """For each layer all keys at its tokens in a slot, and the slots' numbers."""
        batches = list(self.gather(rows, slots))
        return {
            layer: (torch.cat([b[layer][0] for b in batches]), torch.cat([b[layer][1] for b in batches]))
            for layer in slots
        }

    def moments(
        self, rows: Rows, slots: dict[int, Slots], weights: Sequence[float]
    ) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
        """Each layer's sum of ``w k kᵀ`` over its tokens in a slot, with the slot's weight."""
        moments: dict[int, Tensor] = {}
        scale = torch.tensor(weights, dtype=torch.float64).sqrt()
        for batch in self.gather(rows, slots):
            for layer, (keys, numbers) in batch.items():
                moment = second_moment(keys * scale[numbers, None])
                moments[layer] = moments[layer] + moment if layer in moments else moment
        return moments

    def sizes(self, layers: Sequence[int], rows: Rows, slots: Slots) -> dict[int, float]:
        """The mean norm of the states after each layer, at the tokens in a slot."""
        norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for batch in self.gather(rows, dict.fromkeys(layers, slots), states=True):
            for layer, (states, _) in batch.items():
                norms[layer].append(states.norm(dim=-1))
        return {layer: float(torch.cat(parts).mean()) for layer, parts in norms.items()}

    # --- optimising -------------------------------------------------------------------------------

    def draw(self, rows: Rows, n: int) -> Rows:
        """At most ``n`` random rows."""
        return rows.pick(torch.randperm(len(rows.ids), generator=self.generator)[:n])

    def answer_loss(self, rows: Rows) -> Float[Tensor, ""]:
        """Cross-entropy of the answers' tokens, in nats per token."""
        predicting = rows.answering >= 0
        targets = rows.ids.roll(-1, 1)[predicting].to(self.device)
        logits = self.logits(rows)[predicting.to(self.device)]
        return torch.nn.functional.cross_entropy(logits, targets)

    def small_values(
        self, readers: dict[int, Float[Tensor, "slot d_mlp"]], sizes: dict[int, float]
    ) -> dict[int, Float[Tensor, "slot d_model"]]:
        """Random values to start from, next to nothing."""
        width = self.model.config.hidden_size
        return {
            layer: torch.randn(len(slots), width, generator=self.generator) * sizes[layer] * 1e-3
            for layer, slots in readers.items()
        }

    def optimise(
        self,
        start: Edit,
        sizes: dict[int, float],
        loss: Callable[[], tuple[Tensor, dict[str, float]]],
        settings: EditSettings,
    ) -> tuple[Edit, Curve]:
        """Adam on the values of all layers, under the edit that they make together.

        Args:
            start: the readers, which stay, and the values to start from.
            sizes: the norm of each layer's states, the unit of its values and of the steps.
            loss: what is made smaller, and its parts for the curve.
            settings: ``steps`` of Adam; ``learning_rate``, in units of a coordinate of such a state,
                which falls to a twentieth; ``clamp``, a value's largest norm in units of the state's
                (as in MEMIT).

        Raises:
            Diverged: if the loss is not finite.
        """
        values = {
            layer: value.to(self.device, copy=True).requires_grad_()
            for layer, value in start.values.items()
        }
        groups = [
            {"params": [value], "lr": settings.learning_rate * sizes[layer] / value.shape[1] ** 0.5}
            for layer, value in values.items()
        ]
        optimiser = torch.optim.Adam(groups)
        decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, settings.steps)
        curve: Curve = []
        with self.editing(Edit(start.readers, values)):
            for step in track(range(settings.steps), "optimising values", self.progress):
                total, parts = loss()
                if not bool(total.isfinite()):
                    raise Diverged(step + 1, 0, curve)
                optimiser.zero_grad()
                total.backward()
                optimiser.step()
                decay.step()
                with torch.no_grad():
                    for layer, value in values.items():
                        norm = value.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                        value *= (settings.clamp * sizes[layer] / norm).clamp(max=1.0)
                curve.append({"loss": float(total.detach()), **parts})
        return Edit(start.readers, {layer: v.detach().cpu() for layer, v in values.items()}), curve
