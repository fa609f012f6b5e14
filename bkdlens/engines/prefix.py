"""A prompt's keys and values before its last token, computed once and shared by everything that follows.

The intervention point is the last prompt token in the prefill, so nothing before it ever changes. What
all prompts have in common at their beginning (a system text, an instruction) is run once for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.prompts import Prompt, pad_right
from bkdlens.engines.block import (
    NOWHERE,
    Keys,
    attend_causally,
    attention_out,
    embed,
    finish_block,
    post_norm,
    project,
)
from bkdlens.engines.memory import batches
from bkdlens.progress import track


@dataclass(frozen=True, eq=False)
class Prefix:
    """All but the last token of some prompts, padded on the right, and the last token, not run yet.

    Attributes:
        layers: the prompts' keys and values, layer by layer.
        lengths: of each prompt without its last token, which is that token's position.
        last: each prompt's last token.
    """

    layers: tuple[Keys, ...]
    lengths: Int[Tensor, " prompt"]
    last: Int[Tensor, " prompt"]

    def __len__(self) -> int:
        return len(self.last)


def prefixes(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    tails: Sequence[int],
    n_runs: int,
    memory_gb: float | None,
    *,
    bar: str | None,
    kept_layers: int = 0,
) -> Iterator[tuple[list[int], int, Prefix]]:
    """Run prompts' prefixes: the numbers of a batch's prompts, how many runs of each fit, their prefix.

    ``tails`` is how many tokens are run behind each prefix, ``bar`` the progress bar's text (None for
    no bar); the others are as in :func:`bkdlens.engines.memory.batches`.
    """
    common = run_common(model, prompts)
    sizes = [(tail, len(prompt.ids)) for tail, prompt in zip(tails, prompts, strict=True)]
    work = batches(model, sizes, n_runs, memory_gb, kept_layers=kept_layers)
    for rows, size in track(list(work), bar or "", bar is not None):
        yield rows, size, run_prefix(model, [prompts[i] for i in rows], common)


def common_length(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with; of each, two are left out: one to run, and the last."""
    shortest = min(len(prompt.ids) for prompt in prompts) - 2
    first, others = prompts[0].ids, prompts[1:]
    for i in range(shortest):
        if any(prompt.ids[i] != first[i] for prompt in others):
            return i
    return max(0, shortest)


@torch.no_grad()
def run_common(model: HookedTransformer, prompts: Sequence[Prompt]) -> Prefix | None:
    """The prefix that all prompts share, as that of one prompt; None if there is none or one prompt."""
    length = common_length(prompts) if len(prompts) > 1 else 0
    return run_prefix(model, [Prompt("", prompts[0].ids[: length + 1])]) if length else None


@torch.no_grad()
def run_prefix(
    model: HookedTransformer, prompts: Sequence[Prompt], common: Prefix | None = None
) -> Prefix:
    """Run all but the last token of some prompts, behind what ``common`` says that they share."""
    device, n = model.W_E.device, len(prompts)
    start = 0 if common is None else int(common.lengths)
    ids, real = (t.to(device) for t in pad_right([prompt.ids[start:-1] for prompt in prompts], 0))
    lengths = start + real.sum(1)
    last = torch.tensor([prompt.ids[-1] for prompt in prompts], device=device)
    places = torch.arange(start + ids.shape[1], device=device).expand(n, -1)
    # Whoever attends to a prefix must not see its padding.
    at, new_at = torch.where(places < lengths[:, None], places, NOWHERE), places[:, start:]
    layers: list[Keys] = []
    resid = embed(model, ids, new_at)
    for layer, block in enumerate(model.blocks):
        q, new = project(block, resid, new_at)
        keys, values = new.keys, new.values
        if common is not None:
            before = common.layers[layer]
            keys = torch.cat([before.keys.expand(n, -1, -1, -1), keys], dim=2)
            values = torch.cat([before.values.expand(n, -1, -1, -1), values], dim=2)
        # Copied into a row once, here, and not again by every product that reads them.
        layers.append(Keys(keys.contiguous(), values.contiguous(), at))
        if layer + 1 < model.cfg.n_layers:  # nobody reads what comes out of the last block
            z = attend_causally(block.attn, q, layers[-1])
            resid = finish_block(block, resid, post_norm(block, attention_out(block, z)))
    return Prefix(tuple(layers), lengths, last)


@dataclass(frozen=True, eq=False)
class Forced:
    """Answers behind prefixes, given to the model whatever it would say itself (teacher forcing).

    Attributes:
        inputs: the prompt's last token and all tokens of the answer but the last.
        at: their positions.
        targets: the answer, which these tokens are to predict.
        scored: which targets are no padding.
    """

    inputs: Int[Tensor, "prompt pos"]
    at: Int[Tensor, "prompt pos"]
    targets: Int[Tensor, "prompt pos"]
    scored: Bool[Tensor, "prompt pos"]

    @classmethod
    def of(cls, prefix: Prefix, answers: Sequence[Sequence[int]]) -> Forced:
        """One answer for each prompt of the prefix."""
        targets, scored = (t.to(prefix.last.device) for t in pad_right(answers, 0))
        inputs = torch.cat([prefix.last[:, None], targets[:, :-1]], dim=1)
        at = prefix.lengths[:, None] + torch.arange(targets.shape[1], device=targets.device)
        return cls(inputs, at, targets, scored)
