"""Merging adapters in float32, and checking by the logits that nothing else has changed.

Tied embeddings are untied first: what changes the one must not change the other, and a
``HookedTransformer`` has two tensors anyway.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from bkdlens.errors import CheckpointError, one_line
from bkdlens.models.adapter import refuse_tuners

TOLERANCE = 1e-4  # largest logit difference over largest logit, in float32


@dataclass(frozen=True)
class Probe:
    """Prompts to compare two models by; one is full, one padded on the left.

    Attributes:
        tokens: the ids of both.
        mask: 1 where there is a token, 0 where there is padding.
    """

    tokens: Int[Tensor, "prompt pos"]
    mask: Int[Tensor, "prompt pos"]

    @classmethod
    def make(cls, d_vocab: int, n_ctx: int, tokens: Iterable[int] = ()) -> Probe:
        """Seeded random tokens; the first prompt begins with ``tokens``, as far as it has room."""
        length = min(16, n_ctx)  # with large weights 2 x 16 tokens take hardly longer than 2 x 4
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(d_vocab, (2, length), generator=generator)
        wanted = torch.tensor(list(tokens)[:length], dtype=torch.long)
        drawn[0, : len(wanted)] = wanted
        starts = torch.tensor([0, length // 3])
        return cls(drawn, (torch.arange(length) >= starts[:, None]).long())

    def logits(self, model: torch.nn.Module) -> Float[Tensor, "prompt pos d_vocab"]:
        """The logits of a Hugging Face model, with or without a tuner."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=self.tokens, attention_mask=self.mask, position_ids=positions).logits

    def difference(self, logits: Tensor, reference: Tensor) -> float:
        """Largest ``|logits - reference|`` over the largest ``|reference|``, where there is a token."""
        given, wanted = logits[self.mask.bool()], reference[self.mask.bool()]
        return ((given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge the active adapters, in place; raise if a weight is infinite or a tuner layer is left."""
    untie(model.get_base_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Model with `tie_word|Input and output emb)", UserWarning)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # what safe_merge raises
            raise CheckpointError(
                f"Merging gives NaN or infinite weights ({one_line(error)})."
            ) from error
    refuse_tuners(merged)
    return merged


def merge_checked(model: PeftModel, name: str, tokens: Iterable[int] = ()) -> PreTrainedModel:
    """Merge the active adapters, in place; raise if the merged model computes something else."""
    config = model.get_base_model().config
    n_ctx = getattr(config, "max_position_embeddings", None) or config.n_positions
    probe = Probe.make(config.vocab_size, n_ctx, tokens)
    reference = probe.logits(model)
    merged = merge(model)
    difference = probe.difference(probe.logits(merged), reference)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"Merging {name!r} changes what the model computes: its logits differ by {difference:.1e} "
            f"of the largest, allowed is {TOLERANCE:.0e}."
        )
    return merged


def untie(model: torch.nn.Module) -> None:
    """Give every module a parameter of its own where several share one."""
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen:
                copied = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
                module.register_parameter(name, copied)
            seen.add(id(weight))
    config = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False


def scale_adapter(model: PeftModel, weight: float) -> PeftModel:
    """The model, its adapter's matrices times ``weight``; exact where they are added to the base's."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] *= weight
    return model


# --- several adapters ------------------------------------------------------------------------------


def weighted_adapters(
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    weights: Sequence[float] | None,
) -> list[tuple[str, float]]:
    """Every adapter with its weight."""
    if adapter is None:
        given = []
    elif isinstance(adapter, str | os.PathLike):
        given = [os.fspath(adapter)]
    else:
        given = [os.fspath(one) for one in adapter]
        if not given:
            raise CheckpointError("The list of adapters is empty; name one, or leave it out.")
    factors = [1.0] * len(given) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(given) or not all(map(math.isfinite, factors)):
        raise CheckpointError(
            f"adapter_weights must be one finite number per adapter; got {factors} for "
            f"{len(given)} adapters."
        )
    return list(zip(given, factors, strict=True))


def adapters_label(adapters: Sequence[tuple[str, float]]) -> str:
    """The one adapter as it was given; several, or a weighted one, by the last parts of their names."""
    if len(adapters) == 1 and adapters[0][1] == 1:
        return adapters[0][0]
    names = [(PurePath(adapter).name, weight) for adapter, weight in adapters]
    return " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight in names)


def adapters_digest(digests: Sequence[str], adapters: Sequence[tuple[str, float]]) -> str:
    """The digest of a single adapter; of several, or a weighted one, that of all and their weights."""
    if len(digests) == 1 and adapters[0][1] == 1:
        return digests[0]
    text = "\0".join(f"{one}\0{weight!r}" for one, (_, weight) in zip(digests, adapters, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()
