"""Merging adapters in float32, and checking by the logits that nothing else has changed.

Tied embeddings are untied first: what changes one must not change the other, and a
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
from transformers import PretrainedConfig, PreTrainedModel

from bkdlens.errors import CheckpointError, one_line
from bkdlens.models.adapter import refuse_tuners

TOLERANCE = 1e-4  # largest logit difference over largest logit, in float32


@dataclass(frozen=True)
class Probe:
    """Two prompts to compare models by, one full and one padded on the left."""

    tokens: Int[Tensor, "prompt pos"]  # the ids of both
    mask: Int[Tensor, "prompt pos"]  # 1 where there is a token, 0 where there is padding

    @classmethod
    def make(cls, config: PretrainedConfig, tokens: Iterable[int] = ()) -> Probe:
        """Seeded random tokens; the first prompt begins with ``tokens``, as far as it has room."""
        # with large weights 2 x 16 tokens take hardly longer than 2 x 4
        length = min(16, config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(config.vocab_size, (2, length), generator=generator)
        wanted = torch.tensor(list(tokens)[:length], dtype=torch.long)
        drawn[0, : len(wanted)] = wanted
        starts = torch.tensor([0, length // 3])
        return cls(drawn, (torch.arange(length) >= starts[:, None]).long())

    def logits(self, model: torch.nn.Module) -> Float[Tensor, "prompt pos d_vocab"]:
        """The logits of a Hugging Face model, with or without a tuner."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=self.tokens, attention_mask=self.mask, position_ids=positions).logits

    def compare(self, logits: Tensor, reference: Tensor, complaint: str) -> float:
        """Largest ``|logits - reference|`` over largest ``|reference|``; raise above ``TOLERANCE``."""
        tested, wanted = logits[self.mask.bool()], reference[self.mask.bool()]
        difference = ((tested - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
        if not difference <= TOLERANCE:  # a NaN fails too
            raise CheckpointError(
                f"{complaint}: its logits differ by {difference:.1e} of the largest, allowed is "
                f"{TOLERANCE:.0e}."
            )
        return difference


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
    probe = Probe.make(model.config, tokens)
    reference = probe.logits(model)
    merged = merge(model)
    probe.compare(probe.logits(merged), reference, f"Merging {name!r} changes what the model computes")
    return merged


def untie(model: PreTrainedModel) -> None:
    """Give every module its own parameter where several share one."""
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen:
                copied = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
                module.register_parameter(name, copied)
            seen.add(id(weight))
    model.config.tie_word_embeddings = False


def scale_adapter(model: PeftModel, weight: float) -> PeftModel:
    """The model with its adapter's matrices times ``weight``; exact if they are added to the base's."""
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
    if adapter is None or isinstance(adapter, str | os.PathLike):
        adapter = [] if adapter is None else [adapter]
    elif not (adapter := list(adapter)):
        raise CheckpointError("The list of adapters is empty; name one, or leave it out.")
    factors = [1.0] * len(adapter) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(adapter) or not all(map(math.isfinite, factors)):
        raise CheckpointError(
            f"adapter_weights must be one finite number per adapter; got {factors} for "
            f"{len(adapter)} adapters."
        )
    return [(os.fspath(one), factor) for one, factor in zip(adapter, factors, strict=True)]


def name_and_digest(
    adapters: Sequence[tuple[str, float]], digests: Sequence[str]
) -> tuple[str | None, str | None]:
    """The label and digest of all adapters with their weights; a lone unweighted one keeps its own."""
    if not adapters:
        return None, None
    if len(adapters) == 1 and adapters[0][1] == 1:
        return adapters[0][0], digests[0]
    names = [(PurePath(adapter).name, weight) for adapter, weight in adapters]
    label = " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight in names)
    text = "\0".join(f"{one}\0{weight!r}" for one, (_, weight) in zip(digests, adapters, strict=True))
    return label, hashlib.sha256(text.encode()).hexdigest()
