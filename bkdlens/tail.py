"""The forward pass of many short tails on few shared prefixes, without copying a prefix.

``HookedTransformer`` attends over one key-value cache a batch row, so that a batch of interventions on
one prompt holds (and rotates) a copy of the prompt's keys and values for each. Profiled on an embedded
model that was two thirds of the time. Here the runs of one prompt attend to its keys together, as one
matrix product; norms, projections and MLPs stay TransformerLens' own modules, and the hook functions
are the same. ``resume(..., through_hooks=True)`` is the slow oracle of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utilities.activation_functions import apply_softcap

from bkdlens.errors import HookError
from bkdlens.hooks import HookFunction

SITES = ("hook_resid_pre", "attn.hook_z", "attn.hook_result", "hook_attn_out")


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of all but the last token of a batch of prompts, padded on the left.

    ``rows`` are the prompts' places in the list they were given in.
    """

    rows: tuple[int, ...]
    keys: tuple[Float[Tensor, "prompt pos kv_head d_head"], ...]
    values: tuple[Float[Tensor, "prompt pos kv_head d_head"], ...]
    mask: Bool[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]

    def __len__(self) -> int:
        return len(self.rows)


# Keys (rotated) and values of the tail so far, ``[run pos kv_head d_head]``, by layer.
Past = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Groups:
    """Runs by prompt, as a rectangle: ``[prompt slot]`` run numbers, and where each run is in it.

    Prompts with fewer runs repeat one of theirs; ``prompts`` are those that have any.
    """

    prompts: Int[Tensor, " prompt"]
    runs: Int[Tensor, "prompt slot"]
    place: Int[Tensor, " run"]

    @classmethod
    def of(cls, rows: Int[Tensor, " run"]) -> Groups:
        """Group runs by the prompt (``rows``) that each belongs to."""
        prompts, inverse, counts = rows.unique(return_inverse=True, return_counts=True)
        order = inverse.argsort(stable=True)
        start = counts.cumsum(0) - counts
        slots = int(counts.max())
        slot = torch.arange(len(rows), device=rows.device) - start[inverse[order]]
        runs = order[start][:, None].repeat(1, slots)
        runs[inverse[order], slot] = order
        place = torch.empty_like(rows)
        place[order] = inverse[order] * slots + slot
        return cls(prompts, runs, place)


def supported(model: HookedTransformer, names: Sequence[str]) -> bool:
    """Whether this file computes what the model would, with hooks at these names."""
    cfg = model.cfg
    plain = (
        cfg.positional_embedding_type in ("rotary", "standard")
        and cfg.original_architecture
        in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM",
            "Gemma2ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM")
        and not cfg.attn_only
    )  # fmt: skip
    return plain and all(name.split(".", 2)[-1] in SITES for name in names)


def forward_tail(
    model: HookedTransformer,
    prefix: Prefix,
    rows: Int[Tensor, " run"],
    resid: Float[Tensor, "run tail d_model"],
    first_layer: int,
    hooks: Mapping[str, HookFunction],
    past: Past | None = None,
) -> Float[Tensor, "run tail d_model"]:
    """The final residual stream of runs that start at ``first_layer`` behind shared prefixes.

    Args:
        model: one of the :func:`supported` architectures.
        prefix: the prompts.
        rows: the prompt of each run.
        resid: the residual stream before ``first_layer`` at the tail's positions.
        hooks: by hook name; a name that is never reached is an error.
        past: the tail so far, when it comes in pieces (decoding); this piece is added to it.
    """
    groups = Groups.of(rows)
    reached = set()

    def apply(name: str, activation: Tensor) -> Tensor:
        if name not in hooks:
            return activation
        reached.add(name)
        out = hooks[name](activation, hook=None)
        return activation if out is None else out

    for layer in range(first_layer, model.cfg.n_layers):
        block, name = model.blocks[layer], f"blocks.{layer}."
        resid = apply(f"{name}hook_resid_pre", resid)
        z = _attend(block.attn, block.ln1(resid), prefix, layer, rows, groups, past)
        z = apply(f"{name}attn.hook_z", z)
        if f"{name}attn.hook_result" in hooks:
            result = torch.einsum("rthd,hdm->rthm", z, block.attn.W_O)
            attention = apply(f"{name}attn.hook_result", result).sum(2) + block.attn.b_O
        else:
            # Flattened this way the weight is Hugging Face's own matrix, so nothing is copied.
            weight = block.attn.W_O.permute(2, 0, 1).reshape(model.cfg.d_model, -1)
            attention = F.linear(z.flatten(2), weight, block.attn.b_O)
        if model.cfg.use_normalization_before_and_after:
            attention = block.ln1_post(attention)
        attention = apply(f"{name}hook_attn_out", attention)
        if model.cfg.parallel_attn_mlp:
            resid = resid + attention + block.apply_mlp(block.ln2(resid))
        else:
            resid = resid + attention
            resid = resid + block.apply_mlp(block.ln2(resid))
    if missed := set(hooks) - reached:
        names = ", ".join(sorted(missed))
        raise HookError(f"The intervention at {names} never acted; the run starts at {first_layer}.")
    return resid


