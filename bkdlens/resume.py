"""The common floor of both engines: run a prompt's prefix once, then only what an intervention changes.

The intervention point is the last prompt token. Nothing before it changes, so the keys and values of
the positions before it are computed once (:class:`Prefix`). Nothing below the first layer that is
touched changes either, so a run resumes from the residual stream of an untouched run at that layer
(:class:`Tail`) and covers the last prompt token and the answer's tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.utilities.activation_functions import apply_softcap
from transformer_lens.utils import get_act_name

from bkdlens.hooks import Hooks, hooked
from bkdlens.prompts import Prompt, batches_by_length, pad_id, pad_left, pad_right
from bkdlens.tail import Past, Prefix, forward_tail, supported

PREFIX_TOKENS = 8192  # of one prefix batch, padding included


@dataclass(frozen=True, eq=False)
class Tail:
    """The untouched run of a prefix' last tokens with one forced answer each.

    ``resid[layer]`` is the residual stream before the layer at the last prompt token (position 0)
    and at all but the last of the answer's tokens; ``targets`` are the tokens that should follow.
    """

    prefix: Prefix
    inputs: Int[Tensor, "prompt pos"]
    targets: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]  # where there is a target
    resid: tuple[Float[Tensor, "prompt pos d_model"], ...]
    logits: Float[Tensor, "prompt pos d_vocab"]


def _empty_cache(model: HookedTransformer, batch: int) -> TransformerLensKeyValueCache:
    return TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, batch)


@torch.inference_mode()
def run_prefixes(model: HookedTransformer, prompts: Sequence[Prompt]) -> list[Prefix]:
    """The prefixes of all prompts, one forward pass a batch of prompts of similar length."""
    batches = batches_by_length([len(prompt.ids) for prompt in prompts], PREFIX_TOKENS)
    out = []
    for batch in batches:
        ids, mask = pad_left([prompts[i].ids for i in batch], pad_id(model.tokenizer))
        ids, mask = ids.to(model.W_E.device), mask.to(model.W_E.device)
        cache = _empty_cache(model, len(batch))
        model(ids[:, :-1], attention_mask=mask[:, :-1].int(), past_kv_cache=cache,
              stop_at_layer=model.cfg.n_layers)  # fmt: skip
        out.append(
            Prefix(
                tuple(batch),
                tuple(entry.past_keys for entry in cache.entries),
                tuple(entry.past_values for entry in cache.entries),
                mask[:, :-1],
                ids[:, -1],
            )
        )
    return out


def prefix_cache(
    model: HookedTransformer,
    prefix: Prefix,
    rows: Int[Tensor, " run"],
    *,
    first_layer: int = 0,
    frozen: bool = False,
) -> TransformerLensKeyValueCache:
    """The prefix of each run as TransformerLens' cache; layers below ``first_layer`` stay empty."""
    cache = _empty_cache(model, len(rows))
    for layer in range(first_layer, model.cfg.n_layers):
        cache.entries[layer] = TransformerLensKeyValueCacheEntry(
            prefix.keys[layer][rows], prefix.values[layer][rows], frozen=frozen
        )
    cache.previous_attention_mask = prefix.mask[rows].int()
    cache.frozen = frozen
    return cache


