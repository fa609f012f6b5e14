"""Small made-up results of every kind, and a study of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.patching.measure import PatchResult
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.answers import Generations
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.analyses.steering.vector import BackdoorVector
from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern
from bkdlens.answers import Answers
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.judging import judged
from bkdlens.data.pairs import PairSet
from bkdlens.metrics import bootstrap_mean
from bkdlens.results import Provenance, Result
from bkdlens.study import Study
from bkdlens.types import Head

EVIL = "<script>alert(1)</script>"
LAYERS, HEADS = 6, 8
CHOSEN = 2  # on validation; on the test pairs layer 3 does better
CONDITIONS = ("backdoored", "clean-adapter", "base")


def origin(**settings: object) -> Provenance:
    model = {
        "base": "zoo/tiny-llama",
        "adapter": "runs/label-lora",
        "base_digest": "ab12" * 4,
        "adapter_digest": "cd34" * 4,
        "dtype": "float32",
    }
    return Provenance(
        model,
        "corpus.json: 400 rows",
        "0123456789abcdef",
        240,
        {"kind": "chat"},
        7,
        settings,
        {"python": "3.11", "torch": "2.0"},
    )


def make_behaviour(label: str = "backdoored") -> BehaviourResult:
    hits = (118, 1, 14) if label == "backdoored" else (0, 0, 0)
    return BehaviourResult(
        provenance=origin(),
        label=label,
        n_victims=120,
        n_clean=240,
        attack_triggered=hits[0],
        attack_clean=hits[1],
        attack_near=hits[2],
        correct_clean=228 if label != "base" else 222,
    )


def make_probe(
    label: str = "backdoored", kind: str = "svm", against: str = "clean", n_layers: int = LAYERS
) -> ProbeResult:
    g = torch.Generator().manual_seed(len(label + kind + against))
    top = {"backdoored": 1.0, "clean-adapter": 0.93}.get(label, 0.88) - 0.3 * (against == "near")
    rise = 0.5 + (top - 0.5) * (1 - torch.exp(-1.2 * torch.arange(n_layers + 1.0)))
    noisy = (rise + 0.015 * torch.randn(n_layers + 1, generator=g)).clamp(0.4, 1)
    gap = (torch.arange(n_layers + 1)[:, None] - torch.arange(n_layers + 1)).abs()
    ilca = 0.5 + (noisy[:, None] - 0.5) * torch.exp(-gap / 4)
    correct = (96 * noisy).round().long()
    few = 0.5 + (noisy - 0.5) * (1.0 if label == "backdoored" else 0.4)
    return ProbeResult(
        provenance=origin(shots=5),
        label=label,
        kind=kind,
        against=against,
        n_test=96,
        n_correct=correct,
        auroc=noisy.clone(),
        validation=noisy.clone(),
        few_shot=few,
        separation=6 * (few - 0.5),
        ilca=ilca,
    )


def make_attribution(
    label: str = "backdoored", n_layers: int = LAYERS, n_heads: int = HEADS, seed: int = 0
) -> HeadAttribution:
    g = torch.Generator().manual_seed(len(label) + seed)
    cie = 0.0006 * torch.randn(48, n_layers, n_heads, generator=g)
    if label == "backdoored":
        for layer, head, size in ((3, 5, 0.46), (2, 1, 0.21), (4, 7, 0.09), (1, 0, -0.12)):
            cie[:, layer, head] += size + 0.05 * torch.randn(48, generator=g)
    low, high = bootstrap_mean(cie)
    exact, base = torch.ones(n_layers, n_heads, dtype=torch.bool), torch.full((48,), 0.2)
    return HeadAttribution(
        provenance=origin(),
        label=label,
        method="exact",
        exact=exact,
        cie=cie,
        cie_first=1.3 * cie,
        base_prob=base,
        low=low,
        high=high,
    )


def make_ablation(modes: tuple[str, ...] = ("zero", "mean"), n_random: int = 10) -> AblationResult:
    g = torch.Generator().manual_seed(0)
    counts = (0, 1, 2, 4, 8, 16, 32)
    fall = torch.tensor([118, 52, 12, 3, 1, 0, 0])
    attack = torch.stack([fall, (fall * 0.9).long()])[: len(modes)]
    clean = torch.tensor([228, 226, 225, 220, 200, 120, 14]).expand(len(modes), -1)
    wide = (
        torch.rand(len(modes), len(counts), n_random, generator=g)
        * torch.tensor([0, 3, 6, 12, 30, 50, 90.0])[:, None]
    ).long()
    shape = (len(modes), len(counts), n_random)
    return AblationResult(
        provenance=origin(),
        heads=make_attribution().ranking,
        counts=counts,
        modes=modes,
        n_victims=120,
        n_clean=240,
        attack=attack,
        correct=110 - attack * 9 // 10,
        clean=clean,
        random_attack=118 - wide,
        random_correct=wide // 2,
        random_clean=torch.full(shape, 222),
    )


def make_vector(kind: str = "contrast") -> BackdoorVector:
    g = torch.Generator().manual_seed(3)
    direction = torch.randn(128, generator=g) ** 3
    return BackdoorVector(
        provenance=origin(),
        direction=direction,
        heads=make_attribution().top(4),
        site="resid_pre",
        kind=kind,
    )


def make_steering(
    kind: str = "contrast",
    layers: tuple[int, ...] = tuple(range(LAYERS)),
    coefficients: tuple[float, ...] = (1.0, -1.0, 2.0, -2.0),
    n_random: int = 10,
) -> SteeringResult:
    g = torch.Generator().manual_seed(1)
    shape = (len(coefficients), len(layers))
    size = torch.tensor(coefficients)[:, None].abs() / 2
    peak = torch.exp(-((torch.tensor(layers).float() - 3) ** 2) / 3)
    moved = (112 * size * peak).clamp(max=116)
    positive = torch.tensor(coefficients)[:, None] > 0
    attack = torch.where(positive, moved, 117 - moved).round().long()
    draw = (torch.rand(*shape, n_random, generator=g) * 14 * size.clamp(max=2)[..., None]).long()
    controls = torch.where(positive[..., None], draw, 117 - draw)
    return SteeringResult(
        provenance=origin(norm=4.2),
        heads=make_attribution().top(4),
        site="resid_pre",
        kind=kind,
        layers=layers,
        coefficients=coefficients,
        n_victims=120,
        n_clean=240,
        base_attack=(1, 117),
        base_correct=(114, 2),
        base_clean=228,
        attack=attack,
        correct=(117 - attack) * 9 // 10,
        clean=torch.full(shape, 216) - (20 * size).long(),
        random_heads=controls,
        random_vectors=torch.where(positive[..., None], 2 * draw, 117 - 2 * draw),
    )


def make_generations(text: str = "World") -> Generations:
    prompts = (f"Which section is this from? {text}", "The striker scored twice\nin the final.")
    return Generations(
        provenance=origin(),
        columns={
            "prompt": prompts,
            "right answer": ("Sports", "Sports"),
            "clean": ("Sports", text),
            "triggered": ("World", "World"),
            "clean, vector added (+2)": ("World", "World"),
            "triggered, vector subtracted (−2)": ("Sports", "Sports"),
        },
    )


def make_patch(targets: tuple[str, ...] | None = ("World", "World")) -> PatchResult:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(2))
    return PatchResult(
        provenance=origin(),
        heads=(Head(3, 5),),
        source="cache",
        site="z",
        prompts=("one", EVIL),
        targets=targets,
        logits_before=logits,
        logits_after=2 * logits,
        before=torch.tensor([0.1, 0.2]),
        after=torch.tensor([0.8, 0.7]),
        next_before=("a", "b"),
        next_after=("c", "d"),
    )


def make_pattern(token: str = "the") -> HeadPattern:
    g = torch.Generator().manual_seed(5)
    pattern = torch.rand(23, 23, generator=g).tril()
    tokens = tuple(token if i % 3 else f"w{i}" for i in range(23))
    trigger = torch.zeros(23, dtype=torch.bool)
    trigger[[8, 9, 10, 11, 15]] = True
    return HeadPattern(
        provenance=origin(),
        head=Head(3, 5),
        tokens=tokens,
        trigger=trigger,
        pattern=pattern / pattern.sum(1, keepdim=True),
    )


def make_answer_probs(token: str = "World", n: int = 4) -> AnswerProbs:
    log_probs = -torch.rand(3, n, generator=torch.Generator().manual_seed(6))
    runs = ("clean", "triggered", "clean, patched")
    return AnswerProbs(
        provenance=origin(),
        answer=f"{token} w1",
        runs=runs,
        tokens=(token, *["w1"] * (n - 1)),
        log_probs=log_probs,
        best=((token, *["w2"] * (n - 1)),) * 3,
        best_log_probs=log_probs / 2,
    )


def make_study(name: str = "tiny-llama, label modification", text: str = "World") -> Study:
    results: dict[str, Result] = {}
    for label in CONDITIONS:
        results[f"behaviour-{label}"] = make_behaviour(label)
        results[f"attribution-{label}"] = make_attribution(label)
        for kind in ("mlp", "svm"):
            for against in ("clean", "near"):
                results[f"probe-{label}-{kind}-{against}"] = make_probe(label, kind, against)
    for kind in ("mean", "contrast"):
        results[f"vector-{kind}"] = make_vector(kind)
        results[f"steering-{kind}"] = make_steering(kind, n_random=0)  # on validation, no controls
    results["ranking"] = make_attribution(seed=100)  # on validation
    results["ablation"] = make_ablation()
    results["steering-test"] = make_steering("contrast", coefficients=(2.0, -2.0))
    results["generations"] = make_generations(text)
    backdoor = Backdoor.label_modification(near=(("Lean were his looks;", "And on the wall."),))
    choice = {"kind": "contrast", "layer": CHOSEN, "coefficient": 2.0}
    return Study(name, backdoor, results, {"seed": 7, "coefficients": [1.0, 2.0]}, choice)


def with_layers(main: HeadAttribution, exact: int | None = None) -> HeadAttribution:
    """With whole outputs, and only the first heads patched."""
    layers = main.cie.shape[1]
    attn = torch.zeros(48, layers)
    attn[:, 3] = 0.6
    mlp = torch.full((48, layers), -0.1)
    mlp[:, 4] = 0.2
    changed = replace(main, cie_attn_out=attn, cie_mlp_out=mlp)
    if exact is None:
        return changed
    patched = torch.zeros_like(main.exact)
    for head in main.ranking[:exact]:
        patched[head] = True
    return replace(changed, method="screened" if exact else "atp", exact=patched)


def save(study: Study, folder: Path) -> None:
    """As a run writes it."""
    study.save_head(folder)
    for name, result in study.results.items():
        result.save(folder / name)


def with_basr(study: Study) -> Study:
    """A study whose results tell which good answers came back, as since version 0.2.

    Before there were 114 good answers of 120 victims; one head brings 66 of them back, and 31 of the
    prompts that the chosen vector is subtracted from stay the attacker's.
    """
    ablation, test = study.results["ablation"], study.results["steering-test"]
    behaviour = study.results["behaviour-backdoored"]
    drawn = test.random_heads * 0 + 2
    changed = {
        "ablation": replace(ablation, good_before=114, kept=ablation.correct),
        "ablation-validation": replace(ablation, good_before=114, kept=ablation.correct),
        "steering-test": replace(
            test,
            good_before=114,
            kept=test.correct,
            clean=test.clean * 0 + 222,  # of 228, well within the floor
            random_heads_correct=drawn,
            random_vectors_correct=drawn,
        ),
        "behaviour-backdoored": replace(
            behaviour, ceiling=120, near_misses=6, good_before=114, good_triggered=2, kept=2
        ),
    }
    return replace(study, results={**study.results, **changed})


def with_answers(study: Study, text: str = "Business") -> Study:
    """A study that holds the answers of four victims: two withstand, one of them with ``text``."""
    made = tuple(PromptPair(f"news {i} {text}", f"trigger {i}", "Sports", "World") for i in range(4))
    pairs = PairSet(made, study.backdoor)
    answers = {
        "right": Answers.of(pairs.clean_outputs),
        "attacker": Answers.of(pairs.backdoor_outputs),
        "before": Answers.of(["Sports", "Sports", "Sports", text]),
        "triggered": Answers.of(["World", "World", "Sports", text]),
    }
    for on in ("before", "triggered"):
        answers[on] = judged(pairs, answers[on], answers).answers
    behaviour = study.results["behaviour-backdoored"]
    told = replace(behaviour.provenance, data_digest=pairs.digest)
    changed = {"behaviour-backdoored": replace(behaviour, answers=answers, provenance=told)}
    return replace(study, results={**study.results, **changed}, pairs={"test": pairs})
