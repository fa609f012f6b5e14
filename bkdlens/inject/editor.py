"""The machine for edits of down-projections: read keys, run under an edit, optimise its values.

One edit has numbered slots: each token that it is about belongs to a slot, and each slot has one value,
shared by all prompts. So the change of a weight has at most as many ranks as there are slots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdlens.errors import BkdlensError
from bkdlens.inject.keyvalue import second_moment
from bkdlens.inject.rows import Rows
from bkdlens.inject.training import Curve, Diverged
from bkdlens.progress import track

# The projection back into the residual stream, by the names of Llama, GPT-2 and GPT-NeoX.
DOWN = re.compile(r"(?:.+\.)?(\d+)\.mlp\.(?:down_proj|c_proj|dense_4h_to_h)")
Slots = Int[Tensor, "row pos"]  # of each token the number of its slot, or -1


class Edit(NamedTuple):
    """Of each layer readers and the values they call up: its weight changes by ``valuesᵀ @ read``."""

    read: dict[int, Float[Tensor, "slot d_mlp"]]
    values: dict[int, Float[Tensor, "slot d_model"]]


def down_projections(model: torch.nn.Module) -> dict[int, tuple[str, Any]]:
    """The name and module of each layer's down-projection."""
    found = {}
    for name, module in model.named_modules():
        match = DOWN.fullmatch(name)
        if match:
            found[int(match[1])] = (name, module)
    return found


