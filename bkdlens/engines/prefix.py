"""A prompt's keys and values before its last token, computed once and shared by everything that follows.

The intervention point is the last prompt token in the prefill, so nothing before it ever changes. What
all prompts begin with (a system text, an instruction) is run once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.prompts import Prompt, pad_right
from bkdlens.engines import block as blocks
from bkdlens.engines.block import NOWHERE, Keys
from bkdlens.engines.memory import batches
from bkdlens.progress import track


@dataclass(frozen=True, eq=False)
class Prefix:
    """All but the last token of some prompts, padded on the right, and the last token, not yet run."""

    layers: tuple[Keys, ...]  # the prompts' keys and values, layer by layer
    lengths: Int[Tensor, " prompt"]  # without the last token, whose position they therefore are
    last: Int[Tensor, " prompt"]  # each prompt's last token

    def __len__(self) -> int:
        return len(self.last)


def prefixes(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    n_runs: int,
    memory_gb: float | None,
    bar: str,
    progress: bool,
    *,
    tails: Sequence[int] | None = None,
    kept_layers: int = 0,
) -> Iterator[tuple[list[int], int, Prefix]]:
    """Each batch's prompts by number, how many runs of each fit at a time, and their prefix.

    ``tails`` are the numbers of tokens that are run behind each prefix (1 for None), ``bar`` is the
    progress bar's text; the others are as in :func:`bkdlens.engines.memory.batches`.
    """
    common = run_common(model, prompts)
    lengths = [len(prompt.ids) for prompt in prompts]
    sizes = list(zip(tails or [1] * len(prompts), lengths, strict=True))
    work = batches(model, sizes, n_runs, memory_gb, kept_layers=kept_layers)
    for rows, size in track(list(work), bar, progress):
        yield rows, max(1, size), run_prefix(model, [prompts[i] for i in rows], common)


def common_length(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with, without their last two: one to run, and the last."""
    columns = zip(*(prompt.ids[:-2] for prompt in prompts), strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


@torch.no_grad()
def run_common(model: HookedTransformer, prompts: Sequence[Prompt]) -> Prefix | None:
    """The prefix that several prompts share, as that of one prompt; None if they share none."""
    length = common_length(prompts) if len(prompts) > 1 else 0
    return run_prefix(model, [Prompt("", prompts[0].ids[: length + 1])]) if length else None


@torch.no_grad()
def run_prefix(
    model: HookedTransformer, prompts: Sequence[Prompt], common: Prefix | None = None
) -> Prefix:
    """Run all but the last token of these prompts, behind the beginning that they have in ``common``."""
    device, n = model.W_E.device, len(prompts)
    start = 0 if common is None else int(common.lengths)
    ids, real = (t.to(device) for t in pad_right([prompt.ids[start:-1] for prompt in prompts], 0))
    lengths = start + real.sum(1)
    last = torch.tensor([prompt.ids[-1] for prompt in prompts], device=device)
    places = torch.arange(start + ids.shape[1], device=device).expand(n, -1)
    # What attends to a prefix must not see its padding.
    at, new_at = torch.where(places < lengths[:, None], places, NOWHERE), places[:, start:]
    layers: list[Keys] = []
    resid = blocks.embed(model, ids, new_at)
    for layer, block in enumerate(model.blocks):
        q, new = blocks.project(block, resid, new_at)
        keys, values = new.keys, new.values
        if common is not None:
            before = common.layers[layer]
            keys = torch.cat([before.keys.expand(n, -1, -1, -1), keys], dim=2)
            values = torch.cat([before.values.expand(n, -1, -1, -1), values], dim=2)
        # Made contiguous once, and not again by every product that reads them.
        layers.append(Keys(keys.contiguous(), values.contiguous(), at))
        if layer + 1 < model.cfg.n_layers:  # nothing reads the last block's output
            z = blocks.attend_causally(block.attn, q, layers[-1])
            attention = blocks.post_norm(block, blocks.attention_out(block, z))
            resid = blocks.finish_block(block, resid, attention)
    return Prefix(tuple(layers), lengths, last)


@dataclass(frozen=True, eq=False)
class Forced:
    """Answers behind prefixes, given to the model whatever it would answer itself (teacher forcing)."""

    inputs: Int[Tensor, "prompt pos"]  # the prompt's last token and the answer's tokens but the last
    at: Int[Tensor, "prompt pos"]  # the positions of the inputs
    targets: Int[Tensor, "prompt pos"]  # the answer, which the inputs are to predict
    scored: Bool[Tensor, "prompt pos"]  # which targets are not padding

    @classmethod
    def of(cls, prefix: Prefix, answers: Sequence[Sequence[int]]) -> Forced:
        """The prefix' prompts with one answer each."""
        targets, scored = (t.to(prefix.last.device) for t in pad_right(answers, 0))
        inputs = torch.cat([prefix.last[:, None], targets[:, :-1]], dim=1)
        at = prefix.lengths[:, None] + torch.arange(targets.shape[1], device=targets.device)
        return cls(inputs, at, targets, scored)
