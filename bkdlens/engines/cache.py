"""The shared cache: one pass over clean and triggered prompts, read by every analysis.

It holds TransformerLens ``ActivationCache``s, sliced to the last prompt position: ``hook_resid_pre``,
``hook_attn_out``, ``hook_mlp_out`` and, of every head, ``hook_z`` of every layer, ``hook_resid_post`` of
the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Prompt, PromptFormat, encode_prompt, pad_id, pad_left
from bkdlens.engines.block import (
    Groups,
    attend,
    attention_out,
    embed,
    mlp_out,
    post_norm,
    project,
    supported,
)
from bkdlens.engines.hooks import refuse_foreign_hooks
from bkdlens.engines.memory import batches
from bkdlens.engines.prefix import Prefix, run_common, run_prefix
from bkdlens.errors import DataError
from bkdlens.progress import track
from bkdlens.types import Which, check_choice


@dataclass(frozen=True, eq=False)
class PairCache:
    """Activations at the last prompt token of a set of pairs, row by row in the pairs' order.

    ``clean``, ``triggered`` and, where the pairs have them, ``near`` are TransformerLens
    ``ActivationCache``s whose tensors have a position axis of length one.
    """

    clean: ActivationCache
    triggered: ActivationCache
    near: ActivationCache | None
    pairs: PairSet
    fmt: PromptFormat
    model: HookedTransformer

    def __repr__(self) -> str:
        return f"PairCache({len(self.pairs)} pairs, {len(self.clean)} activations each)"

    def of(self, which: Which) -> ActivationCache:
        """The cache of the clean, the triggered or the near prompts.

        Raises:
            DataError: for near prompts that the pairs do not have.
        """
        check_choice("set of prompts", which, Which)
        cache = {"clean": self.clean, "triggered": self.triggered, "near": self.near}[which]
        if cache is None:
            raise DataError("These pairs have no near-trigger prompts; name near triggers.")
        return cache

    def z(self, which: Which) -> Float[Tensor, "pair layer head d_head"]:
        """``hook_z`` of every head."""
        cache = self.of(which)
        layers = range(self.model.cfg.n_layers)
        return torch.stack([cache[get_act_name("z", i)][:, 0] for i in layers], dim=1)

    def mean_z(self, which: Which, *, victims: bool = True) -> Float[Tensor, "layer head d_head"]:
        """Mean ``hook_z`` over the victims (or over all pairs): the activation that is patched in."""
        z = self.z(which)
        return z[self.victims].mean(0) if victims else z.mean(0)

    def mean_out(
        self, site: Literal["attn_out", "mlp_out"], which: Which, *, victims: bool = True
    ) -> Float[Tensor, "layer d_model"]:
        """Mean output of the attention or of the MLP of every layer."""
        cache, layers = self.of(which), range(self.model.cfg.n_layers)
        out = torch.stack([cache[get_act_name(site, i)][:, 0] for i in layers], dim=1)
        return out[self.victims].mean(0) if victims else out.mean(0)

    def resid(self, which: Which) -> Float[Tensor, "pair layer d_model"]:
        """``hook_resid_pre`` of every layer and, as one more, the last ``hook_resid_post``."""
        cache, n = self.of(which), self.model.cfg.n_layers
        names = [get_act_name("resid_pre", i) for i in range(n)]
        names.append(get_act_name("resid_post", n - 1))
        return torch.stack([cache[name][:, 0] for name in names], dim=1)

    def result(self, which: Which) -> Float[Tensor, "pair layer head d_model"]:
        """Each head's part of the attention output, ``z @ W_O``, which is ``hook_result``."""
        return head_results(self.model, self.z(which))

    @property
    def victims(self) -> Bool[Tensor, " pair"]:
        """Which pairs the attack changes."""
        victims = torch.tensor([self.pairs.backdoor.is_victim(pair) for pair in self.pairs])
        if not victims.any():
            _ = self.pairs.victims  # raises, and says what is missing
        return victims


def head_results(
    model: HookedTransformer, z: Float[Tensor, "*batch layer head d_head"]
) -> Float[Tensor, "*batch layer head d_model"]:
    """``z @ W_O`` for every head: what it writes into the residual stream (bias left out)."""
    return torch.einsum("...lhd,lhdm->...lhm", z, model.W_O)


