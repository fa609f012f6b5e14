"""A prompt's keys and values before its last token, computed once and shared by everything that follows.

The intervention point is the last prompt token in the prefill, so nothing before it ever changes. What
all prompts have in common at their beginning (a system text, an instruction) is run once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.prompts import Prompt, pad_right
from bkdlens.engines.block import (
    NOWHERE,
    attend_causally,
    attention_out,
    embed,
    finish_block,
    post_norm,
    project,
)


@dataclass(frozen=True, eq=False)
class Prefix:
    """Rotated keys, and values, of all but the last token of some prompts, padded on the right.

    ``at`` are the positions, ``NOWHERE`` for padding; ``last`` is each prompt's last token and
    ``lengths`` its position.
    """

    keys: tuple[Float[Tensor, "prompt kv_head pos d_head"], ...]
    values: tuple[Float[Tensor, "prompt kv_head pos d_head"], ...]
    at: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    last: Int[Tensor, " prompt"]

    def __len__(self) -> int:
        return len(self.last)


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
    ids, real = pad_right([prompt.ids[start:-1] for prompt in prompts], 0)
    ids, real = ids.to(device), real.to(device)
    lengths = start + real.sum(1)
    last = torch.tensor([prompt.ids[-1] for prompt in prompts], device=device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    at = torch.arange(start + ids.shape[1], device=device).expand(n, -1)
    positions = at[:, start:]
    resid = embed(model, ids, positions)
    for layer, block in enumerate(model.blocks):
        q, k, v = project(block, resid, positions)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if common is not None:
            k = torch.cat([common.keys[layer].expand(n, -1, -1, -1), k], dim=2)
            v = torch.cat([common.values[layer].expand(n, -1, -1, -1), v], dim=2)
        keys.append(k.contiguous())
        values.append(v.contiguous())
        if layer + 1 < model.cfg.n_layers:
            z = attend_causally(block.attn, q, keys[-1], values[-1])
            resid = finish_block(block, resid, post_norm(block, attention_out(block, z)))
    at = torch.where(at < lengths[:, None], at, NOWHERE)
    return Prefix(tuple(keys), tuple(values), at, lengths, last)
