"""One transformer block on many short runs behind shared prompts, as plain matrix products.

``HookedTransformer`` attends over one key-value cache per batch row, so a batch of interventions on one
prompt holds (and rotates, and masks) a copy of the prompt's keys for each: two thirds of a sweep's time.
Here the runs of one prompt attend to its keys together, as one product, and the gated MLP works in
place. Norms, projections and activation functions stay TransformerLens' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

NOWHERE = torch.iinfo(torch.int64).max  # the position of a key that no query sees: after all of them
MLP_BYTES = 2**23  # of one block of hidden activations, which stays in the processor's cache
LOGIT_BYTES = 2**25  # of one block of logits, by far the widest rows where the vocabulary is large

Stream = Float[Tensor, "run pos d_model"]
PerHead = Float[Tensor, "run pos head d_head"]
Positions = Int[Tensor, "run pos"]
# Called with a site's name and activation, as TransformerLens' hooks are; what it returns goes on.
Touch = Callable[[str, Tensor], Tensor]


def supported(model: HookedTransformer) -> bool:
    """Whether this file computes what the model would."""
    cfg = model.cfg
    known = cfg.original_architecture in get_args(Architecture)
    return known and cfg.positional_embedding_type in ("rotary", "standard") and not cfg.attn_only


@dataclass(frozen=True, eq=False)
class Keys:
    """What attention reads in one layer: keys and values of prompts (``far``) or of runs (``near``)."""

    keys: Float[Tensor, "owner kv_head key d_head"]  # rotated: their positions never change
    values: Float[Tensor, "owner kv_head key d_head"]  # one per key
    at: Int[Tensor, "owner key"]  # the keys' positions in the whole sequence; NOWHERE for padding

    def of(self, owners: Int[Tensor, " owner"]) -> Keys:
        """The keys of these prompts or runs, copied."""
        return Keys(self.keys[owners], self.values[owners], self.at[owners])

    def then(self, more: Keys) -> Keys:
        """These keys, followed by ``more`` of the same owners."""
        keys, values = torch.cat([self.keys, more.keys], 2), torch.cat([self.values, more.values], 2)
        return Keys(keys, values, torch.cat([self.at, more.at], 1))


@dataclass(frozen=True, eq=False)
class Groups:
    """Runs by prompt, as a rectangle, so that all runs of a prompt are rows of one matrix product."""

    prompts: Int[Tensor, " prompt"]  # those that have runs, ascending
    runs: Int[Tensor, "prompt slot"]  # each prompt's runs; to leave no gaps, its first is repeated
    place: Int[Tensor, " run"]  # where each run is in the flattened rectangle

    @classmethod
    def of(cls, rows: Int[Tensor, " run"]) -> Groups:
        """Runs grouped by the prompt (``rows``) that each belongs to."""
        prompts, inverse, counts = rows.unique(return_inverse=True, return_counts=True)
        order = inverse.argsort(stable=True)  # the runs, prompt by prompt
        start = counts.cumsum(0) - counts  # where each prompt's runs begin in that order
        runs = order[start][:, None].repeat(1, int(counts.max()))
        slot = torch.arange(len(rows), device=rows.device) - start[inverse[order]]
        runs[inverse[order], slot] = order
        place = torch.empty_like(rows)
        place[order] = inverse[order] * runs.shape[1] + slot
        return cls(prompts, runs, place)


def leave(site: str, activation: Tensor) -> Tensor:
    """The activation as it is: the touch that changes nothing."""
    return activation


def run_block(
    block: Any,
    resid: Stream,
    at: Positions,
    far: Keys,
    groups: Groups,
    *,
    near: Callable[[Keys], Keys] | None = None,
    touch: Touch = leave,
    in_place: bool = True,
) -> Stream:
    """``hook_resid_post`` of runs, from their ``hook_resid_pre`` and the prompts' keys (``far``).

    ``near`` turns the keys of these tokens into all that the runs see of their own. ``touch`` is called
    at ``resid_pre``, ``z``, ``result`` (what all heads write together, before a post-norm makes it
    ``attn_out``), ``attn_out`` and, unless ``in_place``, ``mlp_out``. In place ``resid`` is overwritten,
    which is not for activations that are kept, or that gradients flow through.
    """
    resid = touch("resid_pre", resid)
    q, new = project(block, resid, at)
    z = touch("z", attend(block.attn, q, at, near(new) if near else new, far, groups))
    attention = touch("attn_out", post_norm(block, touch("result", attention_out(block, z))))
    del q, new, z  # the MLP needs the room
    if in_place:
        return finish_block(block, resid, attention)
    middle = resid + attention
    return middle + touch("mlp_out", mlp_out(block, resid if block.cfg.parallel_attn_mlp else middle))


def run_kept(
    model: HookedTransformer, resid: Stream, at: Positions, layers: Sequence[Keys], sites: Sequence[str]
) -> tuple[Stream, dict[str, list[Tensor]]]:
    """The final residual stream of one run per prompt, and each site's activations in every layer."""
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}

    def touch(site: str, activation: Tensor) -> Tensor:
        if site in kept:
            kept[site].append(activation)
        return activation

    groups = Groups.of(torch.arange(len(at), device=at.device))
    for block, far in zip(model.blocks, layers, strict=True):
        resid = run_block(block, resid, at, far, groups, touch=touch, in_place=False)
    return resid, kept


