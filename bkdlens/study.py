"""A study: everything that was found out about one model and one backdoor, as a folder of results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.patching.measure import PatchResult
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.answers import Generations
from bkdlens.analyses.steering.measure import BackdoorVector, SteeringResult
from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern
from bkdlens.data.backdoor import Backdoor
from bkdlens.errors import DataError, ResultError, unknown
from bkdlens.results import Result, read_json

CONDITIONS = ("backdoored", "clean-adapter", "base")

KINDS: dict[str, type[Result]] = {
    kind.__name__: kind
    for kind in (
        AblationResult, AnswerProbs, BackdoorVector, BehaviourResult, Generations,
        HeadAttribution, HeadPattern, PatchResult, ProbeResult, SteeringResult,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Everything about one model and one backdoor; ``results`` by file name.

    The names: ``behaviour-<condition>``, ``probe-<condition>-<mlp|svm>-<clean|near>``,
    ``attribution-<condition>``, ``ablation``, ``vector-<mean|contrast>``,
    ``steering-<mean|contrast>`` (on the validation pairs, without random controls), ``steering-test``
    (the chosen kind and coefficient, on the test pairs, with them) and ``generations``. Conditions
    are ``backdoored`` and the controls ``clean-adapter`` and ``base``, where given. ``choice`` is the
    vector's kind, coefficient and layer as chosen on the validation pairs.
    """

    name: str
    backdoor: Backdoor
    results: Mapping[str, Result]
    settings: Mapping[str, Any]
    choice: Mapping[str, Any] = field(default_factory=dict)


def load_result(path: str | Path) -> Result:
    """Load any saved result, whatever its kind.

    Raises:
        ResultError: if there is none, or it is damaged.
    """
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".json", ".safetensors") else stem
    kind = read_json(stem).get("type")
    if kind not in KINDS:
        raise ResultError(unknown("kind of result", kind, KINDS))
    return KINDS[kind].load(stem)


def load_study(folder: str | Path) -> Study:
    """Load a run folder.

    Raises:
        ResultError: if it is not one.
    """
    folder = Path(folder)
    head = read_json(folder / "study")
    results = {
        path.stem: load_result(path)
        for path in sorted(folder.glob("*.json"))
        if path.name != "study.json"
    }
    try:
        backdoor = Backdoor.from_dict(head["backdoor"])
        return Study(head["name"], backdoor, results, head["settings"], head["choice"])
    except (KeyError, TypeError, DataError) as error:
        raise ResultError(f"{folder / 'study.json'} is damaged ({error}); make it again.") from None


def summary(study: Study) -> dict[str, Any]:
    """The headline numbers of a study as plain values for machines, rates with count and interval."""
    results, layer = study.results, study.choice.get("layer")
    out: dict[str, Any] = {"name": study.name, "backdoor": study.backdoor.behaviour}
    for label in CONDITIONS:
        behaviour = results.get(f"behaviour-{label}")
        if isinstance(behaviour, BehaviourResult):
            out.setdefault("behaviour", {})[label] = {
                "asr": behaviour.asr.to_dict(),
                "ftr": behaviour.ftr.to_dict(),
                "near": behaviour.near.to_dict() if behaviour.near else None,
                "clean_accuracy": behaviour.clean_accuracy.to_dict(),
            }
        heads = results.get(f"attribution-{label}")
        if isinstance(heads, HeadAttribution):
            out.setdefault("attribution", {})[label] = [
                {
                    "head": str(head),
                    "acie": float(heads.acie[head]),
                    "interval": [float(heads.low[head]), float(heads.high[head])],
                }
                for head in heads.top(8)
            ]
    for name, probe in results.items():
        if isinstance(probe, ProbeResult):
            layers = range(len(probe.n_correct))
            out.setdefault("probes", {})[name.removeprefix("probe-")] = [
                probe.rate(i).to_dict() for i in layers
            ]
    ablation = results.get("ablation")
    if isinstance(ablation, AblationResult):
        out["ablation"] = ablation.to_frame().to_dict("records")
    test = results.get("steering-test")
    if isinstance(test, SteeringResult):
        frame = test.to_frame()
        out["steering"] = frame[frame.layer == layer].to_dict("records") if layer is not None else None
    return out
