"""Head ablation: does the attack need the heads that attribution names?

Source: Backdoor Attribution, Section 4. The first n heads of the ranking are switched off at the last
prompt token, and attack success is measured on triggered victims - beside how often a good answer comes
back and how many clean prompts still have one, because an ablation that breaks the model also ends the
attack. Random groups of as many other heads are the control.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.answers import Answers, decoded
from bkdlens.counts import Counts, basr_columns
from bkdlens.data.judging import Judged, judged, outcome_table, yardsticks_of
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.cache import PairCache, cache_activations, head_results, transferred
from bkdlens.engines.generate import answer, yardsticks
from bkdlens.engines.hooks import NOTHING, Intervention, Vector
from bkdlens.engines.inputs import checked
from bkdlens.errors import DataError
from bkdlens.metrics import Rate
from bkdlens.paper import ABLATION_COUNTS
from bkdlens.results import provenance
from bkdlens.types import (
    MAX_NEW_TOKENS,
    AblationMode,
    Head,
    HeadLike,
    Which,
    check_choice,
    draw_heads,
    parse_heads,
)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AblationResult(Judged, Counts):
    """Answers with the first heads of a ranking switched off, by mode and number of heads.

    ``attack`` and ``correct`` count among triggered victims, ``clean`` among clean prompts; correct is
    what is good by the backdoor's criterion. The counts are ``[mode count]``; ``random_*`` have one more
    axis, groups of as many random heads. ``answers`` holds ``triggered`` and ``clean``
    ``[mode count prompt]``, ``random triggered`` and ``random clean`` ``[mode count group prompt]``, and
    ``before``, ``right`` and ``attacker`` ``[pair]``, which they are judged by.

    Attributes:
        heads: the ranking, strongest first.
        counts: how many heads were switched off.
        modes: what they were set to; see :func:`ablate_heads`.
        random_attack: answers of victims that are the backdoor's, per random group.
        random_correct: correct answers of victims, per random group.
        random_clean: correct answers to clean prompts, per random group.
    """

    saved_as: ClassVar = {
        "n_victims": "n_triggered",
        "correct": "restored",
        "random_correct": "random_restored",
    }
    draw_name: ClassVar = "group"
    answered: ClassVar = "triggered"
    heads: tuple[Head, ...]
    counts: tuple[int, ...]
    modes: tuple[str, ...]
    random_attack: Int[Tensor, "*axes group"]
    random_correct: Int[Tensor, "*axes group"]
    random_clean: Int[Tensor, "*axes group"]

    @property
    def n_triggered(self) -> int:
        """Number of triggered victims."""
        return self.n_victims

    @property
    def restored(self) -> Int[Tensor, "mode count"]:
        """Triggered victims that get the correct answer again, as a count."""
        return self.correct

    @property
    def random_restored(self) -> Int[Tensor, "mode count group"]:
        """Triggered victims that get the correct answer again, per random group."""
        return self.random_correct

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Modes and numbers of heads."""
        return {"mode": self.modes, "heads": self.counts}

    @property
    def controls(self) -> dict[str, dict[str, Int[Tensor, "mode count group"]]]:
        """Random groups of as many heads, where they were drawn."""
        counted = {
            "attack": self.random_attack,
            "correct": self.random_correct,
            "clean": self.random_clean,
        }
        return {"random": counted} if self.random_attack.shape[-1] else {}

    def base(self, what: str, **at: Any) -> Rate | None:
        """``what`` with no head switched off; None where that was not measured."""
        return self.rate(what, at.get("mode", self.modes[0]), 0) if 0 in self.counts else None

    def rate(self, what: str, mode: str, count: int) -> Rate:
        """``what`` (``"attack"``, ``"restored"``, ``"clean"``) at one mode and count of heads, 0 to 1.

        Raises:
            ChoiceError: for a mode or count that was not run.
        """
        return self.rate_at(what, mode=mode, heads=count)

    def random_mean(self, what: str, mode: str, count: int) -> float:
        """The mean of ``what`` over random groups of as many heads, 0 to 1; NaN without groups."""
        what = "correct" if what == "restored" else what
        drawn = self.draws(what, mode=mode, heads=count)
        return drawn["random"].mean if drawn else math.nan

    @staticmethod
    def _counted(pairs: PairSet, answers: Mapping[str, Answers]) -> dict[str, Any]:
        """What the answers come to by the criteria of ``pairs.backdoor``."""
        by, victims, of_victims = yardsticks_of(pairs, answers)
        before = judged(victims, of_victims["before"], of_victims).correct
        clean_before = judged(pairs, answers["before"], by).correct
        counted: dict[str, Any] = {
            "good_before": int(before.sum()),
            "clean_before": int(clean_before.sum()),
        }
        for stem, name in (("", ""), ("random ", "random_")):
            triggered = judged(victims, answers[f"{stem}triggered"], of_victims)
            counted[f"{name}attack"] = triggered.attack.sum(-1)
            counted[f"{name}correct"] = triggered.correct.sum(-1)
            if f"{stem}clean" not in answers:  # not kept, and judged as they were
                continue
            clean = judged(pairs, answers[f"{stem}clean"], by)
            counted[f"{name}clean"] = clean.correct.sum(-1)
            if not stem:
                told = {**answers, "triggered": triggered.answers, "clean": clean.answers}
                counted["answers"] = decoded(told)
                counted["kept"] = (triggered.correct & before).sum(-1)
                counted["clean_kept"] = (clean.correct & clean_before).sum(-1)
        return counted

    def _needed(self, pairs: PairSet) -> Sequence[str]:
        # Whether a clean answer is right does not depend on what the attacker's success is.
        same = self.provenance.settings.get("good") == pairs.backdoor.judgement["good"]
        names = ("random triggered",) if same else ("random triggered", "random clean")
        return names if self.controls else ()

    def _tables(self, pairs: PairSet, victims: PairSet) -> Iterable[pd.DataFrame]:
        yield outcome_table(victims, self.answers["triggered"], "triggered", self.axes)
        yield outcome_table(pairs, self.answers["clean"], "clean", self.axes)

    def to_frame(self) -> pd.DataFrame:
        """One row per mode and count: each rate (0 to 1), its interval, and the random groups' mean."""
        rows = []
        for mode, count in product(self.modes, self.counts):
            row: dict[str, object] = {"mode": mode, "heads": count}
            for what in ("attack", "restored", "clean"):
                rate = self.rate(what, mode, count)
                row |= {what: rate.value, f"{what}_low": rate.interval[0]}
                row |= {f"{what}_high": rate.interval[1]}
                row[f"{what}_random"] = self.random_mean(what, mode, count)
            row |= basr_columns(self, mode=mode, heads=count)
            rows.append(row | {"n_triggered": self.n_victims, "n_clean": self.n_clean})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        parts = [
            f"{mode}: " + ", ".join(f"{c}→{self.rate('attack', mode, c).value:.2f}" for c in self.counts)
            for mode in self.modes
        ]
        return f"AblationResult(attack success by heads, n={self.n_victims}; {'; '.join(parts)})"


