"""Interventions as data, and the pure hook factories that carry them out.

An :class:`Intervention` says what happens at the last prompt token, in the prefill only (the paper's
intervention point). The factories below turn activations at that one position; the engines decide
where that position is in their batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.errors import HookError
from bkdlens.types import Head, PatchSite, VectorSite, check_choice

HookFunction = Callable[..., Tensor | None]
Hooks = Sequence[tuple[str, HookFunction]]


@dataclass(frozen=True, eq=False)
class Vector:
    """A vector added to the residual stream or to the attention output of one layer.

    Attributes:
        site: ``"resid_pre"`` or ``"attn_out"``.
        layer: from 0.
        value: shared by all prompts, or one for each; in units of the residual stream.

    Examples:
        >>> push = bkdlens.Vector("resid_pre", 1, vector.direction)
        >>> outcomes = bkdlens.evaluate(model, test[:4], [bkdlens.Intervention(vectors=(push,))])
    """

    site: VectorSite
    layer: int
    value: Float[Tensor, "*prompt d_model"]


@dataclass(frozen=True, eq=False)
class Intervention:
    """What is done to the last prompt token: heads whose ``z`` is set, and vectors that are added.

    The empty intervention is the model as it is.

    Attributes:
        heads: those whose activation is set.
        z: what it is set to, in the heads' order; shared by all prompts, or one for each.
        vectors: what is added, each at its own layer.

    Raises:
        HookError: for heads without values, or values without heads.

    Examples:
        >>> silent = bkdlens.Intervention(tuple(heads.top(2)), torch.zeros(2, model.cfg.d_head))
        >>> outcomes = bkdlens.evaluate(model, test[:4], [silent])
    """

    heads: tuple[Head, ...] = ()
    z: Float[Tensor, "*prompt head d_head"] | None = None
    vectors: tuple[Vector, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.heads) != (self.z is not None):
            raise HookError("An intervention on heads needs both the heads and their values z.")

    @property
    def first_layer(self) -> int | None:
        """The lowest layer that is touched, from 0; None for the empty intervention."""
        layers = [head.layer for head in self.heads] + [v.layer for v in self.vectors]
        return min(layers, default=None)


NOTHING = Intervention()


@dataclass(frozen=True, eq=False)
class Patch:
    """One component's activation at the last prompt token, replaced: a head's, or a layer's.

    Attributes:
        site: ``"z"`` or ``"result"`` of a head, ``"attn_out"`` or ``"mlp_out"`` of a layer.
        layer: from 0.
        value: the new activation, shared by all prompts or one for each.
        head: from 0, for ``z`` and ``result``.

    Raises:
        ChoiceError: for another site.
        HookError: for a head where the site has none, or none where it has one.

    Examples:
        >>> patch = bkdlens.Patch("z", 1, cache.mean_z("triggered")[1, 0], head=0)
    """

    site: PatchSite
    layer: int
    value: Float[Tensor, "*prompt width"]
    head: int | None = None

    def __post_init__(self) -> None:
        check_choice("patch site", self.site, PatchSite)
        if (self.head is None) == (self.site in ("z", "result")):
            raise HookError(f"A patch of {self.site} takes {'a' if self.head is None else 'no'} head.")

    def of(self, rows: Sequence[int]) -> Patch:
        """This patch for some of the prompts.

        Args:
            rows: their numbers.

        Returns:
            A patch with one value for each of these prompts, or itself where all share one.

        Examples:
            >>> patch = bkdlens.Patch("mlp_out", 0, cache.clean["mlp_out", 0][:, 0]).of([2, 0])
        """
        return self if self.value.ndim == 1 else replace(self, value=self.value[list(rows)])

    def hook(self, position: int) -> tuple[str, HookFunction]:
        """This patch as a TransformerLens hook on a batch of the prompts.

        Args:
            position: the index that is patched, the same in every row.

        Returns:
            The hook point's name and the function, for ``model.hooks(fwd_hooks=[…])``.

        Examples:
            >>> name, function = bkdlens.Patch("mlp_out", 0, torch.zeros(model.cfg.d_model)).hook(-1)
        """
        index: tuple[slice | int, ...] = (slice(None), position)
        if self.head is not None:
            index = (*index, self.head)

        def hook(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()  # others may hold the one that was computed
            activation[index] = self.value.to(activation)
            return activation

        return get_act_name(self.site, self.layer), hook


# What can be done to one prompt at any of its tokens.
Change: TypeAlias = Intervention | Sequence[Patch]


def change_hooks(model: HookedTransformer, change: Change, at: int) -> Hooks:
    """The hooks of a change of one prompt's token ``at``."""
    if isinstance(change, Intervention):
        return intervention_hooks(model, [change], 1, at)
    return [patch.hook(at) for patch in change]


