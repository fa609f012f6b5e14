"""Interventions as data, and the pure hook factories that carry them out.

An :class:`Intervention` says what happens at the last prompt token, in the prefill only (the paper's
intervention point); where that token is in a batch, the engines decide.
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
        value: shared by all prompts, or one per prompt; in units of the residual stream.
    """

    site: VectorSite
    layer: int
    value: Float[Tensor, "*prompt d_model"]


@dataclass(frozen=True, eq=False)
class Intervention:
    """What is done to the last prompt token; the empty intervention leaves the model as it is.

    Attributes:
        heads: those whose activation is set.
        z: what it is set to, in the heads' order; shared by all prompts, or one per prompt.
        vectors: what is added, each in its own layer.

    Raises:
        HookError: for heads without values, or values without heads.
    """

    heads: tuple[Head, ...] = ()
    z: Float[Tensor, "*prompt head d_head"] | None = None
    vectors: tuple[Vector, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.heads) != (self.z is not None):
            raise HookError("An intervention on heads needs both the heads and their values z.")

    @property
    def layers(self) -> set[int]:
        """The layers that are changed, from 0."""
        return {head.layer for head in self.heads} | {vector.layer for vector in self.vectors}

    @property
    def first_layer(self) -> int | None:
        """The lowest layer that is changed, from 0; None for the empty intervention."""
        return min(self.layers, default=None)


NOTHING = Intervention()


@dataclass(frozen=True, eq=False)
class Patch:
    """One component's activation at the last prompt token, replaced: a head's, or a layer's.

    Attributes:
        site: ``"z"`` or ``"result"`` of a head, ``"attn_out"`` or ``"mlp_out"`` of a layer.
        layer: from 0.
        value: the new activation, shared by all prompts, or one per prompt.
        head: from 0, for ``z`` and ``result``.

    Raises:
        ChoiceError: for another site.
        HookError: for a head at a layer's site, or none at a head's.
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
        """This patch for the prompts with these numbers; itself where all prompts share its value."""
        return self if self.value.ndim == 1 else replace(self, value=self.value[list(rows)])

    def hook(self, position: int) -> tuple[str, HookFunction]:
        """This patch of all a batch's prompts at one index, for ``model.hooks(fwd_hooks=[…])``."""
        return get_act_name(self.site, self.layer), change_at(position, self.value.to, self.head)


# What can be done to one prompt, at any of its tokens.
Change: TypeAlias = Intervention | Sequence[Patch]


def change_hooks(model: HookedTransformer, change: Change, at: int) -> Hooks:
    """The hooks that change token ``at`` of one prompt."""
    if isinstance(change, Intervention):
        return intervention_hooks(model, [change], 1, at)
    return [patch.hook(at) for patch in change]


def from_end(n: int, position: int) -> int:
    """The index of a position that is counted from the end of ``n`` tokens."""
    if not -n <= position <= -1:
        raise HookError(f"Position {position} is not in a prompt of {n} tokens; give -1 to -{n}.")
    return n + position


def check_interventions(
    model: HookedTransformer, interventions: Sequence[Intervention], n_prompts: int
) -> None:
    """Raise a ``HookError`` for a place that the model lacks, or values for other numbers of prompts."""
    for intervention in interventions:
        for head in intervention.heads:
            _check_place(model, "An intervention", head.layer, head.head)
        for vector in intervention.vectors:
            _check_place(model, "A vector", vector.layer)
    values = [i.z for i in interventions if i.z is not None and i.z.ndim == 3]
    values += [v.value for i in interventions for v in i.vectors if v.value.ndim == 2]
    for value in values:
        if value.shape[0] != n_prompts:
            raise HookError(
                f"An intervention has values for {value.shape[0]} prompts and {n_prompts} are run; "
                "give one value for all, or one per prompt."
            )


def check_patches(model: HookedTransformer, patches: Sequence[Patch], n_prompts: int) -> None:
    """Raise a ``HookError`` for a layer or head that the model lacks, or a value of another shape."""
    cfg = model.cfg
    for patch in patches:
        width = cfg.d_head if patch.site == "z" else cfg.d_model
        _check_place(model, "A patch", patch.layer, patch.head)
        if tuple(patch.value.shape) not in ((width,), (n_prompts, width)):
            raise HookError(
                f"A patch of {patch.site} has a value of shape {list(patch.value.shape)}; give "
                f"[{width}] for all prompts, or [{n_prompts}, {width}] with one per prompt."
            )


def _check_place(model: HookedTransformer, what: str, layer: int, head: int | None = None) -> None:
    cfg = model.cfg
    if not (0 <= layer < cfg.n_layers and 0 <= (head or 0) < cfg.n_heads):
        raise HookError(
            f"{what} of layer {layer}, head {head} does not fit: this model has layers "
            f"0 to {cfg.n_layers - 1} with heads 0 to {cfg.n_heads - 1}."
        )


