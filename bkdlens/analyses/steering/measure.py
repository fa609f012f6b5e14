"""The backdoor vector: one direction that switches the backdoor on and off.

Source: Backdoor Attribution, Section 5. The outputs of the top heads on triggered prompts, averaged
and summed, are one vector; added to the residual stream it activates the backdoor on clean prompts,
subtracted it suppresses the backdoor on triggered ones. ``kind="contrast"`` takes the difference of
the triggered and the clean means instead, which removes what the heads say anyway.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.cache import PairCache, head_results
from bkdlens.engines.generate import MAX_NEW_TOKENS, evaluate
from bkdlens.engines.hooks import Intervention, Vector, add_vector, hooked, in_prefill
from bkdlens.errors import HeadError
from bkdlens.metrics import Rate
from bkdlens.results import Result, provenance
from bkdlens.types import (
    Head,
    HeadLike,
    VectorKind,
    VectorSite,
    Which,
    check_choice,
    every_head,
    name_heads,
    parse_heads,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class BackdoorVector(Result):
    """A direction in the residual stream, with the heads that it was made from."""

    direction: Float[Tensor, " d_model"]
    heads: tuple[Head, ...]
    site: str
    kind: str

    @classmethod
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
        return cls(made_from, direction, chosen, site, kind)

    @property
    def norm(self) -> float:
        """Euclidean length."""
        return float(self.direction.norm())

    def to_frame(self) -> pd.DataFrame:
        """One row a component."""
        import pandas as pd

        return pd.DataFrame({"component": range(len(self.direction)), "value": self.direction})

    def __repr__(self) -> str:
        named = name_heads(self.heads)
        return f"BackdoorVector({self.kind} of {named}; norm {self.norm:.2f}, for {self.site})"


@contextmanager
def steer(
    model: HookedTransformer,
    vector: BackdoorVector | Float[Tensor, " d_model"],
    layer: int,
    coefficient: float = 1.0,
    *,
    site: VectorSite | None = None,
) -> Iterator[HookedTransformer]:
    """The model with the vector added at the last prompt token, in the prefill only.

    ``with bkdlens.steer(model, vector, layer=2, coefficient=-1): bkdlens.generate(model, prompt)``

    Args:
        model: from :func:`bkdlens.load`.
        vector: a :class:`BackdoorVector` or a plain tensor.
        layer: whose ``hook_resid_pre`` (or ``hook_attn_out``) it is added to.
        coefficient: + activates, − suppresses.
        site: the vector's own for None.

    Raises:
        HeadError: for a layer that the model lacks.
        HookError: if the model was not run on a prompt inside the context.
    """
    _check_layers(model, [layer])
    if isinstance(vector, BackdoorVector):
        where, direction = site or vector.site, vector.direction
    else:
        where, direction = site or "resid_pre", vector
    check_choice("vector site", where, VectorSite)
    value = coefficient * direction.to(model.W_E.device, model.cfg.dtype)
    with hooked(model, [(get_act_name(where, layer), in_prefill(add_vector(value, -1)))]):
        yield model


@dataclass(frozen=True, eq=False, repr=False)
class SteeringResult(Result):
    """Successes by coefficient and layer; the two controls have one more axis, their draws.

    With a positive coefficient the vector is added to *clean* victims: ``attack`` counts backdoor
    answers (activation) and ``correct`` right ones that stayed. With a negative one it is subtracted
    from *triggered* victims: ``attack`` counts backdoor answers that stayed and ``correct`` restored
    right ones. ``clean`` counts right answers to clean prompts under the same vector.
    ``base_attack`` and ``base_correct`` are the same of (clean, triggered) victims without any vector.
    """

    heads: tuple[Head, ...]
    site: str
    kind: str
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    n_victims: int
    n_clean: int
    base_attack: tuple[int, int]
    base_correct: tuple[int, int]
    base_clean: int
    attack: Int[Tensor, "coefficient layer"]
    correct: Int[Tensor, "coefficient layer"]
    clean: Int[Tensor, "coefficient layer"]
    random_heads: Int[Tensor, "coefficient layer draw"]  # attack, vectors of random heads
    random_vectors: Int[Tensor, "coefficient layer noise"]  # attack, norm-matched noise

    def rate(self, what: str, layer: int, coefficient: float) -> Rate:
        """``what`` (``"attack"``, ``"correct"`` or ``"clean"``) for one layer and coefficient."""
        at = self.coefficients.index(coefficient), self.layers.index(layer)
        n = self.n_clean if what == "clean" else self.n_victims
        return Rate(int(getattr(self, what)[at]), n)

    @property
    def shift(self) -> Float[Tensor, "coefficient layer"]:
        """How far attack success moved in the wanted direction, as a fraction."""
        return _shift(self.attack, self.coefficients, self.base_attack) / self.n_victims

    def random_shift(self, which: str) -> Float[Tensor, "coefficient layer draw"]:
        """The same for ``"heads"`` or ``"vectors"`` drawn at random."""
        values = self.random_heads if which == "heads" else self.random_vectors
        return _shift(values, self.coefficients, self.base_attack) / self.n_victims

    def best_layer(self, size: float) -> int:
        """The layer where ±``size`` moves attack success most in the weaker direction.

        Layer 0's ``resid_pre`` is the bare embedding, where subtraction destroys the input, so it is
        left out unless it is all there is.
        """
        weaker = torch.minimum(
            self.shift[self.coefficients.index(size)], self.shift[self.coefficients.index(-size)]
        )
        allowed = [i for i, layer in enumerate(self.layers) if layer or self.site != "resid_pre"]
        return self.layers[max(allowed or range(len(self.layers)), key=lambda i: float(weaker[i]))]

    def to_frame(self) -> pd.DataFrame:
        """One row a coefficient and layer."""
        import pandas as pd

        rows = []
        for c, coefficient in enumerate(self.coefficients):
            for i, layer in enumerate(self.layers):
                attack, n = self.rate("attack", layer, coefficient), self.n_victims
                rows.append(
                    {
                        "kind": self.kind,
                        "coefficient": coefficient,
                        "layer": layer,
                        "on": "clean" if coefficient > 0 else "triggered",
                        "attack": attack.value,
                        "low": attack.interval[0],
                        "high": attack.interval[1],
                        "without": self.base_attack[coefficient < 0] / n,
                        "correct": self.rate("correct", layer, coefficient).value,
                        "clean": self.rate("clean", layer, coefficient).value,
                        "random_heads": _mean(self.random_heads[c, i], n),
                        "random_vectors": _mean(self.random_vectors[c, i], n),
                        "n": n,
                    }
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        best = self.shift.flatten().argmax()
        c, i = divmod(int(best), len(self.layers))
        return (
            f"SteeringResult({self.kind} of {len(self.heads)} heads at {self.site}, "
            f"layers {self.layers[0]}–{self.layers[-1]}, largest shift {float(self.shift[c, i]):+.2f} "
            f"at layer {self.layers[i]} with {self.coefficients[c]:+g}; n={self.n_victims})"
        )


def _shift(attack: Tensor, coefficients: Sequence[float], base: tuple[int, int]) -> Tensor:
    sign = torch.tensor([1.0 if c > 0 else -1.0 for c in coefficients])
    start = torch.tensor([float(base[c < 0]) for c in coefficients])
    shape = (-1,) + (1,) * (attack.ndim - 1)
    return sign.view(shape) * (attack - start.view(shape))


def _mean(values: Tensor, n: int) -> float | None:
    return float(values.double().mean()) / n if values.numel() else None


def sweep_layers(
    model: HookedTransformer,
    pairs: PairSet,
    vector: BackdoorVector,
    *,
    cache: PairCache | None = None,
    layers: Sequence[int] | None = None,
    coefficients: Sequence[float] = (1.0, -1.0),
    n_random: int = 10,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SteeringResult:
    """Add the vector to clean prompts and subtract it from triggered ones, layer by layer.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: held-out pairs; attack success is measured on their victims.
        vector: from :meth:`BackdoorVector.from_cache`.
        cache: makes the vectors of random heads for the control (none without it).
        layers: all for None.
        coefficients: signed; + is added to clean, − subtracted from triggered prompts.
        n_random: draws of each control: random heads (as many, none of the vector's own where the
            model has enough others) and Gaussian vectors of the same norm.
        fmt: how a prompt is rendered; the cache's, or the chat template.
        max_new_tokens: where a decoded answer is cut.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU).
        seed: of the controls.
        progress: whether to show a progress bar.

    Raises:
        HeadError: for a layer that the model lacks.
        DataError: if there is no victim.
    """
    cfg = model.cfg
    layers = tuple(range(cfg.n_layers) if layers is None else layers)
    _check_layers(model, layers)
    coefficients = tuple(float(c) for c in coefficients)
    if 0.0 in coefficients:
        raise HeadError("A coefficient of 0 does nothing; give positive and negative ones.")
    fmt = fmt or (cache.fmt if cache else None) or PromptFormat.default(model.tokenizer)
    victims = pairs.victims
    controls = [_random_heads(cache, vector, n_random, seed) if cache else [],
                _random_vectors(vector, n_random, seed)]  # fmt: skip
    directions = [vector.direction, *controls[0], *controls[1]]
    site: VectorSite = vector.site  # type: ignore[assignment]

    def run(
        measured: PairSet,
        on: Which,
        chosen: Sequence[float],
        some: Sequence[Tensor],
        only_correct: bool = False,
    ) -> tuple[tuple[int, int], Tensor, Tensor]:
        interventions = [Intervention()] + [
            Intervention(vectors=(Vector(site, layer, c * direction),))
            for direction in some
            for c in chosen
            for layer in layers
        ]
        out = evaluate(
            model, measured, interventions, on=on, only_correct=only_correct, fmt=fmt,
            max_new_tokens=max_new_tokens, memory_gb=memory_gb, progress=progress,
        )  # fmt: skip
        shape = (len(some), len(chosen), len(layers))
        attack, correct = out.attack.sum(1), out.correct.sum(1)
        base = int(attack[0]), int(correct[0])
        return base, attack[1:].view(shape), correct[1:].view(shape)

    shape = (len(coefficients), len(layers))
    attack = torch.zeros(len(directions), *shape, dtype=torch.long)
    correct = torch.zeros(shape, dtype=torch.long)
    bases = []  # (attack, correct) on clean, then on triggered victims
    sides: tuple[tuple[bool, Which], ...] = ((False, "clean"), (True, "triggered"))
    for negative, on in sides:
        at = [i for i, c in enumerate(coefficients) if (c < 0) == negative]
        base, hits, right = run(victims, on, [coefficients[i] for i in at], directions)
        bases.append(base)
        attack[:, at] = hits
        correct[at] = right[0]
    base_attack, base_correct = zip(*bases, strict=True)
    clean_base, _, clean = run(pairs, "clean", coefficients, [vector.direction], only_correct=True)
    n_heads = len(controls[0])
    settings = {"norm": vector.norm, "n_random": n_random, "max_new_tokens": max_new_tokens,
                "position": "last prompt token, prefill only",
                "vector_data": vector.provenance.data}  # fmt: skip
    return SteeringResult(
        provenance(model, pairs, fmt, seed, **settings),
        vector.heads, vector.site, vector.kind, layers, coefficients, len(victims), len(pairs),
        base_attack, base_correct, clean_base[1], attack[0], correct, clean[0],
        attack[1 : 1 + n_heads].movedim(0, -1), attack[1 + n_heads :].movedim(0, -1),
    )  # fmt: skip


def _random_heads(cache: PairCache, vector: BackdoorVector, n: int, seed: int) -> list[Tensor]:
    cfg = cache.model.cfg
    everything = every_head(cfg.n_layers, cfg.n_heads)
    others = [head for head in everything if head not in vector.heads]
    pool = others if len(others) >= len(vector.heads) else everything
    rng = random.Random(f"steer-{seed}")
    kind: VectorKind = vector.kind  # type: ignore[assignment]
    drawn = [rng.sample(pool, len(vector.heads)) for _ in range(n)]
    return [BackdoorVector.from_cache(cache, heads, kind=kind).direction for heads in drawn]


def _random_vectors(vector: BackdoorVector, n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, len(vector.direction), generator=generator)
    return list(noise / noise.norm(dim=1, keepdim=True) * vector.norm)


def _check_layers(model: HookedTransformer, layers: Sequence[int]) -> None:
    for layer in layers:
        if not 0 <= layer < model.cfg.n_layers:
            raise HeadError(
                f"Layer {layer} does not exist: this model has layers 0 to {model.cfg.n_layers - 1}."
            )