def from_end(n: int, position: int) -> int:
    """The index of a position that is counted from the end of ``n`` tokens.

    Raises:
        HookError: if it is outside.
    """
    if not -n <= position <= -1:
        raise HookError(f"Position {position} is not in a prompt of {n} tokens; give -1 to -{n}.")
    return n + position


def check_values(interventions: Sequence[Intervention], n_prompts: int) -> None:
    """Raise a ``HookError`` unless values with a prompt axis have one entry for each prompt."""
    values = [i.z for i in interventions if i.z is not None and i.z.ndim == 3]
    values += [v.value for i in interventions for v in i.vectors if v.value.ndim == 2]
    for value in values:
        if value.shape[0] != n_prompts:
            raise HookError(
                f"An intervention has values for {value.shape[0]} prompts and {n_prompts} are run; "
                "give one value for all, or one for each."
            )


def check_patches(model: HookedTransformer, patches: Sequence[Patch], n_prompts: int) -> None:
    """Raise a ``HookError`` for a layer or head that the model lacks, or a value of another shape."""
    cfg = model.cfg
    for patch in patches:
        width = cfg.d_head if patch.site == "z" else cfg.d_model
        head = 0 if patch.head is None else patch.head
        if not (0 <= patch.layer < cfg.n_layers and 0 <= head < cfg.n_heads):
            raise HookError(
                f"A patch of layer {patch.layer}, head {patch.head} does not fit: this model has layers "
                f"0 to {cfg.n_layers - 1} with heads 0 to {cfg.n_heads - 1}."
            )
        if tuple(patch.value.shape) not in ((width,), (n_prompts, width)):
            raise HookError(
                f"A patch of {patch.site} has a value of shape {list(patch.value.shape)}; give "
                f"[{width}] for all prompts, or [{n_prompts}, {width}] with one for each."
            )