def embed(model: HookedTransformer, tokens: Positions, positions: Positions) -> Stream:
    """The residual stream before the first block."""
    resid = model.embed(tokens)
    if model.cfg.positional_embedding_type != "standard":
        return resid
    # Padding may lie past the context; any row of the table will do, because no one reads the result.
    return resid + model.W_pos[positions.clamp(max=model.cfg.n_ctx - 1)]


def project(block: Any, resid: Stream, at: Positions) -> tuple[PerHead, Keys]:
    """Rotated queries, divided by the attention scale, and the tokens' keys and values."""
    attn, x = block.attn, block.ln1(resid)
    q, k, v = attn.calculate_qkv_matrices(x, x, x)
    # Queries are scaled, not scores, of which there are many more: one per query and key.
    q, k = _rotate(attn, q / attn.attn_scale, at), _rotate(attn, k, at)
    # [kv_head pos d_head], as the product with the queries needs them.
    return q, Keys(k.transpose(1, 2), v.transpose(1, 2), at)


def _rotate(attn: Any, x: PerHead, at: Positions) -> PerHead:
    """TransformerLens' rotary embedding at any positions, not only whole sequences."""
    cfg = attn.cfg
    if cfg.positional_embedding_type != "rotary":
        return x
    at = at.clamp(max=cfg.n_ctx - 1)  # padding may lie past the context, where the tables end
    needed = int(at.max()) + 1
    if needed > attn.rotary_cos.shape[0]:  # TransformerLens makes 2048 rows, and more on demand
        attn._extend_rotary_embeddings(min(cfg.n_ctx, max(needed, 2 * attn.rotary_cos.shape[0])))
    cos, sin = (table[at][..., None, :] for table in (attn.rotary_cos, attn.rotary_sin))
    turned, kept = x[..., : cfg.rotary_dim], x[..., cfg.rotary_dim :]  # GPT-NeoX: a part
    turned = turned * cos + attn.rotate_every_two(turned) * sin
    return turned if kept.shape[-1] == 0 else torch.cat([turned, kept], dim=-1)


def window(attn: Any) -> int | None:
    """How many positions a query sees, itself included; None for all."""
    return attn.cfg.window_size if attn.attn_type == "local" else None


def seen(queries: Int[Tensor, "*q"], keys: Int[Tensor, "*k"], width: int | None) -> Bool[Tensor, "*qk"]:
    """Whether each query position sees each key position, broadcast against each other."""
    causal = keys <= queries
    return causal if width is None else causal & (keys > queries - width)


def attend_causally(attn: Any, q: PerHead, keys: Keys) -> PerHead:
    """``z`` of whole sequences from position 0, whose last keys are the queries' own (a prefill)."""
    n, length, n_heads, _ = q.shape
    k, v = keys.keys, keys.values
    # Padding is on the right, so a key's index is its position in every row and one mask serves all.
    # What queries see that are padding themselves does not matter.
    at = torch.arange(k.shape[2], device=q.device)
    mask = seen(at[-length:, None], at, window(attn))
    q = q.transpose(1, 2)
    if attn.cfg.attn_scores_soft_cap <= 0:
        # The scale is 1 because the queries are already divided.
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)
        return z.transpose(1, 2)
    # The fused kernel has no soft cap (Gemma-2). Heads that share a key-value head are rows of one
    # product with it, so that its keys are not repeated.
    grouped = q.reshape(n, k.shape[1], -1, q.shape[-1])
    scores = apply_softcap(grouped @ k.mT, attn.cfg.attn_scores_soft_cap).to(precise(q.dtype))
    scores = scores.view(n, n_heads, length, -1).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype).view(n, k.shape[1], -1, k.shape[2])
    return (weights @ v).view(n, n_heads, length, -1).transpose(1, 2)


