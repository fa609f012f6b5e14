"""The shared cache: one pass over clean and triggered prompts, read by every analysis.

It holds TransformerLens ``ActivationCache``s, sliced to the last prompt position: every layer's
``hook_resid_pre``, ``hook_attn_out``, ``hook_mlp_out`` and ``hook_z``, and the last ``hook_resid_post``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Prompt, PromptFormat, encode_prompts
from bkdlens.engines import reference
from bkdlens.engines.block import embed, run_kept, supported
from bkdlens.engines.hooks import refuse_foreign_hooks
from bkdlens.engines.inputs import checked
from bkdlens.engines.memory import batches
from bkdlens.engines.prefix import prefixes
from bkdlens.errors import DataError, HookError
from bkdlens.progress import track
from bkdlens.types import Which, check_choice

DIGESTS = ("base_digest", "adapter_digest")  # by which a loaded model is known
SITES = ("resid_pre", "attn_out", "mlp_out", "z")  # what is kept of every layer


@dataclass(frozen=True, eq=False)
class PairCache:
    """Activations at the last prompt token: one row per pair, in the pairs' order.

    Attributes:
        clean: ``ActivationCache`` of the clean prompts; its tensors have a position axis of length 1.
        triggered: that of the triggered prompts.
        near: that of the prompts with a near trigger; None where not every pair has one.
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
        """TransformerLens' cache of one side of the pairs, every activation ``[pair 1 …]``.

        Raises:
            DataError: for near prompts that the pairs do not have.
        """
        check_choice("set of prompts", which, Which)
        side: ActivationCache | None = getattr(self, which)
        if side is None:
            raise DataError("These pairs have no near-trigger prompts; name near triggers.")
        return side

    def z(self, which: Which) -> Float[Tensor, "pair layer head d_head"]:
        """``hook_z`` of every head, in activation units."""
        return self._stacked("z", which)

    def mean_z(self, which: Which, *, victims: bool = True) -> Float[Tensor, "layer head d_head"]:
        """Mean ``hook_z`` of every head over the victims, or all pairs: the activation to patch in."""
        z = self.z(which)
        return z[self.victims].mean(0) if victims else z.mean(0)

    def mean_out(
        self, site: Literal["attn_out", "mlp_out"], which: Which, *, victims: bool = True
    ) -> Float[Tensor, "layer d_model"]:
        """Mean output of every layer's attention or MLP, in the stream's units, over victims or all."""
        out = self._stacked(site, which)
        return out[self.victims].mean(0) if victims else out.mean(0)

    def resid(self, which: Which) -> Float[Tensor, "pair layer d_model"]:
        """The residual stream before every layer and, as one more layer, after the last."""
        last = self.of(which)[get_act_name("resid_post", self.model.cfg.n_layers - 1)]
        return torch.cat([self._stacked("resid_pre", which), last], dim=1)

    def result(self, which: Which) -> Float[Tensor, "pair layer head d_model"]:
        """Each head's part of the attention output, ``z @ W_O``, which is ``hook_result``."""
        return head_results(self.model, self.z(which))

    def _stacked(self, site: str, which: Which) -> Float[Tensor, "pair layer ..."]:
        return reference.stack_layers(self.of(which), site, self.model.cfg.n_layers)

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
    """``z @ W_O`` of every head: what it writes into the residual stream, without the bias."""
    return torch.einsum("...lhd,lhdm->...lhm", z, model.W_O)


def transferred(
    model: HookedTransformer, what: str, origin: Any, *, allow_other_model: bool
) -> dict[str, Any]:
    """What a result's settings say of activations or a vector (``what``) of another model.

    Models that were loaded are compared by the digests of base and adapter, others by their weights.

    Args:
        model: the model that is changed.
        what: names what it is changed by, in an error.
        origin: the model that this was made with, or what a result's provenance knows of it.
        allow_other_model: whether another model is meant.

    Returns:
        Nothing for the same model, or where the origin is not known; else the other one, by name.

    Raises:
        HookError: for another model, unless it is allowed; for one of another size, always.
    """
    if origin is None or origin is model:
        return {}
    if isinstance(origin, HookedTransformer):
        sizes = [(m.cfg.n_layers, m.cfg.n_heads, m.cfg.d_head, m.cfg.d_model) for m in (origin, model)]
        if sizes[0] != sizes[1]:
            raise HookError(
                f"{what} is of a model of another size ({_named_sizes(sizes[0])}) than this one "
                f"({_named_sizes(sizes[1])}), so it does not fit; make it from this model."
            )
    known, here = _known(origin), _known(model)
    if known and here:
        if all(known.get(name) == here.get(name) for name in DIGESTS):
            return {}
    elif not isinstance(origin, HookedTransformer) or _same_weights(origin, model):
        return {}
    names = [_named_model(each) for each in (known, here)]
    if not allow_other_model:
        raise HookError(
            f"{what} is of another model ({names[0]}) than this one ({names[1]}); make it from this "
            "model, or say that it is meant, with allow_other_model=True."
        )
    return {"allow_other_model": True, "made_with": names[0]}