def set_heads(
    values: Float[Tensor, "batch head width"], mask: Bool[Tensor, "batch head"], position: int
) -> HookFunction:
    """On ``hook_z`` or ``hook_result``, ``[batch pos head width]``: set masked heads at ``position``."""

    def hook(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        old = activation[:, position]
        activation[:, position] = torch.where(mask[..., None], values.to(old.dtype), old)
        return activation

    return hook


def add_vector(
    value: Float[Tensor, "batch d_model"] | Float[Tensor, " d_model"], position: int
) -> HookFunction:
    """On a hook of shape ``[batch pos d_model]``: ``value`` is added at ``position``."""

    def hook(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, position] += value.to(activation.dtype)
        return activation

    return hook


def layer_hooks(
    model: HookedTransformer,
    interventions: Sequence[Intervention],
    n_prompts: int,
    layer: int,
    position: int,
    *,
    rows: Sequence[int] | None = None,
) -> list[tuple[str, HookFunction]]:
    """One layer's hooks for ``len(interventions) * n_prompts`` runs, intervention by intervention.

    A value with a prompt axis has one entry for each prompt of the set it was made for; ``rows``
    says which of these the batch's prompts are (all of them for None).
    """
    cfg, device = model.cfg, model.W_E.device
    hooks: list[tuple[str, HookFunction]] = []
    n = len(interventions)
    if rows is None:
        check_values(interventions, n_prompts)

    def spread(value: Tensor, width: int) -> Tensor:
        """A value of ``width`` axes, with a prompt axis or without, for each prompt of the batch."""
        value = value.to(device)
        if value.ndim == width + 1 and rows is not None:
            value = value[list(rows)]
        return value.expand(n_prompts, *value.shape[-width:])

    # One hook per site for all interventions, with a mask or a zero for those that leave it alone: a
    # hook for each would clone the whole batch's activation every time.
    if any(head.layer == layer for i in interventions for head in i.heads):
        values = torch.zeros(n, n_prompts, cfg.n_heads, cfg.d_head, device=device, dtype=cfg.dtype)
        mask = torch.zeros(n, 1, cfg.n_heads, device=device, dtype=torch.bool)
        for i, intervention in enumerate(interventions):
            chosen = [k for k, head in enumerate(intervention.heads) if head.layer == layer]
            if chosen and intervention.z is not None:
                index = [intervention.heads[k].head for k in chosen]
                values[i][:, index] = spread(intervention.z[..., chosen, :], 2).to(values.dtype)
                mask[i][:, index] = True
        mask = mask.expand(-1, n_prompts, -1)
        patch = set_heads(values.flatten(0, 1), mask.flatten(0, 1), position)
        hooks.append((get_act_name("z", layer), patch))
    for site in sorted({v.site for i in interventions for v in i.vectors if v.layer == layer}):
        total = torch.zeros(n, n_prompts, cfg.d_model, device=device, dtype=cfg.dtype)
        for i, intervention in enumerate(interventions):
            for vector in intervention.vectors:
                if (vector.site, vector.layer) == (site, layer):
                    total[i] += spread(vector.value, 1).to(total.dtype)
        hooks.append((get_act_name(site, layer), add_vector(total.flatten(0, 1), position)))
    return hooks


def intervention_hooks(
    model: HookedTransformer,
    interventions: Sequence[Intervention],
    n_prompts: int,
    position: int,
    *,
    rows: Sequence[int] | None = None,
) -> list[tuple[str, HookFunction]]:
    """The hooks of :func:`layer_hooks` in every layer that is touched, ascending."""
    touched = {head.layer for i in interventions for head in i.heads}
    touched |= {vector.layer for i in interventions for vector in i.vectors}
    return [
        hook
        for layer in sorted(touched)
        for hook in layer_hooks(model, interventions, n_prompts, layer, position, rows=rows)
    ]


def in_prefill(hook_function: HookFunction) -> HookFunction:
    """The hook, kept away from decoding steps: it acts only where there is more than one position."""

    def hook(activation: Tensor, hook: Any) -> Tensor | None:
        return hook_function(activation, hook) if activation.shape[1] > 1 else None

    return hook


@contextmanager
def hooked(model: HookedTransformer, hooks: Hooks) -> Iterator[HookedTransformer]:
    """The model with hooks that are removed at the end, whatever happens.

    Raises:
        HookError: at the end, if a hook never fired (an intervention that did nothing is a mistake),
            or at the start, for a hook point that the model does not have.
    """
    fired = [False] * len(hooks)

    def watch(index: int, function: HookFunction) -> HookFunction:
        def hook(activation: Tensor, hook: Any) -> Tensor | None:
            out = function(activation, hook=hook)
            fired[index] = fired[index] or out is not None
            return out

        return hook

    for name, _ in hooks:
        if name not in model.hook_dict:
            raise HookError(f"The model has no hook point {name!r}.")
    uses_result = model.cfg.use_attn_result
    if any(name.endswith("hook_result") for name, _ in hooks):
        model.set_use_attn_result(True)  # the hook point is silent otherwise: it costs memory
    try:
        with model.hooks(fwd_hooks=[(n, watch(i, f)) for i, (n, f) in enumerate(hooks)]):
            yield model
    finally:
        model.set_use_attn_result(uses_result)
    if not all(fired):
        missing = ", ".join(name for (name, _), done in zip(hooks, fired, strict=True) if not done)
        raise HookError(
            f"The intervention at {missing} never acted; run the model on a prompt of at least two "
            "tokens inside the context."
        )


def refuse_foreign_hooks(model: HookedTransformer) -> None:
    """Raise a ``HookError`` if somebody's hooks are on the model: an engine would misplace them."""
    names = [name for name, point in model.hook_dict.items() if point.fwd_hooks]
    if names:
        raise HookError(
            f"The model already carries hooks ({', '.join(names[:3])}); leave the context that added "
            "them, or call model.reset_hooks() first."
        )
