"""The whole main job on one model: behaviour, probes, attribution, ablation, steering, with controls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from transformer_lens import HookedTransformer

from bkdlens.analyses.ablation.measure import COUNTS, AblationResult, ablate_heads
from bkdlens.analyses.attribution.measure import N_PAIRS, HeadAttribution, attribute_heads
from bkdlens.analyses.behaviour.measure import BehaviourResult, measure_behaviour
from bkdlens.analyses.probes.measure import ProbeResult, train_probes
from bkdlens.analyses.steering.answers import Generations, sample_generations
from bkdlens.analyses.steering.measure import BackdoorVector, SteeringResult, sweep_layers
from bkdlens.data.backdoor import Backdoor
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat, encode_prompt
from bkdlens.engines.cache import PairCache, cache_activations
from bkdlens.engines.generate import MAX_NEW_TOKENS
from bkdlens.errors import ResultError, unknown
from bkdlens.results import Result, provenance, replacing
from bkdlens.study import Study, load_study
from bkdlens.types import AblationMode, AttributionMethod, ProbeKind, VectorKind, VectorSite

R = TypeVar("R", bound=Result)
STEPS = ("behaviour", "probe", "attribute", "ablate", "steer")


@dataclass(frozen=True)
class StudySettings:
    """Everything about a study that is a choice; saved with it."""

    n_attribution: int | None = N_PAIRS  # clean pairs
    attribution_method: str = "exact"
    layer_outputs: bool = True
    ablation_counts: tuple[int, ...] = COUNTS
    ablation_modes: tuple[str, ...] = ("zero", "mean")
    vector_heads: int | None = None  # None: a thirty-second of all heads (as the paper), at least 4
    vector_kinds: tuple[str, ...] = ("mean", "contrast")
    vector_site: str = "resid_pre"
    coefficients: tuple[float, ...] = (1.0, 2.0)  # both signs of each are tried
    n_random: int = 10
    probe_kinds: tuple[str, ...] = ("mlp", "svm")
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0


# The demo's settings: fewer pairs, so that it ends within a minute and a half on two cores.
DEMO = StudySettings(n_attribution=48, max_new_tokens=24)


def run_study(
    model: HookedTransformer,
    train: PairSet,
    validation: PairSet,
    test: PairSet,
    *,
    name: str = "study",
    controls: Mapping[str, Callable[[], HookedTransformer]] | None = None,
    settings: StudySettings | None = None,
    fmt: PromptFormat | None = None,
    out: str | Path | None = None,
    steps: tuple[str, ...] = STEPS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> Study:
    """Run the analyses on one model, with its controls.

    Means, probes and attribution read ``train``; kind, layer and coefficient of the vector are chosen
    on ``validation``; every reported rate is on ``test``.

    Args:
        model: the suspected model, from :func:`bkdlens.load`.
        train, validation, test: disjoint pairs (:meth:`PairSet.split`).
        name: a title for tables and the report.
        controls: un-poisoned models by condition (``clean-adapter``, ``base``), each loaded when it
            is its turn and dropped after.
        settings: the choices; the defaults are the paper's where it has any.
        fmt: how a prompt is rendered; the chat template where there is one.
        out: a run folder. What it already holds is not run again, and each result is written when
            it is done.
        steps: which of ``behaviour``, ``probe``, ``attribute``, ``ablate`` and ``steer`` to run;
            what a later one needs of an earlier one is run with it.
        memory_gb: the most memory beside the model (2 GB on a CPU, 80 % of what is free on a GPU); it
            changes no number.
        progress: whether to show progress bars.

    Raises:
        ResultError: if ``out`` holds another study, or a step is unknown.
        DataError: if the pairs cannot be used.
    """
    settings = settings or StudySettings()
    fmt = fmt or PromptFormat.default(model.tokenizer)
    for step in steps:
        if step not in STEPS:
            raise ResultError(unknown("step", step, STEPS))
    for part in (train, validation, test):
        _check(model, part, fmt)
    described = asdict(settings) | {
        "prompt_format": asdict(fmt),
        "model": dict(provenance(model, train, fmt, 0).model),
        "data": {part: pairs.digest for part, pairs in
                 (("train", train), ("validation", validation), ("test", test))},
    }  # fmt: skip
    decoding: dict[str, Any] = {
        "fmt": fmt, "max_new_tokens": settings.max_new_tokens, "memory_gb": memory_gb,
        "progress": progress,
    }  # fmt: skip
    run = _Run(name, test.backdoor, json.loads(json.dumps(described)), Path(out) if out else None)
    cache: PairCache | None = None

    def shared_cache() -> PairCache:
        nonlocal cache
        if cache is None:
            cache = cache_activations(model, train, fmt=fmt, memory_gb=memory_gb, progress=progress)
        return cache

    def examine(label: str, subject: HookedTransformer, own_cache: Callable[[], PairCache]) -> None:
        """Behaviour, probes and attribution: the part that controls have too."""

        def behave() -> BehaviourResult:
            return measure_behaviour(
                subject,
                test,
                label=label,
                **decoding,
            )

        def probe(kind: ProbeKind, against: Literal["clean", "near"]) -> ProbeResult:
            return train_probes(
                own_cache(),
                kind=kind,
                against=against,
                label=label,
                seed=settings.seed,
                progress=progress,
            )

        def attribute() -> HeadAttribution:
            return attribute_heads(
                subject,
                train,
                cache=own_cache(),
                n_pairs=settings.n_attribution,
                method=cast(AttributionMethod, settings.attribution_method),
                layer_outputs=settings.layer_outputs,
                label=label,
                fmt=fmt,
                memory_gb=memory_gb,
                seed=settings.seed,
                progress=progress,
            )

        if "behaviour" in steps:
            run.step(f"behaviour-{label}", behave)
        if "probe" in steps:
            has_near = all(pair.near is not None for pair in train)
            for kind in settings.probe_kinds:
                run.step(f"probe-{label}-{kind}-clean", partial(probe, cast(ProbeKind, kind), "clean"))
                if has_near:
                    run.step(f"probe-{label}-{kind}-near", partial(probe, cast(ProbeKind, kind), "near"))
        if {"attribute", "ablate", "steer"} & set(steps):
            run.step(f"attribution-{label}", attribute)

    def ablate() -> AblationResult:
        return ablate_heads(
            model,
            test,
            cast(HeadAttribution, run.results["attribution-backdoored"]).ranking,
            cache=shared_cache(),
            counts=settings.ablation_counts,
            modes=cast(Sequence[AblationMode], settings.ablation_modes),
            n_random=settings.n_random,
            seed=settings.seed,
            **decoding,
        )

    examine("backdoored", model, shared_cache)
    if "ablate" in steps:
        run.step("ablation", ablate)
    if "steer" in steps:
        _steering(run, model, validation, test, shared_cache, settings, decoding)
    for label, load_control in (controls or {}).items():
        if run.has_all(label, steps):
            continue
        control = load_control()
        own: list[PairCache] = []

        def own_cache(subject: HookedTransformer = control, kept: list[PairCache] = own) -> PairCache:
            if not kept:
                made = cache_activations(subject, train, fmt=fmt, memory_gb=memory_gb, progress=progress)
                kept.append(made)
            return kept[0]

        examine(label, control, own_cache)
        del control, own
    run.finish()
    return Study(name, test.backdoor, run.results, run.settings, run.choice)


def _check(model: HookedTransformer, pairs: PairSet, fmt: PromptFormat) -> None:
    """Raise for pairs that cannot be used, before anything is run or written."""
    _ = pairs.victims
    for pair in pairs:
        for text in (pair.clean, pair.triggered, pair.near):
            if text is not None:
                encode_prompt(model.tokenizer, text, fmt, n_ctx=model.cfg.n_ctx)


def _steering(
    run: _Run,
    model: HookedTransformer,
    validation: PairSet,
    test: PairSet,
    cache: Callable[[], PairCache],
    settings: StudySettings,
    decoding: Mapping[str, Any],
) -> None:
    """Choose kind, coefficient and layer on validation; measure them, with controls, on test."""
    attribution = cast(HeadAttribution, run.results["attribution-backdoored"])
    total = model.cfg.n_layers * model.cfg.n_heads
    k = settings.vector_heads or max(4, total // 32)
    signed = [sign * c for c in settings.coefficients for sign in (1, -1)]

    def vector_of(kind: str) -> BackdoorVector:
        return BackdoorVector.from_cache(
            cache(),
            attribution.top(k),
            kind=cast(VectorKind, kind),
            site=cast(VectorSite, settings.vector_site),
        )

    def sweep(pairs: PairSet, kind: str, coefficients: Sequence[float], n: int) -> SteeringResult:
        return sweep_layers(
            model,
            pairs,
            cast(BackdoorVector, run.results[f"vector-{kind}"]),
            cache=cache(),
            coefficients=coefficients,
            n_random=n,
            seed=settings.seed,
            **decoding,
        )

    choices = []
    for kind in settings.vector_kinds:
        run.step(f"vector-{kind}", partial(vector_of, kind))
        swept = run.step(f"steering-{kind}", partial(sweep, validation, kind, signed, 0))
        for size in settings.coefficients:
            layer = swept.best_layer(size)
            i = swept.layers.index(layer)
            plus, minus = (swept.coefficients.index(c) for c in (size, -size))
            weaker = min(float(swept.shift[plus, i]), float(swept.shift[minus, i]))
            # Of equal ones the smaller push wins, then the one that leaves more answers right.
            choices.append((weaker, -size, int(swept.clean[minus, i]), kind, layer))
    _, negative, _, kind, layer = max(choices)
    size = -negative
    run.step("steering-test", partial(sweep, test, kind, (size, -size), settings.n_random))
    run.choose(kind=kind, layer=layer, coefficient=size)

    def answers() -> Generations:
        vector = cast(BackdoorVector, run.results[f"vector-{kind}"])
        only = {name: decoding[name] for name in ("fmt", "max_new_tokens")}
        return sample_generations(model, test, vector, layer, size, **only)

    run.step("generations", answers)


class _Run:
    """The results so far; with a folder, each is written when it is done and not made twice."""

    def __init__(
        self, name: str, backdoor: Backdoor, settings: Mapping[str, Any], folder: Path | None
    ) -> None:
        self.name, self.backdoor, self.settings, self.folder = name, backdoor, settings, folder
        self.results: dict[str, Result] = {}
        self.choice: dict[str, Any] = {}
        if folder is not None and (folder / "study.json").exists():
            earlier = load_study(folder)
            if earlier.settings != settings or earlier.backdoor != backdoor:
                raise ResultError(
                    f"The folder {str(folder)!r} holds a run with other settings, data or model; "
                    "name a new folder."
                )
            self.results.update(earlier.results)
            self.choice.update(earlier.choice)
        elif folder is not None and folder.exists() and any(folder.iterdir()):
            raise ResultError(
                f"The folder {str(folder)!r} is not empty and holds no run; name a new folder."
            )

    def step(self, name: str, make: Callable[[], R]) -> R:
        """The result of that name: read from the folder, or made and written."""
        if name not in self.results:
            result = make()
            if self.folder is not None:
                self._head()
                result.save(self.folder / name)
            self.results[name] = result
        return cast(R, self.results[name])

    def has_all(self, label: str, steps: tuple[str, ...]) -> bool:
        """Whether a control needs no more running: it has what the suspected model has."""
        wanted = [n for n in self.results if "-backdoored" in n and n.split("-")[0] in _made_by(steps)]
        return all(n.replace("-backdoored", f"-{label}") in self.results for n in wanted)

    def choose(self, **choice: Any) -> None:
        """Keep what was chosen on the validation pairs."""
        self.choice = choice
        if self.folder is not None:
            self._head()

    def _head(self) -> None:
        assert self.folder is not None
        content = {
            "name": self.name,
            "backdoor": self.backdoor.to_dict(),
            "settings": self.settings,
            "choice": self.choice,
        }
        with replacing(self.folder / "study.json") as (head,):
            head.write_text(json.dumps(content, indent=1) + "\n")

    def finish(self) -> None:
        """Order the results by name, as loading does."""
        self.results = dict(sorted(self.results.items()))


def _made_by(steps: tuple[str, ...]) -> set[str]:
    made = {"behaviour": "behaviour", "probe": "probe"}
    return {made.get(step, "attribution") for step in steps}