def attend(attn: Any, q: PerHead, at: Positions, near: Keys, far: Keys, groups: Groups) -> PerHead:
    """``z`` of every run's queries, which see its prompt's keys (``far``) and its own (``near``)."""
    cfg, width = attn.cfg, window(attn)
    (n_runs, length, n_heads, d_head), (kv, n_near) = q.shape, near.keys.shape[1:3]
    n_prompts, slots = groups.runs.shape
    repeat = n_heads // kv  # heads that share a key-value head
    rows = repeat * length
    if n_prompts < len(far.at):  # only where a prompt has no run, because it copies
        far = far.of(groups.prompts)
    n_far = far.keys.shape[2]
    # These heads, and the positions, are rows of one product with the shared keys:
    # [run kv (repeat pos) d_head]. By prompt the slots are rows too, so that a prompt's keys are read
    # once for all its runs and never copied: [(prompt kv) (slot repeat pos) d_head].
    q = q.unflatten(2, (kv, repeat)).permute(0, 2, 3, 1, 4).reshape(n_runs, kv, rows, d_head)
    q_far = q[groups.runs].transpose(1, 2).reshape(n_prompts * kv, slots * rows, d_head)
    far_scores = (q_far @ far.keys.flatten(0, 1).mT).view(n_prompts, kv, slots, repeat, length, n_far)
    near_scores = (q.flatten(0, 1) @ near.keys.flatten(0, 1).mT).view(n_runs, kv, repeat, length, n_near)
    # The softmax is not in half precision: small differences of large scores matter.
    cap, dtype = cfg.attn_scores_soft_cap, precise(q.dtype)
    far_scores, near_scores = (apply_softcap(s, cap).to(dtype) for s in (far_scores, near_scores))
    hidden = ~seen(at[..., None], near.at[:, None], width)
    near_scores = near_scores.masked_fill(hidden[:, None, None], -torch.inf)
    # Queries lie behind their whole prompt, of which only a window or padding hides anything.
    if width is not None:
        hidden = ~seen(at[groups.runs][..., None], far.at[:, None, None], width)
        far_scores = far_scores.masked_fill(hidden[:, None, :, None], -torch.inf)
    elif bool((hidden := far.at == NOWHERE).any()):
        far_scores = far_scores.masked_fill(hidden[:, None, None, None, None], -torch.inf)
    # One softmax over both parts makes the split exact. Every query sees itself: no row is all -inf.
    scores = torch.cat([far_scores, near_scores[groups.runs].transpose(1, 2)], dim=-1)
    del far_scores, near_scores  # the largest tensors of a batch
    weights = scores.softmax(-1).to(q.dtype)
    del scores
    z_far = weights[..., :n_far].reshape(n_prompts * kv, slots * rows, n_far) @ far.values.flatten(0, 1)
    z_far = z_far.view(n_prompts, kv, slots, rows, d_head)
    # Back from the rectangle to runs, without the repeated ones.
    z_far, weights = (
        t.transpose(1, 2).flatten(0, 1)[groups.place] for t in (z_far, weights[..., n_far:])
    )
    z = weights.reshape(n_runs * kv, rows, n_near) @ near.values.flatten(0, 1)
    z = z_far + z.view(n_runs, kv, rows, d_head)
    return z.view(n_runs, n_heads, length, d_head).transpose(1, 2)


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores: at least float32, whatever the weights are."""
    return torch.promote_types(dtype, torch.float32)


def attention_out(block: Any, z: PerHead) -> Stream:
    """What the heads write together, before the post-norm of the architectures that have one."""
    # TransformerLens' [head d_head d_model], permuted and flattened like this, is a view: Hugging Face's
    # own matrix, and one product for all heads.
    weight = block.attn.W_O.permute(2, 0, 1).flatten(1)
    return F.linear(z.flatten(2), weight, block.attn.b_O)


def post_norm(block: Any, attention: Float[Tensor, "*run d_model"]) -> Float[Tensor, "*run d_model"]:
    """``hook_attn_out``, from what :func:`attention_out` gives."""
    return block.ln1_post(attention) if block.cfg.use_normalization_before_and_after else attention


def finish_block(block: Any, resid: Stream, attention: Stream) -> Stream:
    """``hook_resid_post``, from a block's input, which is overwritten, and its ``hook_attn_out``."""
    # Some rows at a time: the MLP's hidden activations, the widest there are, then never leave the
    # processor's cache, and no second residual stream is made.
    size = max(1, MLP_BYTES // (resid.shape[1] * (block.cfg.d_mlp or 1) * resid.element_size()))
    for rows, added in zip(resid.split(size), attention.split(size), strict=True):
        if block.cfg.parallel_attn_mlp:  # the MLP reads the block's input, as the attention does
            rows += added + mlp_out(block, rows)
        else:
            rows += added
            rows += mlp_out(block, rows)
    return resid


def mlp_out(block: Any, resid: Stream) -> Stream:
    """``hook_mlp_out``, from the residual stream that the MLP reads."""
    x, mlp = block.ln2(resid), block.mlp
    if torch.is_grad_enabled() or not isinstance(mlp, GatedMLP):
        return block.apply_mlp(x)
    # TransformerLens' gated MLP makes a new hidden activation at every step; here one is overwritten.
    hidden = F.linear(x, mlp.W_gate.T)
    hidden = F.silu(hidden, inplace=True) if mlp.act_fn is F.silu else mlp.act_fn(hidden)
    hidden *= F.linear(x, mlp.W_in.T)
    hidden += mlp.b_in
    out = F.linear(hidden, mlp.W_out.T, mlp.b_out)
    return block.ln2_post(out) if block.cfg.use_normalization_before_and_after else out


def unembed(model: HookedTransformer, resid: Stream) -> Float[Tensor, "run pos d_vocab"]:
    """Logits of the final residual stream."""
    logits = model.unembed(model.ln_final(resid))
    return apply_softcap(logits, model.cfg.output_logits_soft_cap)


def log_probs(
    model: HookedTransformer, resid: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Log probability of each row's target, in nats and at least float32."""
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
