"""One transformer block on many short runs behind shared prompts, as plain matrix products.

``HookedTransformer`` attends over one key-value cache a batch row, so a batch of interventions on one
prompt holds (and rotates, and masks) a copy of the prompt's keys for each; profiled, that was two
thirds of a sweep. Here the runs of one prompt attend to its keys together, as one product, and the
gated MLP works in place. Norms, projections and activation functions stay TransformerLens' own.
The engines above are tested against TransformerLens' own forward, run by run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.utilities.activation_functions import apply_softcap

from bkdlens.types import Architecture

NOWHERE = torch.iinfo(torch.int64).max  # the position of a key that no query sees
MLP_BYTES = 2**23  # of one hidden activation: blocks of rows that stay in the processor's cache
LOGIT_BYTES = 2**25  # of one block of logits


def supported(model: HookedTransformer) -> bool:
    """Whether this file computes what the model would."""
    cfg = model.cfg
    known = cfg.original_architecture in get_args(Architecture)
    return known and cfg.positional_embedding_type in ("rotary", "standard") and not cfg.attn_only


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


def embed(
    model: HookedTransformer, tokens: Int[Tensor, "run pos"], positions: Int[Tensor, "run pos"]
) -> Float[Tensor, "run pos d_model"]:
    """The residual stream before the first block; what lies past the context is padding."""
    resid = model.embed(tokens)
    if model.cfg.positional_embedding_type != "standard":
        return resid
    return resid + model.W_pos[positions.clamp(max=model.cfg.n_ctx - 1)]


def project(
    block: Any, resid: Float[Tensor, "run pos d_model"], positions: Int[Tensor, "run pos"]
) -> tuple[
    Float[Tensor, "run pos head d_head"],
    Float[Tensor, "run pos kv_head d_head"],
    Float[Tensor, "run pos kv_head d_head"],
]:
    """Queries (divided by the attention scale) and keys, both rotated, and values."""
    attn, x = block.attn, block.ln1(resid)
    q, k, v = attn.calculate_qkv_matrices(x, x, x)
    return _rotate(attn, q / attn.attn_scale, positions), _rotate(attn, k, positions), v


def _rotate(
    attn: Any, x: Float[Tensor, "run pos head d_head"], positions: Int[Tensor, "run pos"]
) -> Float[Tensor, "run pos head d_head"]:
    """TransformerLens' rotary embedding at given positions (``apply_rotary`` takes a mask instead)."""
    cfg = attn.cfg
    if cfg.positional_embedding_type != "rotary":
        return x
    positions = positions.clamp(max=cfg.n_ctx - 1)  # what lies past the context is padding
    needed = int(positions.max()) + 1
    if needed > attn.rotary_cos.shape[0]:
        attn._extend_rotary_embeddings(min(cfg.n_ctx, max(needed, 2 * attn.rotary_cos.shape[0])))
    cos, sin = (table[positions][..., None, :] for table in (attn.rotary_cos, attn.rotary_sin))
    turned, kept = x[..., : cfg.rotary_dim], x[..., cfg.rotary_dim :]
    turned = turned * cos + attn.rotate_every_two(turned) * sin
    return turned if kept.shape[-1] == 0 else torch.cat([turned, kept], dim=-1)


def window(attn: Any) -> int | None:
    """How many positions a query sees, itself included; None for all."""
    return attn.cfg.window_size if attn.attn_type == "local" else None


def seen(queries: Int[Tensor, "*q"], keys: Int[Tensor, "*k"], width: int | None) -> Bool[Tensor, "*qk"]:
    """Which key positions each query position sees, the two broadcast against each other."""
    causal = keys <= queries
    return causal if width is None else causal & (keys > queries - width)