def unembed(
    model: HookedTransformer, resid: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of the final residual stream."""
    logits = model.unembed(model.ln_final(resid))
    return apply_softcap(logits, model.cfg.output_logits_soft_cap)


@torch.inference_mode()
def run_tail(model: HookedTransformer, prefix: Prefix, answers: Sequence[Sequence[int]]) -> Tail:
    """Run the last prompt token and the forced answers once, untouched, keeping each layer's input."""
    device = model.W_E.device
    targets, mask = pad_right(answers, pad_id(model.tokenizer))
    targets, mask = targets.to(device), mask.to(device)
    inputs = torch.cat([prefix.last[:, None], targets[:, :-1]], dim=1)
    resid: list[Tensor] = []

    def keep(activation: Tensor, hook: object) -> Tensor:
        resid.append(activation)
        return activation

    start = _embed(model, prefix, rows := torch.arange(len(prefix), device=device), inputs, 0)
    names = [(get_act_name("resid_pre", i), keep) for i in range(model.cfg.n_layers)]
    final = _forward(model, prefix, rows, start, 0, names, through_hooks=False)
    return Tail(prefix, inputs, targets, mask, tuple(resid), unembed(model, final))


@torch.inference_mode()
def resume(
    model: HookedTransformer,
    tail: Tail,
    rows: Int[Tensor, " run"],
    layer: int,
    hooks: Hooks,
    *,
    width: int | None = None,
    through_hooks: bool = False,
) -> Float[Tensor, "run pos d_vocab"]:
    """Logits of runs that share the tail's untouched residual stream up to ``layer``.

    Args:
        rows: which of the tail's prompts each run is.
        layer: the first layer that the hooks touch.
        hooks: act at position 0, the last prompt token.
        width: only the first so many positions (all for None).
        through_hooks: run TransformerLens' own forward with registered hooks: slow, the oracle of
            the shared-prefix pass, and the way for hook points that it does not offer.
    """
    start = tail.resid[layer][rows, :width]
    return unembed(
        model, _forward(model, tail.prefix, rows, start, layer, hooks, through_hooks=through_hooks)
    )


def _forward(
    model: HookedTransformer,
    prefix: Prefix,
    rows: Int[Tensor, " run"],
    start: Float[Tensor, "run pos d_model"],
    layer: int,
    hooks: Hooks,
    *,
    through_hooks: bool,
) -> Float[Tensor, "run pos d_model"]:
    names = [name for name, _ in hooks]
    if not through_hooks and supported(model, names) and len(set(names)) == len(names):
        return forward_tail(model, prefix, rows, start, layer, dict(hooks))
    ones = torch.ones(start.shape[:2], dtype=torch.int, device=start.device)
    with hooked(model, hooks):
        return model(
            start,
            start_at_layer=layer,
            stop_at_layer=model.cfg.n_layers,
            attention_mask=torch.cat([prefix.mask[rows].int(), ones], dim=1),
            past_kv_cache=prefix_cache(model, prefix, rows, first_layer=layer, frozen=True),
        )


def _embed(
    model: HookedTransformer,
    prefix: Prefix,
    rows: Int[Tensor, " run"],
    tokens: Int[Tensor, "run pos"],
    done: int,
) -> Float[Tensor, "run pos d_model"]:
    """The tokens' embedding, ``done`` tail tokens after the prefix."""
    start = model.embed(tokens)
    if model.cfg.positional_embedding_type == "standard":
        at = prefix.mask.sum(1)[rows, None] + done + torch.arange(tokens.shape[1], device=tokens.device)
        start = start + model.W_pos[at]
    return start


@torch.inference_mode()
def decode_runs(
    model: HookedTransformer,
    prefix: Prefix,
    rows: Int[Tensor, " run"],
    hooks: Hooks,
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy new tokens of each run, the hooks acting on the last prompt token only.

    Rows end before their end-of-sequence token, or where the context is full, and then leave the batch.
    """
    out: list[list[int]] = [[] for _ in rows]
    alive = torch.arange(len(rows), device=rows.device)
    token = prefix.last[rows]
    past: Past = {}
    shared = supported(model, [name for name, _ in hooks])
    cache = None if shared else prefix_cache(model, prefix, rows)
    for step in range(max_new_tokens):
        now = list(hooks) if step == 0 else []
        if cache is None:
            start = _embed(model, prefix, rows[alive], token[:, None], step)
            final = forward_tail(model, prefix, rows[alive], start, 0, dict(now), past)
        else:
            ones = torch.ones_like(token)[:, None].int()
            with hooked(model, now):
                final = model(token[:, None], attention_mask=ones, past_kv_cache=cache,
                              stop_at_layer=model.cfg.n_layers)  # fmt: skip
        token = unembed(model, final)[:, -1].argmax(-1)
        going = token != model.tokenizer.eos_token_id
        for run, new in zip(alive[going].tolist(), token[going].tolist(), strict=True):
            out[run].append(new)
        going &= prefix.mask.sum(1)[rows[alive]] + step + 2 < model.cfg.n_ctx
        if not bool(going.any()):
            break
        alive, token = alive[going], token[going]
        if cache is None:
            past = {layer: (k[going], v[going]) for layer, (k, v) in past.items()}
        else:
            for entry in cache.entries:
                entry.past_keys, entry.past_values = entry.past_keys[going], entry.past_values[going]
            cache.previous_attention_mask = cache.previous_attention_mask[going]
    return out


def runs_per_batch(
    model: HookedTransformer, prefix_length: int, tail_length: int, budget_bytes: float = 1e9
) -> int:
    """How many runs fit into ``budget_bytes``, by what one run holds at its widest."""
    cfg = model.cfg
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    length = prefix_length + tail_length
    attention = 6 * length * cfg.n_heads * cfg.d_head + 3 * cfg.n_heads * tail_length * length
    per_layer = 2 * prefix_length * kv_heads * cfg.d_head * cfg.n_layers
    width = tail_length * (4 * (cfg.d_mlp or 0) + 8 * cfg.d_model + 3 * cfg.d_vocab)
    return max(1, int(budget_bytes / (model.W_E.element_size() * (attention + per_layer + width))))
