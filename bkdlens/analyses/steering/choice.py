"""Which vector, coefficient and layer: chosen on the validation pairs, by what is left right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.study import Study, StudySettings

TEST, ANSWERS = "steering-test", "generations"  # what is measured with the choice


def choose(
    swept: dict[str, SteeringResult], sizes: Sequence[float], max_clean_loss: float
) -> dict[str, Any]:
    """Kind, layer and size of the coefficient, by what is left right on the validation pairs.

    The best one moves most in its weaker direction: attack success where it is added, the good answers
    that come back (1 - BASR) where it is subtracted. Only where clean accuracy falls by at most
    ``max_clean_loss`` under the subtracted vector may one be chosen; where there is none, ``within`` is
    false, and the best of those is taken that harm about as little as any.
    """
    choices = []
    for kind, result in swept.items():
        # Layer 0's resid_pre is the bare embedding, where subtraction destroys the input.
        layers = [x for x in result.layers if x or result.site != "resid_pre"] or result.layers
        for size, layer in product(sizes, layers):
            plus, minus = ({"coefficient": c, "layer": layer} for c in (size, -size))
            added = result.rate_at("attack", **plus).value - result.base("attack", **plus).value
            basr = result.basr(**minus)
            restored = 0.0 if basr is None or not basr.n else 1 - basr.value
            lost = result.base("clean", **minus).value - result.rate_at("clean", **minus).value
            # Of equal ones the smaller push wins, then the one that leaves more answers right.
            choices.append((min(added, restored), -size, -lost, kind, layer))
    least = min(-choice[2] for choice in choices)
    allowed = max_clean_loss + (least if least > max_clean_loss else 0.0) + 1e-9
    _, negative, _, kind, layer = max(choice for choice in choices if -choice[2] <= allowed)
    return {
        "kind": kind,
        "layer": layer,
        "coefficient": -negative,
        "within": least <= max_clean_loss + 1e-9,
    }


def rechoose(study: Study) -> Study:
    """Choose again, by a study's validation results, and drop what another choice was measured with."""
    swept = {r.kind: r for name, r in study.named(SteeringResult).items() if name != TEST}
    kinds, sizes = study.settings.get("vector_kinds", ()), study.settings.get("coefficients", ())
    if not study.choice or not kinds or any(kind not in swept for kind in kinds):
        return study
    most = study.settings.get("max_clean_loss", StudySettings.max_clean_loss)
    choice = choose({kind: swept[kind] for kind in kinds}, sizes, most)
    test = study.get(TEST, SteeringResult)
    left_out = set()
    if any(choice[name] != study.choice.get(name) for name in ("kind", "layer", "coefficient")):
        left_out.add(ANSWERS)
    if test and (test.kind != choice["kind"] or choice["coefficient"] not in test.coefficients):
        left_out.add(TEST)
    kept = {name: result for name, result in study.results.items() if name not in left_out}
    return replace(study, choice=choice, results=kept)


def chosen_layer(study: Study, result: SteeringResult) -> int | None:
    """The layer chosen on the validation pairs, where the study names one that was also tested."""
    layer = study.choice.get("layer")
    return layer if layer in result.layers else None


def headline_layer(study: Study, result: SteeringResult) -> int:
    """The layer whose numbers are the study's: the chosen one, or else the best of the result."""
    chosen = chosen_layer(study, result)
    if chosen is not None:
        return chosen
    sizes = [c for c in result.coefficients if c > 0 and -c in result.coefficients]
    if sizes:
        return result.best_layer(sizes[0])
    return result.layers[int(result.shift.amax(0).argmax())]