def _rotate(
    attn: Any,
    x: Float[Tensor, "*batch pos head d_head"],
    positions: Int[Tensor, "*batch pos"],
) -> Float[Tensor, "*batch pos head d_head"]:
    """TransformerLens' rotary embedding at given positions (``apply_rotary`` takes a mask instead)."""
    cfg = attn.cfg
    if cfg.positional_embedding_type != "rotary":
        return x
    needed = int(positions.max()) + 1
    if needed > attn.rotary_cos.shape[0]:
        attn._extend_rotary_embeddings(min(cfg.n_ctx, max(needed, 2 * attn.rotary_cos.shape[0])))
    cos, sin = (table[positions][..., None, :] for table in (attn.rotary_cos, attn.rotary_sin))
    turned, kept = x[..., : cfg.rotary_dim], x[..., cfg.rotary_dim :]
    turned = turned * cos + attn.rotate_every_two(turned) * sin
    return turned if kept.shape[-1] == 0 else torch.cat([turned, kept], dim=-1)


def _attend(
    attn: Any,
    x: Float[Tensor, "run tail d_model"],
    prefix: Prefix,
    layer: int,
    rows: Int[Tensor, " run"],
    groups: Groups,
    past: Past | None,
) -> Float[Tensor, "run tail head d_head"]:
    """``z`` of every run: attention to its prompt's prefix and to its own tail."""
    cfg, device = attn.cfg, x.device
    mask = prefix.mask[groups.prompts]
    width, tail = mask.shape[1], x.shape[1]
    done = past[layer][0].shape[1] if past and layer in past else 0
    q, k, v = attn.calculate_qkv_matrices(x, x, x)
    positions = prefix.mask.sum(1)[rows, None] + torch.arange(done, done + tail, device=device)
    q, k = _rotate(attn, q, positions), _rotate(attn, k, positions)
    if past is not None:
        if done:
            k, v = (torch.cat(pair, dim=1) for pair in zip(past[layer], (k, v), strict=True))
        past[layer] = (k, v)
    before = torch.arange(width, device=device)
    own = (before - (width - mask.sum(1))[:, None]).clamp(min=0)
    far_k = _rotate(attn, prefix.keys[layer][groups.prompts], own).permute(0, 2, 3, 1)
    far_v = prefix.values[layer][groups.prompts].permute(0, 2, 1, 3)
    n, slots = groups.runs.shape
    kv = k.shape[2]
    repeat = cfg.n_heads // kv
    # [prompt kv repeat slot tail d_head]: all runs of a prompt are rows of one product with its keys.
    q = (q / attn.attn_scale)[groups.runs].unflatten(3, (kv, repeat)).permute(0, 3, 4, 1, 2, 5)
    k, v = (t[groups.runs].permute(0, 3, 1, 2, 4)[:, :, None] for t in (k, v))
    far = (q.reshape(n, kv, repeat * slots * tail, -1) @ far_k).view(*q.shape[:5], width)
    near = q @ k.transpose(-1, -2)
    far, near = (_precise(apply_softcap(s, cfg.attn_scores_soft_cap)) for s in (far, near))
    at = done + torch.arange(tail, device=device)
    to = torch.arange(done + tail, device=device)
    seen = to[None, :] <= at[:, None]
    if attn.attn_type == "local":
        seen = seen & (to[None, :] > at[:, None] - cfg.window_size)
        far = far.masked_fill(before[None, :] <= (width + at)[:, None] - cfg.window_size, -torch.inf)
    near = near.masked_fill(~seen, -torch.inf)
    if not bool(mask.all()):
        far = far.masked_fill(~mask[:, None, None, None, None, :], -torch.inf)
    # One softmax over both parts. Every token sees itself, so the maximum is finite.
    highest = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
    far, near = (far - highest).exp_(), (near - highest).exp_()
    total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
    far, near, total = (part.to(v.dtype) for part in (far, near, total))
    z = (far.view(n, kv, repeat * slots * tail, width) @ far_v).view(*q.shape) + near @ v
    z = (z / total).permute(0, 3, 4, 1, 2, 5).reshape(n * slots, tail, cfg.n_heads, -1)
    return z[groups.place]


def _precise(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()
