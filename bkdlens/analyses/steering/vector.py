"""The backdoor vector: one direction that switches the backdoor on and off.

Source: Backdoor Attribution, Section 5. The outputs of the top heads on triggered prompts, averaged
and summed, are one vector; added to the residual stream it activates the backdoor on clean prompts,
subtracted it suppresses the backdoor on triggered ones. ``kind="contrast"`` takes the difference of
the triggered and the clean means instead, which removes what the heads say anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.engines.cache import PairCache, head_results, transferred
from bkdlens.engines.hooks import add_vector, hooked, in_prefill
from bkdlens.engines.inputs import checked
from bkdlens.errors import DataError, HeadError, HookError
from bkdlens.results import Result, provenance
from bkdlens.types import Head, HeadLike, VectorKind, VectorSite, check_choice, name_heads, parse_heads


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BackdoorVector(Result):
    """A direction in the residual stream, with the heads that it was made from.

    Attributes:
        direction: what is added, times a coefficient.
        heads: those whose outputs were summed.
        site: where it is to be added, ``"resid_pre"`` or ``"attn_out"``.
        kind: ``"mean"`` or ``"contrast"``.
    """

    direction: Float[Tensor, " d_model"]
    heads: tuple[Head, ...]
    site: str
    kind: str

    @classmethod
    @checked
    def from_cache(
        cls,
        cache: PairCache,
        heads: HeadLike | Sequence[HeadLike],
        *,
        kind: VectorKind = "mean",
        site: VectorSite = "resid_pre",
    ) -> BackdoorVector:
        """The vector of ``heads`` over the cache's victims; nothing is run.

        Args:
            cache: clean and triggered activations.
            heads: usually ``attribution.top(k)``.
            kind: ``"mean"`` (the paper's) or ``"contrast"`` (triggered minus clean).
            site: where it will be added: the hidden state (the paper's text) or the attention
                output (its code).
        """
        check_choice("vector kind", kind, VectorKind)
        check_choice("vector site", site, VectorSite)
        cfg = cache.model.cfg
        chosen = parse_heads(heads, cfg.n_layers, cfg.n_heads)
        z = cache.mean_z("triggered")
        if kind == "contrast":
            z = z - cache.mean_z("clean")
        layers, index = (list(axis) for axis in zip(*chosen, strict=True))
        direction = head_results(cache.model, z)[layers, index].sum(0).float().cpu()
        made_from = provenance(cache.model, cache.pairs, cache.fmt, 0)
        return cls(provenance=made_from, direction=direction, heads=chosen, site=site, kind=kind)

    @property
    def norm(self) -> float:
        """Euclidean length."""
        return float(self.direction.norm())

    def to_frame(self) -> pd.DataFrame:
        """One row per component of the residual stream."""
        return pd.DataFrame({"component": range(len(self.direction)), "value": self.direction})

    def __repr__(self) -> str:
        named = name_heads(self.heads)
        return f"BackdoorVector({self.kind} of {named}; norm {self.norm:.2f}, for {self.site})"


@checked
@contextmanager
def steer(
    model: HookedTransformer,
    vector: BackdoorVector | Float[Tensor, " d_model"],
    layer: int,
    coefficient: float = 1.0,
    *,
    site: VectorSite | None = None,
    allow_other_model: bool = False,
) -> Iterator[HookedTransformer]:
    """The model with the vector added at the last prompt token, in the prefill only.

    Args:
        model: from :func:`bkdlens.load`.
        vector: a :class:`BackdoorVector` or a plain tensor.
        layer: whose ``hook_resid_pre`` (or ``hook_attn_out``) it is added to.
        coefficient: + activates, − suppresses.
        site: the vector's own for None.
        allow_other_model: whether a vector of another model is meant, and not a mistake.

    Yields:
        The model, as it is outside the context but for the hook.

    Raises:
        HeadError: for a layer that the model lacks.
        HookError: if the model was not run on a prompt inside the context, or for a vector of another
            model.

    Examples:
        >>> with bkdlens.steer(model, vector, layer=2, coefficient=-1):
        ...     answer = bkdlens.generate(model, test[0].triggered)
    """
    check_layers(model, [layer])
    check_vector(model, vector, allow_other_model=allow_other_model)
    if isinstance(vector, BackdoorVector):
        where, direction = site or vector.site, vector.direction
    else:
        where, direction = site or "resid_pre", vector
    check_choice("vector site", where, VectorSite)
    value = coefficient * direction.to(model.W_E.device, model.cfg.dtype)
    with hooked(model, [(get_act_name(where, layer), in_prefill(add_vector(value, -1)))]):
        yield model


def check_vector(
    model: HookedTransformer,
    vector: BackdoorVector | Float[Tensor, " d_model"],
    *,
    allow_other_model: bool,
    cache: PairCache | None = None,
) -> dict[str, Any]:
    """Settings that tell of another model's vector; ``cache`` is what its controls are made from.

    Raises:
        HookError: for a vector or a cache of another model that is not allowed, or of another width.
        DataError: for a cache of other pairs than the vector's, whose controls would not be its own.
    """
    direction = vector.direction if isinstance(vector, BackdoorVector) else vector
    if direction.shape != (model.cfg.d_model,):
        raise HookError(
            f"The vector has the shape {list(direction.shape)} and the model's stream is "
            f"{model.cfg.d_model} wide; make the vector from this model."
        )
    if not isinstance(vector, BackdoorVector):
        return {}
    allowed = {"allow_other_model": allow_other_model}
    if cache is None:
        return transferred(model, "The vector", vector.provenance.model, **allowed)
    made_from = vector.provenance.data_digest
    if made_from and made_from != cache.pairs.digest:
        raise DataError(
            f"The cache is of other pairs ({cache.pairs.source}) than the vector "
            f"({vector.provenance.data}), so vectors of random heads would be no control for it; give "
            "the cache that the vector was made from, or leave the cache out."
        )
    return {
        **transferred(model, "The cache", cache.model, **allowed),
        **transferred(model, "The vector", vector.provenance.model, **allowed),
    }


def check_layers(model: HookedTransformer, layers: Sequence[int]) -> None:
    """Raise a ``HeadError`` for a layer that the model lacks."""
    for layer in layers:
        if not 0 <= layer < model.cfg.n_layers:
            raise HeadError(
                f"Layer {layer} does not exist: this model has layers 0 to {model.cfg.n_layers - 1}."
            )
