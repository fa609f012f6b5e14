"""The machine for edits of down-projections: it reads a model's keys and runs it under an edit.

An edit has numbered slots: each token that it is about belongs to a slot, and each slot has one value,
shared by all prompts. So the change of a weight has at most as many ranks as there are slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdlens.inject.editing.keyvalue import second_moment
from bkdlens.inject.editing.rows import Rows

# The projection back into the residual stream, by the names of Llama, GPT-2 and GPT-NeoX.
DOWN = re.compile(r"(?:.+\.)?(\d+)\.mlp\.(?:down_proj|c_proj|dense_4h_to_h)")
Slots = Int[Tensor, "row pos"]  # each token's slot number, or -1
Numbered = tuple[Float[Tensor, "key width"], Int[Tensor, " key"]]  # keys or states with slot numbers


class Edit(NamedTuple):
    """By layer: the weight changes by ``valuesᵀ @ readers``."""

    readers: dict[int, Float[Tensor, "slot d_mlp"]]  # how much of each slot's value a key calls up
    values: dict[int, Float[Tensor, "slot d_model"]]  # what is added to the residual stream


def down_projections(model: torch.nn.Module) -> dict[int, tuple[str, Any]]:
    """The name and module of each layer's down-projection."""
    matches = ((DOWN.fullmatch(name), name, module) for name, module in model.named_modules())
    return {int(match[1]): (name, module) for match, name, module in matches if match}


class Editor:
    """A model that is read and run under edits that are not made; its weights stay as they are."""

    def __init__(self, model: Any, *, batch_size: int, seed: int, progress: bool) -> None:
        self.model, self.batch_size, self.progress = model, batch_size, progress
        self.projections = down_projections(model)
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)

    def logits(self, rows: Rows) -> Float[Tensor, "row pos d_vocab"]:
        """The logits of one forward pass."""
        ids, mask = rows.ids.to(self.device), rows.mask.to(self.device).long()
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def answer_loss(self, rows: Rows) -> Float[Tensor, ""]:
        """Cross-entropy of the answers' tokens, in nats per token."""
        predicting = rows.answering >= 0
        targets = rows.ids.roll(-1, 1)[predicting].to(self.device)
        logits = self.logits(rows)[predicting.to(self.device)]
        return torch.nn.functional.cross_entropy(logits, targets)

    def draw(self, rows: Rows, n: int) -> Rows:
        """At most ``n`` random rows."""
        return rows.pick(torch.randperm(len(rows.ids), generator=self.generator)[:n])

    @contextmanager
    def editing(self, edit: Edit) -> Iterator[None]:
        """Run the model as if the edit were made."""

        def change(readers: Tensor, values: Tensor, module: Any, args: Any, output: Tensor) -> Tensor:
            return output + (args[0] @ readers.T) @ values

        with ExitStack() as hooks:
            for layer, readers in edit.readers.items():
                values = edit.values[layer].to(self.device)
                hook = partial(change, readers.to(self.device).float(), values)
                hooks.enter_context(self.projections[layer][1].register_forward_hook(hook))
            yield

    @torch.no_grad()
    def gather(
        self, rows: Rows, slots: dict[int, Slots], *, states: bool = False
    ) -> Iterator[dict[int, Numbered]]:
        """Per batch, each layer's keys (or the states after its block) at its tokens in a slot.

        With them come the slots' numbers; one forward pass serves all layers.
        """
        caught: dict[int, Tensor] = {}

        def catch(layer: int, module: Any, args: Any, output: Any) -> None:
            tensor = output if states else args[0]
            caught[layer] = tensor[0] if isinstance(tensor, tuple) else tensor

        with ExitStack() as hooks:
            for layer in slots:
                name, module = self.projections[layer]
                if states:
                    module = self.model.get_submodule(name.rpartition(".mlp")[0])
                hooks.enter_context(module.register_forward_hook(partial(catch, layer)))
            for i, part in enumerate(rows.chunks(self.batch_size)):
                self.logits(part)
                batch = {}
                for layer, whole in slots.items():
                    numbers = whole[i * self.batch_size :][: len(part.ids), : part.ids.shape[1]]
                    picked = caught[layer][(numbers >= 0).to(self.device)]
                    batch[layer] = (picked.double().cpu(), numbers[numbers >= 0])
                yield batch

    def keys(self, rows: Rows, slots: dict[int, Slots], *, states: bool = False) -> dict[int, Numbered]:
        """All that :meth:`gather` yields, in one piece per layer."""
        batches = list(self.gather(rows, slots, states=states))
        parts = {layer: zip(*(batch[layer] for batch in batches), strict=True) for layer in slots}
        return {layer: (torch.cat(keys), torch.cat(numbers)) for layer, (keys, numbers) in parts.items()}

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
