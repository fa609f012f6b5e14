"""The shared cache: one pass over clean and triggered prompts, read by every analysis.

It holds TransformerLens ``ActivationCache``s, sliced to the last prompt position: ``hook_resid_pre``,
``hook_attn_out``, ``hook_mlp_out`` and, of every head, ``hook_z`` of every layer, ``hook_resid_post`` of
the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Prompt, PromptFormat, encode_prompt
from bkdlens.engines import reference
from bkdlens.engines.block import Groups, embed, keep, run_block, supported
from bkdlens.engines.hooks import refuse_foreign_hooks
from bkdlens.engines.memory import batches
from bkdlens.engines.prefix import Prefix, prefixes
from bkdlens.errors import DataError
from bkdlens.progress import track
from bkdlens.types import Which, check_choice

SITES = ("resid_pre", "attn_out", "mlp_out", "z")  # what is kept of every layer


@dataclass(frozen=True, eq=False)
class PairCache:
    """Activations at the last prompt token of a set of pairs, row by row in the pairs' order.

    Attributes:
        clean: TransformerLens' ``ActivationCache`` of the clean prompts; its tensors have a position
            axis of length one.
        triggered: of the triggered prompts.
        near: of the prompts with a near trigger; None where not every pair has one.
        pairs: the pairs.
        fmt: how the prompts were rendered.
        model: the model that was run.
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
        """The activations of one side of the pairs.

        Args:
            which: ``"clean"``, ``"triggered"`` or ``"near"``.

        Returns:
            TransformerLens' cache, every activation ``[pair 1 …]``.

        Raises:
            ChoiceError: for another side.
            DataError: for near prompts that the pairs do not have.

        Examples:
            >>> attention = cache.of("triggered")["attn_out", 0]
        """
        check_choice("set of prompts", which, Which)
        side = {"clean": self.clean, "triggered": self.triggered, "near": self.near}[which]
        if side is None:
            raise DataError("These pairs have no near-trigger prompts; name near triggers.")
        return side

    def z(self, which: Which) -> Float[Tensor, "pair layer head d_head"]:
        """``hook_z`` of every head.

        Args:
            which: the side, as in :meth:`of`.

        Returns:
            ``[pair layer head d_head]``, in activation units.

        Examples:
            >>> z = cache.z("clean")
        """
        return reference.stack_layers(self.of(which), "z", self.model.cfg.n_layers)

    def mean_z(self, which: Which, *, victims: bool = True) -> Float[Tensor, "layer head d_head"]:
        """Mean ``hook_z`` of every head: the activation that is patched in.

        Args:
            which: the side, as in :meth:`of`.
            victims: over the victims alone; False for all pairs.

        Returns:
            ``[layer head d_head]``, in activation units.

        Raises:
            DataError: if there is no victim.

        Examples:
            >>> mean = cache.mean_z("triggered")
        """
        z = self.z(which)
        return z[self.victims].mean(0) if victims else z.mean(0)

    def mean_out(
        self, site: Literal["attn_out", "mlp_out"], which: Which, *, victims: bool = True
    ) -> Float[Tensor, "layer d_model"]:
        """Mean output of the attention or of the MLP of every layer.

        Args:
            site: ``"attn_out"`` or ``"mlp_out"``.
            which: the side, as in :meth:`of`.
            victims: over the victims alone; False for all pairs.

        Returns:
            ``[layer d_model]``, in units of the residual stream.

        Raises:
            DataError: if there is no victim.

        Examples:
            >>> mean = cache.mean_out("mlp_out", "triggered")
        """
        out = reference.stack_layers(self.of(which), site, self.model.cfg.n_layers)
        return out[self.victims].mean(0) if victims else out.mean(0)

    def resid(self, which: Which) -> Float[Tensor, "pair layer d_model"]:
        """The residual stream before every layer and after the last.

        Args:
            which: the side, as in :meth:`of`.

        Returns:
            ``[pair layer d_model]``: ``hook_resid_pre`` of every layer and, as one more, the last
            ``hook_resid_post``.

        Examples:
            >>> resid = cache.resid("clean")
        """
        side, n = self.of(which), self.model.cfg.n_layers
        before = reference.stack_layers(side, "resid_pre", n)
        return torch.cat([before, side[get_act_name("resid_post", n - 1)]], dim=1)

    def result(self, which: Which) -> Float[Tensor, "pair layer head d_model"]:
        """Each head's part of the attention output, ``z @ W_O``, which is ``hook_result``.

        Args:
            which: the side, as in :meth:`of`.

        Returns:
            ``[pair layer head d_model]``, in units of the residual stream.

        Examples:
            >>> result = cache.result("triggered")
        """
        return head_results(self.model, self.z(which))

    @property
    def victims(self) -> Bool[Tensor, " pair"]:
        """Which pairs the attack changes, ``[pair]``."""
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
    """The hook points that are kept: in every layer, and the last layer's output."""
    n = model.cfg.n_layers
    names = [get_act_name(site, i) for i in range(n) for site in SITES]
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
        memory_gb: the most memory beside the model; batches are as large as it allows. 2 GB for None
            on a CPU, 80 % of what is free on a GPU.
        progress: whether to show a progress bar.

    Returns:
        Activations at the last prompt token: one row per pair, in the pairs' order.

    Raises:
        DataError: for no pairs, or a prompt longer than the context.
        HookError: if somebody's hooks are on the model.
        BkdlensError: for a memory budget that is not positive.

    Examples:
        >>> cache = bkdlens.cache_activations(model, train)
        >>> mean = cache.mean_z("triggered")
    """
    if not pairs:
        raise DataError("There are no pairs to cache; give at least one.")
    refuse_foreign_hooks(model)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    texts = pairs.clean + pairs.triggered
    has_near = all(pair.near is not None for pair in pairs)
    if has_near:
        texts += pairs.texts("near")
    prompts = [encode_prompt(model.tokenizer, text, fmt, n_ctx=model.cfg.n_ctx) for text in texts]
    # All sides in one call, so that what they have in common is run once.
    whole = last_activations(model, prompts, memory_gb=memory_gb, progress=progress)
    n = len(pairs)
    sides = [
        ActivationCache({name: value[at : at + n] for name, value in whole.items()}, model)
        for at in range(0, len(texts), n)
    ]
    return PairCache(sides[0], sides[1], sides[2] if has_near else None, pairs, fmt, model)


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
    names, what = cached_names(model), "caching activations"
    order: list[int] = []
    parts: list[Mapping[str, Tensor]] = []
    if supported(model):
        tails, bar = [1] * len(prompts), what if progress else None
        for rows, _, prefix in prefixes(model, prompts, tails, 0, memory_gb, bar=bar):
            order += rows
            parts.append(_last_token(model, prefix))
    else:
        work = batches(model, [(1, len(prompt.ids)) for prompt in prompts], 0, memory_gb)
        for rows, _ in track(list(work), what, progress):
            order += rows
            parts.append(reference.activations(model, [prompts[i] for i in rows], names))
    back = torch.tensor(order, device=model.W_E.device).argsort()  # batches are by length
    return {name: torch.cat([part[name] for part in parts])[back] for name in names}


def _last_token(model: HookedTransformer, prefix: Prefix) -> dict[str, Tensor]:
    """One pass of the last prompt token, every activation ``[prompt 1 …]``."""
    at = prefix.lengths[:, None]
    groups = Groups.of(torch.arange(len(prefix), device=at.device))  # one run per prompt
    kept, touch = keep(*SITES)
    resid = embed(model, prefix.last[:, None], at)
    for block, far in zip(model.blocks, prefix.layers, strict=True):
        resid = run_block(block, resid, at, far, groups, touch=touch, in_place=False)
    names = {get_act_name(site, i): value for site in SITES for i, value in enumerate(kept[site])}
    return names | {get_act_name("resid_post", model.cfg.n_layers - 1): resid}
