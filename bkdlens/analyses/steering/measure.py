"""Does the backdoor vector switch the backdoor on and off, layer by layer, and do its controls?

Source: Backdoor Attribution, Section 5. Added to the residual stream of clean prompts the vector
activates the backdoor, subtracted from that of triggered ones it suppresses it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.analyses.steering.vector import BackdoorVector, check_layers, check_vector
from bkdlens.answers import Answers, decoded
from bkdlens.counts import Counts, basr_columns
from bkdlens.data.judging import Judged, judged, outcome_table, yardsticks_of
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.cache import PairCache
from bkdlens.engines.generate import answer, yardsticks
from bkdlens.engines.hooks import NOTHING, Intervention, Vector
from bkdlens.engines.inputs import checked
from bkdlens.errors import HeadError
from bkdlens.metrics import Basr, Rate
from bkdlens.results import provenance
from bkdlens.types import MAX_NEW_TOKENS, Head, VectorKind, VectorSite, Which, draw_heads


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SteeringResult(Judged, Counts):
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
        random_heads_correct: ``correct`` under vectors of random heads; None in results of version 0.1.
        random_vectors_correct: ``correct`` under Gaussian vectors of the same norm.
    """

    answered: ClassVar = "steered"
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
    random_heads_correct: Int[Tensor, "*axes draw"] | None = None
    random_vectors_correct: Int[Tensor, "*axes noise"] | None = None

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Coefficients and layers."""
        return {"coefficient": self.coefficients, "layer": self.layers}

    @property
    def controls(self) -> dict[str, dict[str, Int[Tensor, "coefficient layer draw"]]]:
        """Vectors of random heads and noise of the same norm, where they were drawn."""
        drawn = {
            "random heads": {"attack": self.random_heads, "correct": self.random_heads_correct},
            "noise": {"attack": self.random_vectors, "correct": self.random_vectors_correct},
        }
        told = {
            name: {what: draws for what, draws in counted.items() if draws is not None}
            for name, counted in drawn.items()
        }
        return {name: counted for name, counted in told.items() if counted["attack"].shape[-1]}

    def basr(self, **at: Any) -> Basr | None:
        """Behavioural attack success where the vector is subtracted; None where it is added."""
        return super().basr(**at) if at["coefficient"] < 0 else None

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

    @staticmethod
    def _counted(pairs: PairSet, answers: Mapping[str, Answers]) -> dict[str, Any]:
        """What the answers come to by the criteria of ``pairs.backdoor``."""
        by, victims, of_victims = yardsticks_of(pairs, answers)
        judge = partial(judged, victims, by=of_victims)
        untouched = [judge(answers[f"before {on}"]) for on in ("clean", "triggered")]
        steered, heads, noise = (judge(answers[name]) for name in ("steered", "random heads", "noise"))
        before = judge(of_victims["before"]).correct
        clean_outcomes = judged(pairs, answers["clean"], by)
        clean, clean_before = clean_outcomes.correct, judged(pairs, answers["before"], by).correct
        return {
            "answers": decoded({**answers, "steered": steered.answers, "clean": clean_outcomes.answers}),
            "base_attack": tuple(int(side.attack.sum()) for side in untouched),
            "base_correct": tuple(int(side.correct.sum()) for side in untouched),
            "base_clean": int(clean_before.sum()),
            "attack": steered.attack.sum(-1),
            "correct": steered.correct.sum(-1),
            "clean": clean.sum(-1),
            "clean_before": int(clean_before.sum()),
            "clean_kept": (clean & clean_before).sum(-1),
            "good_before": int(before.sum()),
            "kept": (steered.correct & before).sum(-1),
            "random_heads": heads.attack.sum(-1),
            "random_vectors": noise.attack.sum(-1),
            "random_heads_correct": heads.correct.sum(-1),
            "random_vectors_correct": noise.correct.sum(-1),
        }

    def _needed(self, pairs: PairSet) -> Sequence[str]:
        return ("random heads", "noise")

    def _tables(self, pairs: PairSet, victims: PairSet) -> Iterable[pd.DataFrame]:
        for i, coefficient in enumerate(self.coefficients):
            on: Which = "clean" if coefficient > 0 else "triggered"
            axes = {"coefficient": (coefficient,), "layer": self.layers}
            yield outcome_table(victims, self.answers["steered"][i : i + 1], on, axes)
            if on == "triggered":  # else the same prompts under the same vector
                yield outcome_table(pairs, self.answers["clean"][i : i + 1], "clean", axes)

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
            rows.append(row | basr_columns(self, **at) | {"n": self.n_victims})
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


@checked
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
    keep_controls: bool = False,
    progress: bool = False,
    allow_other_model: bool = False,
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
        keep_controls: decode and keep every answer of the controls too, so that the result can be
            judged by any other criterion; else only as far as its own criteria need.
        progress: whether to show a progress bar.
        allow_other_model: whether a vector or cache of another model is meant, and not a mistake.

    Returns:
        Counts ``[coefficient layer]`` among the victims and the clean prompts, before and after, and of
        every random draw.

    Raises:
        HeadError: for a layer that the model lacks, or a coefficient of 0.
        DataError: if there is no victim, or the cache is not of the vector's pairs.
        HookError: for a vector or cache of another model.

    Examples:
        >>> swept = bkdlens.sweep_layers(model, test, vector, layers=[2], n_random=1)
        >>> suppressed = swept.rate("attack", layer=2, coefficient=-1.0)
    """
    cfg = model.cfg
    other = check_vector(model, vector, allow_other_model=allow_other_model, cache=cache)
    layers = tuple(range(cfg.n_layers) if layers is None else layers)
    check_layers(model, layers)
    coefficients = tuple(float(c) for c in coefficients)
    if 0.0 in coefficients:
        raise HeadError("A coefficient of 0 does nothing; give positive and negative ones.")
    fmt = fmt or (cache.fmt if cache else None) or PromptFormat.default(model.tokenizer)
    victims, site = pairs.victims, cast(VectorSite, vector.site)
    random_heads = _random_heads(cache, vector, n_random, seed) if cache else []
    directions = [vector.direction, *random_heads, *_random_vectors(vector, n_random, seed)]
    ask = partial(
        answer, model, fmt=fmt, max_new_tokens=max_new_tokens, memory_gb=memory_gb, progress=progress
    )

    def run(measured: PairSet, on: Which, sizes: Sequence[float], vectors: Sequence[Tensor]) -> Answers:
        """Answers without a vector, then ``[vector coefficient layer]`` in one row."""
        places = product(vectors, sizes, layers)
        pushes = [Vector(site, layer, size * vector) for vector, size, layer in places]
        interventions = [NOTHING, *(Intervention(vectors=(push,)) for push in pushes)]
        named = 1 + len(sizes) * len(layers)  # without a vector, and under the vector itself
        # On clean victims, too, a control's answer is looked at for the attacker's success.
        whole = keep_controls or pairs.backdoor.needs_whole("triggered")
        finish = [whole or i < named for i in range(len(interventions))]
        return ask(measured, interventions, on=on, finish=finish)

    n_heads, n_victims = len(random_heads), len(victims)
    shape = (len(directions), len(coefficients), len(layers))
    answers = yardsticks(model, pairs, fmt, max_new_tokens)
    clean = run(pairs, "clean", coefficients, [vector.direction])
    answers["before"], answers["clean"] = clean[0], clean[1:].view(*shape[1:], len(pairs))
    steered = []  # by coefficient: answers ``[vector layer victim]``
    for negative, on in ((False, "clean"), (True, "triggered")):
        sizes = [c for c in coefficients if (c < 0) == negative]
        given = run(victims, cast(Which, on), sizes, directions)
        answers[f"before {on}"] = given[0]
        by_size = given[1:].view(len(directions), len(sizes), len(layers), n_victims)
        steered += [(size, by_size[:, i]) for i, size in enumerate(sizes)]
    in_order = [next(a for size, a in steered if size == c) for c in coefficients]
    every = Answers.stack(in_order).movedim(0, 1)  # [vector coefficient layer victim]
    answers["steered"] = every[0]
    answers["random heads"] = every[1 : 1 + n_heads].movedim(0, -2)
    answers["noise"] = every[1 + n_heads :].movedim(0, -2)
    settings = {
        "norm": vector.norm,
        "n_random": n_random,
        "max_new_tokens": max_new_tokens,
        "position": "last prompt token, prefill only",
        "vector_data": vector.provenance.data,
        **pairs.backdoor.judgement,
        **other,
    }
    return SteeringResult(
        provenance=provenance(model, pairs, fmt, seed, **settings),
        heads=vector.heads,
        site=vector.site,
        kind=vector.kind,
        layers=layers,
        coefficients=coefficients,
        n_victims=n_victims,
        n_clean=len(pairs),
        **SteeringResult._counted(pairs, answers),
    )


def _random_heads(cache: PairCache, vector: BackdoorVector, n: int, seed: int) -> list[Tensor]:
    cfg, kind = cache.model.cfg, cast(VectorKind, vector.kind)
    drawn = draw_heads(random.Random(f"steer-{seed}"), vector.heads, cfg.n_layers, cfg.n_heads, n)
    return [BackdoorVector.from_cache(cache, heads, kind=kind).direction for heads in drawn]


def _random_vectors(vector: BackdoorVector, n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, len(vector.direction), generator=generator)
    return list(noise / noise.norm(dim=1, keepdim=True) * vector.norm)