def change_at(
    position: int, change: Callable[[Tensor], Tensor], head: int | None = None
) -> HookFunction:
    """A hook that replaces an activation at a position, of one head or whole, by ``change`` of it."""
    index = (slice(None), position) if head is None else (slice(None), position, head)

    def hook(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()  # others may hold the one that was computed
        activation[index] = change(activation[index])
        return activation

    return hook


def set_heads(
    values: Float[Tensor, "batch head width"], mask: Bool[Tensor, "batch head"], position: int
) -> HookFunction:
    """On ``hook_z`` or ``hook_result``, ``[batch pos head width]``: set masked heads at ``position``."""
    chosen = mask[..., None]
    return change_at(position, lambda old: torch.where(chosen, values.to(old.dtype), old))


def add_vector(value: Float[Tensor, "*batch d_model"], position: int) -> HookFunction:
    """On a hook of shape ``[batch pos d_model]``: ``value`` is added at ``position``."""
    return change_at(position, lambda old: old + value.to(old.dtype))


def layer_hooks(
    model: HookedTransformer,
    interventions: Sequence[Intervention],
    rows: Sequence[int],
    layer: int,
    position: int,
) -> list[tuple[str, HookFunction]]:
    """One layer's hooks for ``len(interventions) * len(rows)`` runs, intervention by intervention.

    ``rows`` are the batch's prompts, among those for which an intervention has values.
    """
    cfg, device, shape = model.cfg, model.W_E.device, (len(interventions), len(rows))
    hooks: list[tuple[str, HookFunction]] = []

    def of_rows(value: Tensor, ndim: int) -> Tensor:
        """The rows' values, or the one of ``ndim`` axes that all prompts share."""
        return value if value.ndim == ndim else value[list(rows)]

    # One hook per site for all interventions, with a mask or a zero for those that leave it alone:
    # one hook per intervention would clone the whole batch's activation every time.
    if any(head.layer == layer for i in interventions for head in i.heads):
        values = torch.zeros(*shape, cfg.n_heads, cfg.d_head, device=device, dtype=cfg.dtype)
        mask = torch.zeros(*shape, cfg.n_heads, device=device, dtype=torch.bool)
        for i, intervention in enumerate(interventions):
            chosen = [k for k, head in enumerate(intervention.heads) if head.layer == layer]
            if chosen and intervention.z is not None:
                index = [intervention.heads[k].head for k in chosen]
                values[i][:, index] = of_rows(intervention.z[..., chosen, :], 2).to(values)
                mask[i][:, index] = True
        patch = set_heads(values.flatten(0, 1), mask.flatten(0, 1), position)
        hooks.append((get_act_name("z", layer), patch))
    vectors = [(i, v) for i, each in enumerate(interventions) for v in each.vectors if v.layer == layer]
    for site in sorted({vector.site for _, vector in vectors}):
        total = torch.zeros(*shape, cfg.d_model, device=device, dtype=cfg.dtype)
        for i, vector in vectors:
            if vector.site == site:
                total[i] += of_rows(vector.value, 1).to(total)
        hooks.append((get_act_name(site, layer), add_vector(total.flatten(0, 1), position)))
    return hooks


def intervention_hooks(
    model: HookedTransformer, interventions: Sequence[Intervention], n_prompts: int, position: int
) -> list[tuple[str, HookFunction]]:
    """The hooks of :func:`layer_hooks` in every layer that is changed, ascending, for all prompts."""
    check_interventions(model, interventions, n_prompts)
    return [
        hook
        for layer in sorted({layer for i in interventions for layer in i.layers})
        for hook in layer_hooks(model, interventions, range(n_prompts), layer, position)
    ]


def in_prefill(hook_function: HookFunction) -> HookFunction:
    """The hook for the prefill alone: it acts only on more than one position, not on decoding steps."""

    def hook(activation: Tensor, hook: Any) -> Tensor | None:
        return hook_function(activation, hook) if activation.shape[1] > 1 else None

    return hook


@contextmanager
def hooked(model: HookedTransformer, hooks: Hooks) -> Iterator[HookedTransformer]:
    """The model with hooks that are removed at the end, whatever happens.

    Raises:
        HookError: for a hook that never fired, because an intervention that did nothing is a mistake,
            and for a hook point that the model does not have.
    """
    silent = {i: name for i, (name, _) in enumerate(hooks)}  # the hooks that have not acted

    def watch(index: int, function: HookFunction) -> HookFunction:
        def hook(activation: Tensor, hook: Any) -> Tensor | None:
            out = function(activation, hook=hook)
            if out is not None:
                silent.pop(index, None)
            return out

        return hook

    for name, _ in hooks:
        if name not in model.hook_dict:
            raise HookError(f"The model has no hook point {name!r}.")
    uses_result = model.cfg.use_attn_result
    if any(name.endswith("hook_result") for name, _ in hooks):
        model.set_use_attn_result(True)  # else TransformerLens skips the hook point, to save memory
    try:
        with model.hooks(fwd_hooks=[(n, watch(i, f)) for i, (n, f) in enumerate(hooks)]):
            yield model
    finally:
        model.set_use_attn_result(uses_result)
    if silent:
        raise HookError(
            f"The intervention at {', '.join(silent.values())} never acted; run the model on a prompt "
            "of at least two tokens inside the context."
        )


def refuse_foreign_hooks(model: HookedTransformer) -> None:
    """Raise a ``HookError`` if the model carries hooks, which an engine would misplace."""
    names = [name for name, point in model.hook_dict.items() if point.fwd_hooks]
    if names:
        raise HookError(
            f"The model already carries hooks ({', '.join(names[:3])}); leave the context that added "
            "them, or call model.reset_hooks() first."
        )