@checked
def ablate_heads(
    model: HookedTransformer,
    pairs: PairSet,
    heads: Sequence[HeadLike],
    *,
    cache: PairCache | None = None,
    counts: Sequence[int] = ABLATION_COUNTS,
    modes: Sequence[AblationMode] = ("zero", "mean"),
    n_random: int = 10,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    seed: int = 0,
    keep_controls: bool = False,
    progress: bool = False,
    allow_other_model: bool = False,
) -> AblationResult:
    """Attack success, restored answers and clean accuracy with the first *n* heads switched off.

    Needed are the model, the pairs and a ranking; ``mean`` and ``resample`` need a cache as well.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: held-out pairs; attack success is measured on their victims.
        heads: a ranking, strongest first.
        cache: of other pairs: where clean means and samples come from.
        counts: numbers of heads, at most the ranking's length.
        modes: ``zero``; ``mean`` (the cache's mean clean activation); ``resample`` (the activation of
            a random clean prompt of the cache); ``subtract`` (the paper's code: the head's output in
            the untouched run is subtracted from the attention output, so that several layers
            together are no true zero).
        n_random: groups of as many heads, drawn from all heads, per count and mode.
        fmt: how a prompt is rendered; the cache's, or the chat template.
        max_new_tokens: where a decoded answer is cut.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU).
        seed: of the random groups and samples.
        keep_controls: decode and keep every answer of the random groups too, so that the result can
            be judged by any other criterion; else only as far as its own criteria need.
        progress: whether to show a progress bar.
        allow_other_model: whether a cache of another model is meant, and not a mistake.

    Returns:
        Counts ``[mode count]`` among the victims and the clean prompts, and of every random group.

    Raises:
        DataError: if there is no victim, or a mode needs a cache that is not given.
        HookError: for a cache of another model.
        HeadError: for a head that the model lacks.
        ChoiceError: for an unknown mode.

    Examples:
        >>> found = bkdlens.ablate_heads(model, test, heads.top(2), cache=cache, n_random=1)
        >>> attack = found.rate("attack", "mean", 2)
    """
    cfg = model.cfg
    other = {}
    if cache is not None:
        other = transferred(model, "The cache", cache.model, allow_other_model=allow_other_model)
    for mode in modes:
        check_choice("ablation mode", mode, AblationMode)
        if cache is None and mode in ("mean", "resample"):
            raise DataError(f"Ablation by {mode} needs a cache of clean activations; give cache=….")
    ranking = parse_heads(list(heads), cfg.n_layers, cfg.n_heads)
    counts = tuple(sorted({min(count, len(ranking)) for count in counts}))
    fmt = fmt or (cache.fmt if cache else None) or PromptFormat.default(model.tokenizer)
    rng, size = random.Random(f"ablate-{seed}"), (cfg.n_layers, cfg.n_heads)
    # Of no heads and of all heads there is nothing to draw: there the groups are the run itself.
    drawn = [n_random if 0 < count < cfg.n_layers * cfg.n_heads else 0 for count in counts]
    groups = [
        [ranking[:count], *draw_heads(rng, ranking[:count], *size, n)]
        for count, n in zip(counts, drawn, strict=True)
    ]
    runs = [(mode, chosen) for mode in modes for group in groups for chosen in group]
    places = torch.arange(len(runs)).split([1 + n for _ in modes for n in drawn])
    order = torch.stack([place.expand(1 + n_random) if len(place) == 1 else place for place in places])
    order = order.view(len(modes), len(counts), 1 + n_random)
    victims = pairs.victims
    ask = partial(
        answer, model, fmt=fmt, max_new_tokens=max_new_tokens, memory_gb=memory_gb, progress=progress
    )
    answers = yardsticks(model, pairs, fmt, max_new_tokens)
    sides: tuple[tuple[Which, PairSet], ...] = (("triggered", victims), ("clean", pairs))
    for on, measured in sides:
        values = _values(model, measured, on, cache, fmt, modes, seed)
        interventions = [_intervention(mode, values[mode], chosen) for mode, chosen in runs]
        whole = keep_controls or pairs.backdoor.needs_whole(on)
        named = {int(place[0]) for place in places}
        finish = [True, *(whole or i in named for i in range(len(runs)))]
        given = ask(measured, [NOTHING, *interventions], on=on, finish=finish)
        if on == "clean":
            answers["before"] = given[0]
        answers[on], answers[f"random {on}"] = given[1 + order[..., 0]], given[1 + order[..., 1:]]
    settings = {
        "modes": list(modes),
        "n_random": n_random,
        "max_new_tokens": max_new_tokens,
        "position": "last prompt token, prefill only",
        "cache": cache.pairs.source if cache else None,
        **pairs.backdoor.judgement,
        **other,
    }
    return AblationResult(
        provenance=provenance(model, pairs, fmt, seed, **settings),
        heads=ranking,
        counts=counts,
        modes=tuple(modes),
        n_victims=len(victims),
        n_clean=len(pairs),
        **AblationResult._counted(pairs, answers),
    )


