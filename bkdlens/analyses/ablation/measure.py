"""Head ablation: does the attack need the heads that attribution names?

Source: Backdoor Attribution, Section 4. The first n heads of the ranking are switched off at the last
prompt token, and attack success is measured on triggered victims - beside how often the right answer
comes back and how many clean prompts are still answered rightly, because an ablation that breaks the
model also ends the attack. Random groups of as many heads are the control.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.cache import PairCache, cache_activations, head_results
from bkdlens.engines.generate import MAX_NEW_TOKENS, evaluate
from bkdlens.engines.hooks import NOTHING, Intervention, Vector
from bkdlens.errors import DataError
from bkdlens.metrics import Rate
from bkdlens.results import Result, provenance
from bkdlens.types import AblationMode, Head, HeadLike, Which, check_choice, every_head, parse_heads

if TYPE_CHECKING:
    import pandas as pd

COUNTS = (0, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, eq=False, repr=False)
class AblationResult(Result):
    """Successes by mode and number of ablated heads; ``random_*`` have one more axis, the groups.

    ``attack`` and ``restored`` count among ``n_triggered`` triggered victims (the backdoor's answer,
    the exact right answer), ``clean`` among ``n_clean`` clean prompts (the exact right answer).
    """

    heads: tuple[Head, ...]  # the ranking that was ablated
    counts: tuple[int, ...]
    modes: tuple[str, ...]
    n_triggered: int
    n_clean: int
    attack: Int[Tensor, "mode count"]
    restored: Int[Tensor, "mode count"]
    clean: Int[Tensor, "mode count"]
    random_attack: Int[Tensor, "mode count group"]
    random_restored: Int[Tensor, "mode count group"]
    random_clean: Int[Tensor, "mode count group"]

    def rate(self, what: str, mode: str, count: int) -> Rate:
        """``what`` (``"attack"``, ``"restored"`` or ``"clean"``) for one mode and count of heads."""
        at = self.modes.index(mode), self.counts.index(count)
        return Rate(int(getattr(self, what)[at]), self.n_clean if what == "clean" else self.n_triggered)

    def random_mean(self, what: str, mode: str, count: int) -> float:
        """The same for random groups of heads, averaged over the groups."""
        at = self.modes.index(mode), self.counts.index(count)
        n = self.n_clean if what == "clean" else self.n_triggered
        return float(getattr(self, f"random_{what}")[at].double().mean()) / n

    def to_frame(self) -> pd.DataFrame:
        """One row a mode and count, with the mean of the random groups beside each rate."""
        import pandas as pd

        rows = []
        for mode in self.modes:
            for count in self.counts:
                row: dict[str, object] = {"mode": mode, "heads": count}
                for what in ("attack", "restored", "clean"):
                    rate = self.rate(what, mode, count)
                    low, high = rate.interval
                    row |= {what: rate.value, f"{what}_low": low, f"{what}_high": high}
                    row[f"{what}_random"] = self.random_mean(what, mode, count)
                rows.append(row | {"n_triggered": self.n_triggered, "n_clean": self.n_clean})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        parts = [
            f"{mode}: " + ", ".join(f"{c}→{self.rate('attack', mode, c).value:.2f}" for c in self.counts)
            for mode in self.modes
        ]
        return f"AblationResult(attack success by heads, n={self.n_triggered}; {'; '.join(parts)})"


def ablate_heads(
    model: HookedTransformer,
    pairs: PairSet,
    heads: Sequence[HeadLike],
    *,
    cache: PairCache | None = None,
    counts: Sequence[int] = COUNTS,
    modes: Sequence[AblationMode] = ("zero", "mean"),
    n_random: int = 10,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AblationResult:
    """Attack success, restored answers and clean accuracy with the first n heads switched off.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: held-out pairs; attack success is measured on their victims.
        heads: a ranking, strongest first.
        cache: of other pairs: the clean means and samples come from it (needed for ``mean`` and
            ``resample``).
        counts: numbers of heads, clipped to the ranking's length.
        modes: ``zero``; ``mean`` (the cache's mean clean activation); ``resample`` (the activation of
            a random clean prompt of the cache); ``subtract`` (the paper's code: the head's output in
            the untouched run is subtracted from the attention output, so that several layers
            together are no true zero).
        n_random: groups of as many heads, drawn from all, for each count and mode.
        fmt: how a prompt is rendered; the cache's, or the chat template.
        max_new_tokens: where a decoded answer is cut.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU).
        seed: of the random groups and samples.
        progress: whether to show a progress bar.

    Raises:
        DataError: if there is no victim, or a mode needs a cache that is not given.
        HeadError: for a head that the model lacks or an unknown mode.
    """
    cfg = model.cfg
    for mode in modes:
        check_choice("ablation mode", mode, AblationMode)
        if cache is None and mode in ("mean", "resample"):
            raise DataError(f"Ablation by {mode} needs a cache of clean activations; give cache=….")
    ranking = parse_heads(list(heads), cfg.n_layers, cfg.n_heads)
    counts = tuple(sorted({min(count, len(ranking)) for count in counts}))
    fmt = fmt or (cache.fmt if cache else None) or PromptFormat.default(model.tokenizer)
    everything = every_head(cfg.n_layers, cfg.n_heads)
    rng = random.Random(f"ablate-{seed}")
    groups = [
        # Of no heads and of all heads there is one group: nothing to draw.
        [tuple(rng.sample(everything, count)) for _ in range(n_random)]
        if 0 < count < len(everything)
        else []
        for count in counts
    ]
    cells = [
        (mode, k, ranking[:count] if g < 0 else groups[k][g])
        for mode in modes
        for k, count in enumerate(counts)
        for g in range(-1, len(groups[k]))
    ]
    victims = pairs.victims
    outcomes = {}
    sides: tuple[tuple[Which, PairSet], ...] = (("triggered", victims), ("clean", pairs))
    for on, measured in sides:
        values = _Values(model, measured, on, cache, fmt, modes, seed)
        interventions = [values.intervention(mode, chosen) for mode, _, chosen in cells]
        outcomes[on] = evaluate(
            model, measured, interventions, on=on, only_correct=on == "clean", fmt=fmt,
            max_new_tokens=max_new_tokens, memory_gb=memory_gb, progress=progress,
        )  # fmt: skip
    triggered = outcomes["triggered"]
    sums = {
        "attack": triggered.attack.sum(1),
        "restored": triggered.correct.sum(1),
        "clean": outcomes["clean"].correct.sum(1),
    }
    main = {name: torch.zeros(len(modes), len(counts), dtype=torch.long) for name in sums}
    # Without heads there is nothing to draw: the random groups of n=0 are the model as it is.
    control = {name: torch.zeros(len(modes), len(counts), n_random, dtype=torch.long) for name in sums}
    drawn = {(m, k): 0 for m in range(len(modes)) for k in range(len(counts))}
    for i, (mode, k, _) in enumerate(cells):
        m = modes.index(mode)
        g = drawn[m, k] - 1
        drawn[m, k] += 1
        for name, total in sums.items():
            if g < 0:
                main[name][m, k] = total[i]
                control[name][m, k] = total[i]
            else:
                control[name][m, k, g] = total[i]
    settings = {"modes": list(modes), "n_random": n_random, "max_new_tokens": max_new_tokens,
                "position": "last prompt token, prefill only",
                "cache": cache.pairs.source if cache else None}  # fmt: skip
    return AblationResult(
        provenance(model, pairs, fmt, seed, **settings),
        ranking, counts, tuple(modes), len(victims), len(pairs),
        main["attack"], main["restored"], main["clean"],
        control["attack"], control["restored"], control["clean"],
    )  # fmt: skip


class _Values:
    """What the heads are set to, by mode, for one set of prompts."""

    def __init__(
        self,
        model: HookedTransformer,
        pairs: PairSet,
        on: Which,
        cache: PairCache | None,
        fmt: PromptFormat,
        modes: Sequence[str],
        seed: int,
    ) -> None:
        cfg = model.cfg
        self.z: dict[str, Float[Tensor, "*prompt layer head d_head"]] = {
            "zero": torch.zeros(cfg.n_layers, cfg.n_heads, cfg.d_head)
        }
        if cache is not None:
            self.z["mean"] = cache.mean_z("clean", victims=False)
            if "resample" in modes:
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randint(len(cache.pairs), (len(pairs),), generator=generator)
                self.z["resample"] = cache.z("clean")[drawn]
        if "subtract" in modes:
            own = cache_activations(model, pairs, fmt=fmt).z(on)
            self.result: Float[Tensor, "prompt layer head d_model"] = head_results(model, own)

    def intervention(self, mode: str, heads: Sequence[Head]) -> Intervention:
        if not heads:
            return NOTHING
        layers, index = (list(axis) for axis in zip(*heads, strict=True))
        if mode != "subtract":
            return Intervention(tuple(heads), self.z[mode][..., layers, index, :])
        return Intervention(
            vectors=tuple(
                Vector(
                    "attn_out",
                    layer,
                    -self.result[:, layer, [h.head for h in heads if h.layer == layer]].sum(1),
                )
                for layer in sorted(set(layers))
            )
        )