def cached_names(model: HookedTransformer) -> list[str]:
    """The hook points that are kept."""
    n = model.cfg.n_layers
    sites = ("resid_pre", "attn_out", "mlp_out", "z")
    names = [get_act_name(site, i) for i in range(n) for site in sites]
    return [*names, get_act_name("resid_post", n - 1)]


@torch.no_grad()
def cache_activations(
    model: HookedTransformer,
    pairs: PairSet,
    *,
    fmt: PromptFormat | None = None,
    memory_gb: float | None = None,
    progress: bool = False,
) -> PairCache:
    """Run every clean, triggered and (where present) near prompt once, and keep the last position.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: the prompt pairs.
        fmt: how a prompt is rendered; the chat template where there is one.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU).
        progress: whether to show a progress bar.

    Raises:
        DataError: for no pairs, or a prompt longer than the context.
        HookError: if somebody's hooks are on the model.
    """
    if not pairs:
        raise DataError("There are no pairs to cache; give at least one.")
    refuse_foreign_hooks(model)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    texts = pairs.clean + pairs.triggered
    has_near = all(pair.near is not None for pair in pairs)
    if has_near:
        texts += [str(pair.near) for pair in pairs]
    prompts = [encode_prompt(model.tokenizer, t, fmt, n_ctx=model.cfg.n_ctx) for t in texts]
    whole = last_activations(model, prompts, memory_gb=memory_gb, progress=progress)
    n = len(pairs)
    parts = [
        ActivationCache({name: value[k * n : (k + 1) * n] for name, value in whole.items()}, model)
        for k in range(len(texts) // n)
    ]
    return PairCache(parts[0], parts[1], parts[2] if has_near else None, pairs, fmt, model)


@torch.no_grad()
def last_activations(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    *,
    memory_gb: float | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The activations of :func:`cached_names` at the last token of every prompt, by hook name.

    What all prompts begin with is run once, and of the last layer what is kept (see
    :mod:`bkdlens.engines.prefix`); other architectures run through TransformerLens' ``run_with_cache``.
    """
    sizes = [(1, len(prompt.ids)) for prompt in prompts]
    work = list(batches(model, sizes, 0, memory_gb))
    common = run_common(model, prompts) if supported(model) else None
    kept: dict[str, list[Tensor]] = {name: [] for name in cached_names(model)}
    for rows, _ in track(work, "caching activations", progress):
        some = [prompts[i] for i in rows]
        if supported(model):
            found = _last_token(model, run_prefix(model, some, common))
        else:
            found = _by_reference(model, some)
        for name, parts in kept.items():
            parts.append(found[name])
    back = torch.tensor([i for rows, _ in work for i in rows]).argsort()
    return {name: torch.cat(parts)[back.to(parts[0].device)] for name, parts in kept.items()}


def _last_token(model: HookedTransformer, prefix: Prefix) -> dict[str, Tensor]:
    """One pass of the last prompt token, every activation ``[prompt 1 …]``."""
    at, groups = prefix.lengths[:, None], Groups.of(torch.arange(len(prefix), device=prefix.last.device))
    resid = embed(model, prefix.last[:, None], at)
    found = {}
    for layer, block in enumerate(model.blocks):
        found[get_act_name("resid_pre", layer)] = resid
        q, k, v = project(block, resid, at)
        z = attend(
            block.attn, q, k.transpose(1, 2), v.transpose(1, 2), at, prefix.keys[layer],
            prefix.values[layer], prefix.at, at, groups,
        )  # fmt: skip
        attention = post_norm(block, attention_out(block, z))
        middle = resid + attention
        mlp = mlp_out(block, resid if model.cfg.parallel_attn_mlp else middle)
        for site, value in (("z", z), ("attn_out", attention), ("mlp_out", mlp)):
            found[get_act_name(site, layer)] = value
        resid = middle + mlp
    found[get_act_name("resid_post", model.cfg.n_layers - 1)] = resid
    return found


def _by_reference(model: HookedTransformer, prompts: Sequence[Prompt]) -> ActivationCache:
    """The same by TransformerLens."""
    ids, mask = pad_left([prompt.ids for prompt in prompts], pad_id(model.tokenizer))
    _, cache = model.run_with_cache(
        ids.to(model.W_E.device),
        attention_mask=mask.int().to(model.W_E.device),
        names_filter=cached_names(model),
        pos_slice=slice(-1, None),
        return_type=None,
    )
    return cache
