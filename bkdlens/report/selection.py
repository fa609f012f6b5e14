"""What to read in a study: results by condition, and which layer or number of heads is told."""

from __future__ import annotations

from typing import TypeVar

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.results import Result
from bkdlens.study import CONDITIONS, Study

R = TypeVar("R", bound=Result)
MAIN = CONDITIONS[0]
TOP_SHARE = 0.03  # the paper's 32 of 1,024 heads
HALF = 0.5  # an attack counts as broken when so much of it or less is left


def by_condition(study: Study, prefix: str, kind: type[R]) -> dict[str, R]:
    """The study's results of one kind by what follows the prefix, the main condition first."""
    found = {
        name.removeprefix(prefix): result
        for name, result in study.results.items()
        if name.startswith(prefix) and isinstance(result, kind)
    }
    order = {name: i for i, name in enumerate(CONDITIONS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def probes_by_kind(study: Study) -> dict[tuple[str, str], dict[str, ProbeResult]]:
    """Probes by (kind, against), each by condition."""
    groups: dict[tuple[str, str], dict[str, ProbeResult]] = {}
    for name, probe in by_condition(study, "probe-", ProbeResult).items():
        condition = name.removesuffix(f"-{probe.kind}-{probe.against}")
        groups.setdefault((probe.kind, probe.against), {})[condition] = probe
    order = {name: i for i, name in enumerate(CONDITIONS)}
    return {
        key: dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
        for key, found in sorted(groups.items(), key=lambda item: item[0][::-1])
    }


def best_probe_layer(probe: ProbeResult) -> int:
    """The layer that is best on the validation prompts, so that the test rate is not selected."""
    return int(probe.validation.argmax())


def chosen_layer(study: Study, result: SteeringResult) -> int | None:
    """The layer chosen on the validation pairs, where the study says one that was also tested."""
    layer = study.choice.get("layer")
    return layer if layer in result.layers else None


def steering_layer(study: Study, result: SteeringResult) -> int:
    """The layer whose numbers are the study's: the chosen one, or else the best of the result."""
    chosen = chosen_layer(study, result)
    if chosen is not None:
        return chosen
    sizes = [c for c in result.coefficients if c > 0 and -c in result.coefficients]
    if sizes:
        return result.best_layer(sizes[0])
    return result.layers[int(result.shift.amax(0).argmax())]


def fewest_heads(result: AblationResult, mode: str) -> int | None:
    """The smallest number of heads that leaves at most half of the attack."""
    start = result.rate("attack", mode, 0).value if 0 in result.counts else 1.0
    limit = HALF * start
    hit = [n for n in result.counts if n and result.rate("attack", mode, n).value <= limit]
    return hit[0] if hit and start else None