def attend_causally(
    attn: Any,
    q: Float[Tensor, "run pos head d_head"],
    k: Float[Tensor, "run kv_head key d_head"],
    v: Float[Tensor, "run kv_head key d_head"],
) -> Float[Tensor, "run pos head d_head"]:
    """``z`` of whole sequences, whose last keys are the queries' own (a prompt's prefill)."""
    n, length, n_heads, _ = q.shape
    keys = torch.arange(k.shape[2], device=q.device)
    mask = seen(keys[-length:, None], keys, window(attn))
    q = q.transpose(1, 2)
    if attn.cfg.attn_scores_soft_cap <= 0:
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)
        return z.transpose(1, 2)
    grouped = q.reshape(n, k.shape[1], -1, q.shape[-1])
    scores = apply_softcap(grouped @ k.mT, attn.cfg.attn_scores_soft_cap).to(precise(q.dtype))
    scores = scores.view(n, n_heads, length, -1).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype).view(n, k.shape[1], -1, k.shape[2])
    return (weights @ v).view(n, n_heads, length, -1).transpose(1, 2)


def attend(
    attn: Any,
    q: Float[Tensor, "run pos head d_head"],
    near_keys: Float[Tensor, "run kv_head near d_head"],
    near_values: Float[Tensor, "run kv_head near d_head"],
    near_at: Int[Tensor, "run near"],
    far_keys: Float[Tensor, "prompt kv_head far d_head"],
    far_values: Float[Tensor, "prompt kv_head far d_head"],
    far_at: Int[Tensor, "prompt far"],
    positions: Int[Tensor, "run pos"],
    groups: Groups,
) -> Float[Tensor, "run pos head d_head"]:
    """``z`` of every run, which sees its prompt's keys (far) and its own (near).

    All runs of a prompt are rows of one product with the prompt's keys, which are never copied; the
    two parts share one softmax. ``*_at`` are the keys' positions.
    """
    cfg, width = attn.cfg, window(attn)
    (r, length, n_heads, d_head), (kv, m) = q.shape, near_keys.shape[1:3]
    n, slots = groups.runs.shape
    rows = (n_heads // kv) * length
    everyone = len(groups.prompts) == len(far_at)
    if not everyone:
        far_keys, far_values, far_at = (t[groups.prompts] for t in (far_keys, far_values, far_at))
    # [run kv (repeat pos) d_head], and the same by prompt: [prompt kv (slot repeat pos) d_head].
    q = q.unflatten(2, (kv, -1)).permute(0, 2, 3, 1, 4).reshape(r, kv, rows, d_head)
    q_far = q[groups.runs].transpose(1, 2).reshape(n * kv, slots * rows, d_head)
    far = (q_far @ far_keys.flatten(0, 1).mT).view(n, kv, slots, -1, length, far_keys.shape[2])
    near = (q.flatten(0, 1) @ near_keys.flatten(0, 1).mT).view(r, kv, -1, length, m)
    cap, dtype = cfg.attn_scores_soft_cap, precise(q.dtype)
    far, near = (apply_softcap(scores, cap).to(dtype) for scores in (far, near))
    hidden = ~seen(positions[..., None], near_at[:, None], width)
    near = near.masked_fill(hidden[:, None, None], -torch.inf)
    if width is not None:
        far_seen = seen(positions[groups.runs][..., None], far_at[:, None, None], width)
        far = far.masked_fill(~far_seen[:, None, :, None], -torch.inf)
    elif bool((hidden := far_at == NOWHERE).any()):
        far = far.masked_fill(hidden[:, None, None, None, None], -torch.inf)
    # Every query sees itself, so no row is empty. Half precision is left in the softmax only.
    weights = torch.cat([far, near[groups.runs].transpose(1, 2)], dim=-1).softmax(-1).to(q.dtype)
    del far, near
    split = far_values.shape[2]
    z_far = weights[..., :split].reshape(n * kv, slots * rows, split) @ far_values.flatten(0, 1)
    z_far = z_far.view(n, kv, slots, rows, d_head).transpose(1, 2).flatten(0, 1)[groups.place]
    weights = weights[..., split:].transpose(1, 2).flatten(0, 1)[groups.place]
    z = z_far + (weights.reshape(r * kv, rows, m) @ near_values.flatten(0, 1)).view(r, kv, rows, d_head)
    return z.view(r, n_heads, length, d_head).transpose(1, 2)


def precise(dtype: torch.dtype) -> torch.dtype:
    """At least float32: of scores, whatever the weights are."""
    return torch.promote_types(dtype, torch.float32)


def attention_out(
    block: Any, z: Float[Tensor, "run pos head d_head"]
) -> Float[Tensor, "run pos d_model"]:
    """What the heads write together, before the post-norm of the architectures that have one."""
    # Flattened this way the weight is Hugging Face's own matrix, so nothing is copied.
    weight = block.attn.W_O.permute(2, 0, 1).flatten(1)
    return F.linear(z.flatten(2), weight, block.attn.b_O)


def post_norm(block: Any, attention: Float[Tensor, "*run d_model"]) -> Float[Tensor, "*run d_model"]:
    """``hook_attn_out`` of :func:`attention_out`."""
    return block.ln1_post(attention) if block.cfg.use_normalization_before_and_after else attention


def finish_block(
    block: Any,
    resid: Float[Tensor, "run pos d_model"],
    attention: Float[Tensor, "run pos d_model"],
) -> Float[Tensor, "run pos d_model"]:
    """``hook_resid_post`` of a block's input and its ``hook_attn_out``.

    Without gradients ``resid`` is overwritten, a block of rows at a time.
    """
    parallel = block.cfg.parallel_attn_mlp
    if torch.is_grad_enabled():
        middle = resid + attention
        return middle + mlp_out(block, resid if parallel else middle)
    size = max(1, MLP_BYTES // (resid.shape[1] * (block.cfg.d_mlp or 1) * resid.element_size()))
    for rows, added in zip(resid.split(size), attention.split(size), strict=True):
        if parallel:
            added = added + mlp_out(block, rows)
            rows += added
        else:
            rows += added
            rows += mlp_out(block, rows)
    return resid


def mlp_out(block: Any, resid: Float[Tensor, "run pos d_model"]) -> Float[Tensor, "run pos d_model"]:
    """``hook_mlp_out`` of what the MLP reads."""
    x, mlp = block.ln2(resid), block.mlp
    if torch.is_grad_enabled() or not isinstance(mlp, GatedMLP):
        return block.apply_mlp(x)
    hidden = F.linear(x, mlp.W_gate.T)
    hidden = F.silu(hidden, inplace=True) if mlp.act_fn is F.silu else mlp.act_fn(hidden)
    hidden *= F.linear(x, mlp.W_in.T)
    hidden += mlp.b_in
    out = F.linear(hidden, mlp.W_out.T, mlp.b_out)
    return block.ln2_post(out) if block.cfg.use_normalization_before_and_after else out


def unembed(
    model: HookedTransformer, resid: Float[Tensor, "run pos d_model"]
) -> Float[Tensor, "run pos d_vocab"]:
    """Logits of the final residual stream."""
    logits = model.unembed(model.ln_final(resid))
    return apply_softcap(logits, model.cfg.output_logits_soft_cap)


def log_probs(
    model: HookedTransformer, resid: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Log probability of each row's target, in nats and at least float32, few logits at a time."""
    size, dtype = max(1, LOGIT_BYTES // (4 * model.cfg.d_vocab_out)), precise(resid.dtype)
    parts = [
        -F.cross_entropy(unembed(model, rows[:, None])[:, 0].to(dtype), wanted, reduction="none")
        for rows, wanted in zip(resid.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


def next_tokens(model: HookedTransformer, resid: Float[Tensor, "*row d_model"]) -> Int[Tensor, "*row"]:
    """The most likely next token of each row."""
    size = max(1, LOGIT_BYTES // (4 * model.cfg.d_vocab_out))
    rows = resid.reshape(-1, 1, resid.shape[-1])
    parts = [unembed(model, part)[:, 0].argmax(-1) for part in rows.split(size)]
    return torch.cat(parts).view(resid.shape[:-1])
