"""Does the backdoor vector switch the backdoor on and off, layer by layer, and do its controls?

Source: Backdoor Attribution, Section 5. Added to the residual stream of clean prompts the vector
activates the backdoor, subtracted from that of triggered ones it suppresses it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.analyses.steering.vector import BackdoorVector, check_layers
from bkdlens.counts import Counts
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.cache import PairCache
from bkdlens.engines.generate import evaluate
from bkdlens.engines.hooks import Intervention, Vector
from bkdlens.errors import HeadError
from bkdlens.metrics import Rate
from bkdlens.results import provenance
from bkdlens.types import MAX_NEW_TOKENS, Head, VectorKind, VectorSite, Which, every_head


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SteeringResult(Counts):
    """Answers under a vector, by coefficient and layer.

    With a positive coefficient the vector is added to *clean* victims: ``attack`` counts the backdoor's
    answers (activation) and ``correct`` the correct answers that stay. With a negative one it is
    subtracted from *triggered* victims: ``attack`` counts the backdoor's answers that stay (suppression)
    and ``correct`` the correct answers that return. ``clean`` counts correct answers to clean prompts
    under the same vector. The counts are ``[coefficient layer]``; the two controls have one more axis,
    their draws.

    Attributes:
        heads: those that the vector was made from.
        site: where it was added.
        kind: ``"mean"`` or ``"contrast"``.
        layers: where it was added, one at a time.
        coefficients: signed.
        base_attack: the backdoor's answers of (clean, triggered) victims without a vector.
        base_correct: correct answers of (clean, triggered) victims without a vector.
        base_clean: correct answers to clean prompts without a vector.
        random_heads: ``attack`` under vectors of random heads.
        random_vectors: ``attack`` under Gaussian vectors of the same norm.
    """

    heads: tuple[Head, ...]
    site: str
    kind: str
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    base_attack: tuple[int, int]
    base_correct: tuple[int, int]
    base_clean: int
    random_heads: Int[Tensor, "*axes draw"]
    random_vectors: Int[Tensor, "*axes noise"]

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Coefficients and layers."""
        return {"coefficient": self.coefficients, "layer": self.layers}

    @property
    def controls(self) -> dict[str, dict[str, Int[Tensor, "coefficient layer draw"]]]:
        """Vectors of random heads and noise of the same norm, where they were drawn."""
        drawn = {"random heads": self.random_heads, "noise": self.random_vectors}
        return {name: {"attack": draws} for name, draws in drawn.items() if draws.shape[-1]}

    def base(self, what: str, **at: Any) -> Rate:
        """``what`` without a vector, on the prompts that a coefficient of this sign is used on."""
        triggered = at["coefficient"] < 0
        if what == "clean":
            return Rate(self.base_clean, self.n_clean)
        counts = self.base_attack if what == "attack" else self.base_correct
        return Rate(counts[triggered], self.n_victims)

    def rate(self, what: str, layer: int, coefficient: float) -> Rate:
        """``what`` (``"attack"``, ``"correct"``, ``"clean"``) at one layer and coefficient, 0 to 1.

        Raises:
            ChoiceError: for a layer or coefficient that was not run.
        """
        return self.rate_at(what, coefficient=coefficient, layer=layer)

    @property
    def shift(self) -> Float[Tensor, "coefficient layer"]:
        """How far attack success moved in the wanted direction, as a fraction."""
        return self._shift(self.attack)

    def random_shift(self, which: str) -> Float[Tensor, "coefficient layer draw"]:
        """How far attack success moved with random ``"heads"`` or ``"vectors"``, as a fraction."""
        return self._shift(self.random_heads if which == "heads" else self.random_vectors)

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
        """One row per coefficient and layer; rates are 0 to 1."""
        rows = []
        for coefficient, layer in product(self.coefficients, self.layers):
            at = {"coefficient": coefficient, "layer": layer}
            attack, drawn = self.rate_at("attack", **at), self.draws("attack", **at)
            row: dict[str, object] = {
                "kind": self.kind,
                **at,
                "on": "clean" if coefficient > 0 else "triggered",
                "attack": attack.value,
                "low": attack.interval[0],
                "high": attack.interval[1],
                "without": self.base("attack", **at).value,
                "correct": self.rate_at("correct", **at).value,
                "clean": self.rate_at("clean", **at).value,
            }
            for column, control in (("random_heads", "random heads"), ("random_vectors", "noise")):
                row[column] = drawn[control].mean if control in drawn else None
            rows.append(row | {"n": self.n_victims})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        best = self.shift.flatten().argmax()
        c, i = divmod(int(best), len(self.layers))
        return (
            f"SteeringResult({self.kind} of {len(self.heads)} heads at {self.site}, "
            f"layers {self.layers[0]}–{self.layers[-1]}, largest shift {float(self.shift[c, i]):+.2f} "
            f"at layer {self.layers[i]} with {self.coefficients[c]:+g}; n={self.n_victims})"
        )

    def _shift(self, attack: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        sign = torch.tensor([1.0 if c > 0 else -1.0 for c in self.coefficients])
        start = torch.tensor([float(self.base_attack[c < 0]) for c in self.coefficients])
        shape = (-1,) + (1,) * (attack.ndim - 1)
        return sign.view(shape) * (attack - start.view(shape)) / self.n_victims


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

    Needed are the model, the pairs and a vector; the control by random heads needs a cache as well.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: held-out pairs; attack success is measured on their victims.
        vector: from :meth:`BackdoorVector.from_cache`.
        cache: what vectors of random heads are made from; without it there are none.
        layers: all for None.
        coefficients: signed; + is added to clean, − subtracted from triggered prompts.
        n_random: draws of each control: random heads (as many, none of the vector's own where the
            model has enough others) and Gaussian vectors of the same norm.
        fmt: how a prompt is rendered; the cache's, or the chat template.
        max_new_tokens: where a decoded answer is cut.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU).
        seed: of the controls.
        progress: whether to show a progress bar.

    Returns:
        Counts ``[coefficient layer]`` among the victims and the clean prompts, before and after, and of
        every random draw.

    Raises:
        HeadError: for a layer that the model lacks, or a coefficient of 0.
        DataError: if there is no victim.

    Examples:
        >>> swept = bkdlens.sweep_layers(model, test, vector, layers=[2], n_random=1)
        >>> suppressed = swept.rate("attack", layer=2, coefficient=-1.0)
    """
    cfg = model.cfg
    layers = tuple(range(cfg.n_layers) if layers is None else layers)
    check_layers(model, layers)
    coefficients = tuple(float(c) for c in coefficients)
    if 0.0 in coefficients:
        raise HeadError("A coefficient of 0 does nothing; give positive and negative ones.")
    fmt = fmt or (cache.fmt if cache else None) or PromptFormat.default(model.tokenizer)
    victims, site = pairs.victims, cast(VectorSite, vector.site)
    random_heads = _random_heads(cache, vector, n_random, seed) if cache else []
    directions = [vector.direction, *random_heads, *_random_vectors(vector, n_random, seed)]
    judge = partial(
        evaluate, model, fmt=fmt, max_new_tokens=max_new_tokens, memory_gb=memory_gb, progress=progress
    )

    def run(
        measured: PairSet,
        on: Which,
        sizes: Sequence[float],
        vectors: Sequence[Tensor],
        only_correct: bool = False,
    ) -> tuple[Int[Tensor, " run"], Int[Tensor, " run"]]:
        """Attacks and correct answers: without a vector, then ``[vector coefficient layer]``."""
        places = product(vectors, sizes, layers)
        pushes = [Vector(site, layer, size * vector) for vector, size, layer in places]
        interventions = [Intervention(), *(Intervention(vectors=(push,)) for push in pushes)]
        out = judge(measured, interventions, on=on, only_correct=only_correct)
        return out.attack.sum(1), out.correct.sum(1)

    attack = torch.zeros(len(directions), len(coefficients), len(layers), dtype=torch.long)
    correct = torch.zeros(attack.shape, dtype=torch.long)
    base_attack, base_correct = [], []  # on clean, then on triggered victims
    sides: tuple[tuple[bool, Which], ...] = ((False, "clean"), (True, "triggered"))
    for negative, on in sides:
        at = [i for i, c in enumerate(coefficients) if (c < 0) == negative]
        hits, right = run(victims, on, [coefficients[i] for i in at], directions)
        base_attack.append(int(hits[0]))
        base_correct.append(int(right[0]))
        attack[:, at] = hits[1:].view(len(directions), len(at), len(layers))
        correct[:, at] = right[1:].view(len(directions), len(at), len(layers))
    _, clean = run(pairs, "clean", coefficients, [vector.direction], only_correct=True)
    n_heads = len(random_heads)
    settings = {
        "norm": vector.norm,
        "n_random": n_random,
        "max_new_tokens": max_new_tokens,
        "position": "last prompt token, prefill only",
        "vector_data": vector.provenance.data,
    }
    return SteeringResult(
        provenance=provenance(model, pairs, fmt, seed, **settings),
        heads=vector.heads,
        site=vector.site,
        kind=vector.kind,
        layers=layers,
        coefficients=coefficients,
        n_victims=len(victims),
        n_clean=len(pairs),
        base_attack=(base_attack[0], base_attack[1]),
        base_correct=(base_correct[0], base_correct[1]),
        base_clean=int(clean[0]),
        attack=attack[0],
        correct=correct[0],
        clean=clean[1:].view(attack.shape[1:]),
        random_heads=attack[1 : 1 + n_heads].movedim(0, -1),
        random_vectors=attack[1 + n_heads :].movedim(0, -1),
    )


def _random_heads(cache: PairCache, vector: BackdoorVector, n: int, seed: int) -> list[Tensor]:
    cfg = cache.model.cfg
    everything = every_head(cfg.n_layers, cfg.n_heads)
    others = [head for head in everything if head not in vector.heads]
    pool = others if len(others) >= len(vector.heads) else everything
    rng = random.Random(f"steer-{seed}")
    kind = cast(VectorKind, vector.kind)
    drawn = [rng.sample(pool, len(vector.heads)) for _ in range(n)]
    return [BackdoorVector.from_cache(cache, heads, kind=kind).direction for heads in drawn]


def _random_vectors(vector: BackdoorVector, n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, len(vector.direction), generator=generator)
    return list(noise / noise.norm(dim=1, keepdim=True) * vector.norm)
