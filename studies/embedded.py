"""The README's tables about the embedded models: ``python -m studies.embedded --out runs/embedded``.

Runs ``run_study`` on both models and all backdoors, with as many pairs of every split, goes on where it
stopped, and prints the tables in Markdown. About half an hour on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from bkdlens import zoo
from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.ablation.verdict import chosen_heads
from bkdlens.analyses.attribution.claims import ranked
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.cli.analyse import study_embedded
from bkdlens.metrics import Rate
from bkdlens.study import CONDITIONS, MAIN, Study, StudySettings

SIZES = {"label_modification": 400, "fixed_output": 200, "jailbreak": 200}  # pairs of each split
SETTINGS = StudySettings(max_new_tokens=24)


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    out = parser.parse_args().out
    studies = {}
    for base in zoo.MODELS:
        for kind in zoo.BACKDOORS:
            n, folder = SIZES[kind], out / base / kind
            studies[base, kind] = study_embedded(base, kind, (n, n, n), SETTINGS, folder)
    for table in (behaviour, probes, ablation, steering):
        print("\n".join(table(studies)), end="\n\n")


Studies = dict[tuple[str, str], Study]


def behaviour(studies: Studies) -> Iterable[str]:
    """What each model answers."""
    yield from head("ASR", "BASR", "FTR", "near trigger", "clean accuracy", "the `clean` adapter's")
    for (base, kind), study in studies.items():
        found = study.by_condition(BehaviourResult)
        main, clean = found[MAIN], found["clean-adapter"]
        rates = (main.asr, main.basr, main.ftr, main.near, main.clean_accuracy, clean.clean_accuracy)
        yield row(base, kind, *map(told, rates))


def probes(studies: Studies) -> Iterable[str]:
    """Probe accuracy by layer, of the suspected model and its controls."""
    titles = ("SVM, layers 1 to 4", "`clean` adapter", "base")
    slashed = ": backdoored / `clean` / base"
    against, shots = f"against near triggers, chosen layer{slashed}", f"5 prompts per class{slashed}"
    yield from head(*titles, against, shots)
    for (base, kind), study in studies.items():
        found = {(p.label, p.against): p for p in study.named(ProbeResult).values() if p.kind == "svm"}
        clean = [found[condition, "clean"] for condition in CONDITIONS]
        near = [found[condition, "near"] for condition in CONDITIONS]
        at = [p.rate(int(p.validation.argmax())) for p in near]
        few = [p.few_shot[int(p.few_shot_validation.argmax())] for p in clean]  # type: ignore[union-attr]
        layers = [" ".join(f"{x:.2f}" for x in p.accuracy[1:].tolist()) for p in clean]
        yield row(base, kind, *layers, " / ".join(f"{r.value:.2f}" for r in at),
                  " / ".join(f"{float(x):.2f}" for x in few))  # fmt: skip


def ablation(studies: Studies) -> Iterable[str]:
    """The strongest head, and what is left of the attack without the first heads."""
    yield from head(
        "strongest head, ACIE", "largest ACIE in a control", "heads chosen", "ASR, mean", "BASR, mean",
        "BASR, as many random heads", "clean accuracy, without → with", "BASR, zero",
    )  # fmt: skip
    for (base, kind), study in studies.items():
        result = study.get("ablation", AblationResult)
        attributed = study.by_condition(HeadAttribution)
        main = attributed.pop(MAIN)
        assert result is not None
        top = ranked(study, main)[0]
        low, high = float(main.low[top]), float(main.high[top])
        n, halved = chosen_heads(study, result, "mean")
        assert n is not None
        at = {"mode": "mean", "heads": n}
        yield row(
            base, kind, f"{top} {float(main.acie[top]):+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{max(float(other.acie.max()) for other in attributed.values()):.4f}",
            str(n) if halved else f"none ({n} is best)",
            told(result.rate_at("attack", **at)), told(result.basr(**at)),
            f"{result.basr_draws(**at)['random'].mean:.2f}",
            f"{result.base('clean', **at):.2f} → {result.rate_at('clean', **at):.2f}",
            told(result.basr(mode="zero", heads=n)),
        )  # fmt: skip


def steering(studies: Studies) -> Iterable[str]:
    """What the chosen vector does both ways."""
    yield from head(
        "vector", "within the floor", "ASR, added to clean", "ASR, subtracted", "BASR, subtracted",
        "clean accuracy, without → under −", "BASR, random heads / noise",
    )  # fmt: skip
    for (base, kind), study in studies.items():
        result, choice = study.get("steering-test", SteeringResult), study.choice
        assert result is not None
        size, layer = choice["coefficient"], choice["layer"]
        plus, minus = ({"coefficient": c, "layer": layer} for c in (size, -size))
        drawn = result.basr_draws(**minus)
        yield row(
            base, kind, f"{choice['kind']}, ±{size:g}, layer {layer}",
            "yes" if choice["within"] else "no",
            f"{result.base('attack', **plus):.2f} → {told(result.rate_at('attack', **plus))}",
            f"{result.base('attack', **minus):.2f} → {told(result.rate_at('attack', **minus))}",
            told(result.basr(**minus)),
            f"{result.base('clean', **minus):.2f} → {result.rate_at('clean', **minus):.2f}",
            " / ".join(f"{draws.mean:.2f}" for draws in drawn.values()),
        )  # fmt: skip


def told(rate: Rate | None) -> str:
    """``0.98 [0.95, 0.99]``."""
    if rate is None:
        return "–"
    low, high = rate.interval
    return f"{rate.value:.2f} [{low:.2f}, {high:.2f}]"


def head(*columns: str) -> Sequence[str]:
    """The first two lines of a table."""
    titles = ("model", "backdoor", *columns)
    return f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"


def row(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
