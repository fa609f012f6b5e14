"""What stands behind each claim: the settings it was measured with, its counts, its controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.text import coefficient_text, join_words, plain_json
from bkdlens.report.claims import claims_by_part
from bkdlens.report.selection import MAIN, by_condition, probes_by_kind
from bkdlens.results import Result
from bkdlens.study import Study

NO_CONTROL = "none was run, so the effect stands alone"


@dataclass(frozen=True)
class Basis:
    """What the claims of one analysis rest on, as three short texts."""

    settings: str
    counts: str
    controls: str


@dataclass(frozen=True)
class Finding:
    """The claims of one analysis, with their common basis."""

    part: str
    claims: tuple[str, ...]
    basis: Basis


def findings(study: Study) -> list[Finding]:
    """The claims of a study, each analysis with its settings, counts and controls."""
    make = {
        "behaviour": _behaviour, "probe": _probes, "attribution": _attribution,
        "ablation": _ablation, "steering": _steering,
    }  # fmt: skip
    return [
        Finding(part, tuple(said), make[part](study)) for part, said in claims_by_part(study).items()
    ]


def _behaviour(study: Study) -> Basis:
    found = by_condition(study, "behaviour-", BehaviourResult)
    main = found[MAIN]
    near = ["near trigger"] if main.near is not None else []
    return Basis(
        f"greedy decoding{_given(main, 'max_new_tokens')}",
        f"{main.n_victims} victims, {main.n_clean} clean prompts{_data(main)}",
        _controls([*near, *_others(found)]),
    )


def _probes(study: Study) -> Basis:
    groups = probes_by_kind(study)
    main = next(found[MAIN] for found in groups.values() if MAIN in found)
    others = [name for found in groups.values() for name in _others(found)]
    near = ["probes against near triggers"] if any(a == "near" for _, a in groups) else []
    return Basis(
        f"residual stream at the last prompt token{_given(main, 'split', 'shots')}",
        f"{main.n_test} test prompts a probe, half of them triggered{_data(main)}",
        _controls([*near, *dict.fromkeys(others)]),
    )


def _attribution(study: Study) -> Basis:
    found = by_condition(study, "attribution-", HeadAttribution)
    main = found[MAIN]
    named = ("site", "source", "victims_only", "max_answer_tokens", "confirm")
    return Basis(
        f"last prompt token, prefill only; method {main.method}{_given(main, *named)}",
        f"{main.cie.shape[0]} pairs, {main.acie.numel()} heads, 95 % bootstrap over pairs{_data(main)}",
        _controls(_others(found)),
    )


def _ablation(study: Study) -> Basis:
    result = study.results["ablation"]
    assert isinstance(result, AblationResult)
    n = result.random_attack.shape[-1]
    return Basis(
        f"last prompt token, prefill only; {join_words(result.modes)}; "
        f"{', '.join(map(str, result.counts))} heads{_given(result, 'max_new_tokens')}",
        f"{result.n_triggered} triggered victims, {result.n_clean} clean prompts{_data(result)}",
        _controls([f"{n} random groups of as many heads"] if n else []),
    )


def _steering(study: Study) -> Basis:
    result = study.results["steering-test"]
    assert isinstance(result, SteeringResult)
    controls = [
        f"{draws.shape[-1]} {name}"
        for name, draws in (
            ("vectors of random heads", result.random_heads),
            ("norm-matched noise vectors", result.random_vectors),
        ) if draws.shape[-1]
    ]  # fmt: skip
    sizes = join_words(coefficient_text(c) for c in result.coefficients)
    return Basis(
        f"last prompt token, prefill only; {result.kind} vector of "
        f"{join_words([str(h) for h in result.heads], 4)} at {result.site}, coefficients {sizes}"
        + _given(result, "max_new_tokens"),
        f"{result.n_victims} victims, {result.n_clean} clean prompts{_data(result)}",
        _controls(controls),
    )


def _others(found: Mapping[str, Any]) -> list[str]:
    return [f"{name} model" for name in found if name != MAIN]


def _controls(names: list[str]) -> str:
    return join_words(names) or NO_CONTROL


def _given(result: Result, *names: str) -> str:
    """The named settings that are set, and the seed."""
    settings = result.provenance.settings
    said = [f"; {n.replace('_', ' ')} {plain_json(settings[n])}" for n in names
            if settings.get(n) is not None]  # fmt: skip
    return "".join(said) + f"; seed {result.provenance.seed}"


def _data(result: Result) -> str:
    digest = result.provenance.data_digest
    return f" (data {digest[:8]})" if digest else ""