def _values(
    model: HookedTransformer,
    pairs: PairSet,
    on: Which,
    cache: PairCache | None,
    fmt: PromptFormat,
    modes: Sequence[str],
    seed: int,
) -> dict[str, Float[Tensor, "*prompt layer head _"]]:
    """What every head's ``z`` is set to, by mode; for ``subtract``, what each head writes."""
    cfg = model.cfg
    values = {"zero": torch.zeros(cfg.n_layers, cfg.n_heads, cfg.d_head)}
    if cache is not None:
        values["mean"] = cache.mean_z("clean", victims=False)
    if cache is not None and "resample" in modes:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(cache.pairs), (len(pairs),), generator=generator)
        values["resample"] = cache.z("clean")[rows]
    if "subtract" in modes:
        values["subtract"] = head_results(model, cache_activations(model, pairs, fmt=fmt).z(on))
    return values


def _intervention(
    mode: str, values: Float[Tensor, "*prompt layer head _"], heads: Sequence[Head]
) -> Intervention:
    """These heads switched off."""
    if not heads:
        return NOTHING
    layers, index = (list(axis) for axis in zip(*heads, strict=True))
    if mode != "subtract":
        return Intervention(tuple(heads), values[..., layers, index, :])
    by_layer = {layer: [h.head for h in heads if h.layer == layer] for layer in sorted(set(layers))}
    written = {layer: values[:, layer, index].sum(1) for layer, index in by_layer.items()}
    return Intervention(vectors=tuple(Vector("attn_out", layer, -x) for layer, x in written.items()))