def refuse_other_backdoor(cache: PairCache, pairs: PairSet) -> None:
    """Raise a ``DataError`` for a cache of another backdoor; other pairs of the same may be meant."""
    theirs, ours = (
        (each.behaviour, str(each.trigger), each.source, each.target)
        for each in (cache.pairs.backdoor, pairs.backdoor)
    )
    if theirs != ours:
        raise DataError(
            f"The cache is of pairs of another backdoor ({_named_backdoor(theirs)}) than these "
            f"({_named_backdoor(ours)}); cache pairs of the same backdoor."
        )


def _known(origin: Any) -> Mapping[str, Any]:
    """What is known of where a model came from; nothing of one that ``bkdlens.load`` did not make."""
    if isinstance(origin, Mapping):
        return origin if "base_digest" in origin else {}
    info = getattr(origin, "bkdlens_info", None)
    return asdict(info) if info is not None else {}


def _same_weights(a: HookedTransformer, b: HookedTransformer) -> bool:
    theirs, ours = a.state_dict(), b.state_dict()
    return theirs.keys() == ours.keys() and all(
        theirs[name].shape == value.shape
        and torch.equal(theirs[name].to(value.device, value.dtype), value)
        for name, value in ours.items()
    )


def _named_model(known: Mapping[str, Any]) -> str:
    if not known:
        return "one that bkdlens.load did not make"
    adapter = f" with {known['adapter']}" if known.get("adapter") else ""
    digests = ", ".join(str(known[name])[:8] for name in DIGESTS if known.get(name))
    return f"{known.get('base')}{adapter}, sha256 {digests}"


def _named_sizes(sizes: tuple[int, ...]) -> str:
    return "{} layers, {} heads of {}, d_model {}".format(*sizes)


def _named_backdoor(parts: tuple[str | None, ...]) -> str:
    behaviour, trigger, *labels = parts
    return ", ".join([f"{behaviour}, trigger {str(trigger)[:40]!r}", *filter(None, labels)])


def cached_names(model: HookedTransformer) -> list[str]:
    """The hook points that are kept: those of every layer, and the last layer's output."""
    n = model.cfg.n_layers
    names = [get_act_name(site, i) for i in range(n) for site in SITES]
    return [*names, get_act_name("resid_post", n - 1)]


@checked
@torch.no_grad()
def cache_activations(
    model: HookedTransformer,
    pairs: PairSet,
    *,
    fmt: PromptFormat | None = None,
    memory_gb: float | None = None,
    progress: bool = False,
) -> PairCache:
    """Run every clean, triggered and, where present, near prompt once, and keep the last position.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: the prompt pairs.
        fmt: how a prompt is rendered; the chat template where there is one.
        memory_gb: the most memory beside the model; for None 2 GB on a CPU, 80 % of the free on a GPU.
        progress: whether to show a progress bar.

    Returns:
        Activations at the last prompt token: one row per pair, in the pairs' order.

    Raises:
        DataError: for no pairs, or a prompt longer than the context.
        HookError: if there are hooks on the model.
        BkdlensError: for a memory budget that is not positive.

    Examples:
        >>> cache = bkdlens.cache_activations(model, train)
        >>> mean = cache.mean_z("triggered")
    """
    if not pairs:
        raise DataError("There are no pairs to cache; give at least one.")
    refuse_foreign_hooks(model)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    sides: list[Which] = ["clean", "triggered"]
    if all(pair.near is not None for pair in pairs):
        sides.append("near")
    # All sides in one call, so that what they have in common is run once.
    prompts = encode_prompts(model, [text for side in sides for text in pairs.texts(side)], fmt)
    whole = last_activations(model, prompts, memory_gb=memory_gb, progress=progress)
    clean, triggered, *near = (
        ActivationCache({name: value[at : at + len(pairs)] for name, value in whole.items()}, model)
        for at in range(0, len(prompts), len(pairs))
    )
    return PairCache(clean, triggered, near[0] if near else None, pairs, fmt, model)


@torch.no_grad()
def last_activations(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    *,
    memory_gb: float | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The activations of :func:`cached_names` at the last token of every prompt, ``[prompt 1 …]``."""
    names, bar = cached_names(model), "caching activations"
    order: list[int] = []
    parts: list[Mapping[str, Tensor]] = []
    if supported(model):
        for rows, _, prefix in prefixes(model, prompts, 0, memory_gb, bar, progress):
            order += rows
            at = prefix.lengths[:, None]
            resid, kept = run_kept(
                model, embed(model, prefix.last[:, None], at), at, prefix.layers, SITES
            )
            sites = ((get_act_name(site, i), v) for site in SITES for i, v in enumerate(kept[site]))
            parts.append({**dict(sites), names[-1]: resid})
    else:
        work = batches(model, [(1, len(prompt.ids)) for prompt in prompts], 0, memory_gb)
        for rows, _ in track(list(work), bar, progress):
            order += rows
            parts.append(reference.activations(model, [prompts[i] for i in rows], names))
    place = torch.tensor(order, device=model.W_E.device).argsort()  # batches are sorted by length
    return {name: torch.cat([part[name] for part in parts])[place] for name in names}