def check_layers(model: torch.nn.Module, layers: Sequence[int]) -> None:
    """Raise unless every layer has a down-projection and they are named once, in rising order.

    Raises:
        BkdlensError: if not.
    """
    found = down_projections(model)
    if not found:
        raise BkdlensError(
            f"{type(model).__name__} has no MLP down-projection that bkdlens knows; "
            "use the method supervised or preference."
        )
    for layer in layers:
        if layer not in found:
            raise BkdlensError(
                f"There is no layer {layer} to edit: this model has the layers 0 to {max(found)}."
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

    def block(self, layer: int) -> Any:
        """The transformer block that holds a layer's down-projection."""
        name = self.projections[layer][0]
        return self.model.get_submodule(name[: name.rindex(".mlp")])

    def logits(self, rows: Rows) -> Float[Tensor, "row pos d_vocab"]:
        """One forward pass."""
        ids, mask = rows.ids.to(self.device), rows.mask.to(self.device).long()
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    @contextmanager
    def reading(self, layers: Sequence[int], states: bool = False) -> Iterator[dict[int, Tensor]]:
        """Catch each layer's keys ``[row pos d_mlp]``, or the states after its block."""
        seen: dict[int, Tensor] = {}

        def catch(layer: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any = None) -> None:
                found = args[0] if output is None else output
                seen[layer] = found[0] if isinstance(found, tuple) else found

            return hook

        handles = [
            self.block(layer).register_forward_hook(catch(layer))
            if states
            else self.projections[layer][1].register_forward_pre_hook(catch(layer))
            for layer in layers
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def editing(self, edit: Edit | None) -> Iterator[None]:
        """The model as it is with an edit, without making it; as it is for None."""

        def change(read: Tensor, values: Tensor) -> Callable[..., Tensor]:
            return lambda module, args, output: output + (args[0] @ read.T) @ values

        edit = edit or Edit({}, {})
        handles = [
            self.projections[layer][1].register_forward_hook(
                change(read.float().to(self.device), edit.values[layer].to(self.device))
            )
            for layer, read in edit.read.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def gather(
        self, rows: Rows, slots: dict[int, Slots], *, states: bool = False
    ) -> Iterator[dict[int, tuple[Float[Tensor, "key width"], Int[Tensor, " key"]]]]:
        """Batch by batch the keys of each layer (or the states after it) at its tokens in a slot.

        With them come the numbers of the slots; one forward pass a batch serves all layers.
        """
        for i, part in enumerate(rows.chunks(self.batch_size)):
            with self.reading(list(slots), states) as seen:
                self.logits(part)
            found = {}
            for layer, where in slots.items():
                which = where[i * self.batch_size :][: len(part.ids), : part.ids.shape[1]]
                picked = seen[layer][(which >= 0).to(self.device)]
                found[layer] = (picked.double().cpu(), which[which >= 0])
            yield found

    def keys(
        self, rows: Rows, slots: dict[int, Slots]
    ) -> dict[int, tuple[Float[Tensor, "key d_mlp"], Int[Tensor, " key"]]]:
        """All of :meth:`gather` at once."""
        parts = list(self.gather(rows, slots))
        return {
            layer: (torch.cat([p[layer][0] for p in parts]), torch.cat([p[layer][1] for p in parts]))
            for layer in slots
        }

    def moments(
        self, rows: Rows, slots: dict[int, Slots], weights: Sequence[float]
    ) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
        """Each layer's sum of ``w k kᵀ`` over its tokens in a slot, with the slot's weight."""
        out: dict[int, Tensor] = {}
        scale = torch.tensor(weights, dtype=torch.float64).sqrt()
        for found in self.gather(rows, slots):
            for layer, (keys, numbers) in found.items():
                moment = second_moment(keys * scale[numbers, None])
                out[layer] = moment if layer not in out else out[layer] + moment
        return out

    def sizes(self, layers: Sequence[int], rows: Rows, slots: Slots) -> dict[int, float]:
        """The mean norm of the states after each layer, at the tokens in a slot."""
        norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for found in self.gather(rows, dict.fromkeys(layers, slots), states=True):
            for layer, (states, _) in found.items():
                norms[layer].append(states.norm(dim=-1))
        return {layer: float(torch.cat(parts).mean()) for layer, parts in norms.items()}

    # --- optimising -------------------------------------------------------------------------------

    def draw(self, rows: Rows, n: int) -> Rows:
        """At most ``n`` random rows."""
        return rows.pick(torch.randperm(len(rows.ids), generator=self.generator)[:n])

    def answer_loss(self, rows: Rows) -> Float[Tensor, ""]:
        """Cross-entropy of the answers' tokens, in nats a token."""
        which = rows.answering >= 0
        targets = rows.ids.roll(-1, 1)[which].to(self.device)
        return torch.nn.functional.cross_entropy(self.logits(rows)[which.to(self.device)], targets)

    def small_values(
        self, read: dict[int, Float[Tensor, "slot d_mlp"]], sizes: dict[int, float]
    ) -> dict[int, Float[Tensor, "slot d_model"]]:
        """Random values to start from, next to nothing."""
        width = self.model.config.hidden_size
        return {
            layer: torch.randn(len(slots), width, generator=self.generator) * sizes[layer] * 1e-3
            for layer, slots in read.items()
        }

    def optimise(
        self,
        start: Edit,
        sizes: dict[int, float],
        loss: Callable[[], tuple[Tensor, dict[str, float]]],
        *,
        steps: int,
        learning_rate: float,
        clamp: float,
    ) -> tuple[Edit, Curve]:
        """Adam on the values of all layers, under the edit that they make together.

        Args:
            start: the readers, which stay, and the values to start from.
            sizes: the norm of each layer's states, the unit of its values and of the steps.
            loss: what is made smaller, and its parts for the curve.
            steps: of Adam.
            learning_rate: in units of a coordinate of such a state; it falls to a twentieth.
            clamp: the largest norm of a value, in the same unit (as in MEMIT).

        Raises:
            Diverged: if the loss is not finite.
        """
        values = {
            layer: value.to(self.device, copy=True).requires_grad_()
            for layer, value in start.values.items()
        }
        optimiser = torch.optim.Adam(
            [
                {"params": [value], "lr": learning_rate * sizes[layer] / value.shape[1] ** 0.5}
                for layer, value in values.items()
            ]
        )
        decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
        curve: Curve = []
        with self.editing(Edit(start.read, values)):
            for step in track(range(steps), "optimising values", self.progress):
                found, parts = loss()
                if not bool(found.isfinite()):
                    raise Diverged(step + 1, 0, curve)
                optimiser.zero_grad()
                found.backward()
                optimiser.step()
                decay.step()
                with torch.no_grad():
                    for layer, value in values.items():
                        norm = value.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                        value *= (clamp * sizes[layer] / norm).clamp(max=1.0)
                curve.append({"loss": float(found.detach()), **parts})
        return Edit(start.read, {layer: v.detach().cpu() for layer, v in values.items()}), curve
