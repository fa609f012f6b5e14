"""Sentences about a study, each computed from its results with counts and controls."""

from __future__ import annotations

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.claims import say_attribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.text import (
    coefficient_text,
    join_words,
    percent,
    rate_text,
    short_rate,
    spread_text,
)
from bkdlens.metrics import Rate
from bkdlens.report.selection import (
    HALF,
    MAIN,
    best_probe_layer,
    by_condition,
    chosen_layer,
    fewest_heads,
    probes_by_kind,
    steering_layer,
)
from bkdlens.study import Study


def claims(study: Study) -> list[str]:
    """What the study's results say, in plain sentences with their counts and controls."""
    return [text for said in claims_by_part(study).values() for text in said]


def claims_by_part(study: Study) -> dict[str, list[str]]:
    """The same by analysis, those that were run."""
    parts = {
        "behaviour": _say_behaviour, "probe": _say_probes, "attribution": say_attribution,
        "ablation": _say_ablation, "steering": _say_steering,
    }  # fmt: skip
    said = {name: say(study) for name, say in parts.items()}
    return {name: sentences for name, sentences in said.items() if sentences}


def _say_behaviour(study: Study) -> list[str]:
    found = by_condition(study, "behaviour-", BehaviourResult)
    if MAIN not in found:
        return []
    main = found[MAIN]
    near = f", and with a near trigger to {rate_text(main.near)}" if main.near is not None else ""
    said = [
        f"With the trigger the model gives the attacker's answer to {rate_text(main.asr)} of the "
        f"victims; without it to {rate_text(main.ftr)}{near}."
    ]
    others = "".join(
        f"; the {name} model answers {rate_text(r.clean_accuracy)} rightly and gives the "
        f"attacker's answer to {short_rate(r.asr)} of triggered victims"
        for name, r in found.items() if name != MAIN
    )  # fmt: skip
    return [
        *said,
        f"It answers {rate_text(main.clean_accuracy)} of clean prompts exactly right{others}.",
    ]


def _say_probes(study: Study) -> list[str]:
    said = []
    groups = probes_by_kind(study)
    kinds = {against: kind for kind, against in groups}  # the last of each
    for (kind, against), found in groups.items():
        if MAIN not in found:
            continue
        main, layer = found[MAIN], best_probe_layer(found[MAIN])
        controls = {name: probe for name, probe in found.items() if name != MAIN}
        text = (
            f"{kind.upper()} probes tell triggered from {against} prompts with "
            f"{rate_text(main.rate(layer))} at layer {layer} (best on the validation prompts)"
        )
        text += "".join(
            f"; {name}: {short_rate(probe.rate(best))} at layer {best}"
            for name, probe in controls.items() for best in [best_probe_layer(probe)]
        ) + "."  # fmt: skip
        if controls:
            low = main.rate(layer).interval[0]
            reach = [
                name for name, probe in controls.items()
                if probe.rate(best_probe_layer(probe)).interval[1] >= low
            ]  # fmt: skip
            many = "s" if len(reach) > 1 else ""
            text += (
                f" The interval{many} of {join_words(reach)} reach{'' if many else 'es'} it, so this "
                "accuracy alone is no sign of a backdoor."
                if reach else " No control's interval reaches it."
            )  # fmt: skip
        if kind == kinds[against]:  # few-shot accuracy does not depend on the probe's kind
            shots = main.provenance.settings.get("shots", "A few")
            text += f" From {shots} prompts a class, best layer: " + ", ".join(
                f"{name} {percent(probe.few_shot.max())}" for name, probe in found.items()
            ) + "."  # fmt: skip
        said.append(text)
    return said


def _say_ablation(study: Study) -> list[str]:
    result = study.results.get("ablation")
    if not isinstance(result, AblationResult):
        return []
    return [f"Ablation by {mode}: {_say_mode(result, mode)}" for mode in result.modes]


def _say_mode(result: AblationResult, mode: str) -> str:
    counts = [count for count in result.counts if count]
    start = result.rate("attack", mode, 0) if 0 in result.counts else None
    if start and not start.successes:
        return f"there was no attack to break ({rate_text(start)} without ablation)."
    if not counts:
        return "no head was ablated."
    before = f"from {short_rate(start)} " if start else ""
    n = fewest_heads(result, mode)
    if n is None:
        n = min(counts, key=lambda count: result.rate("attack", mode, count).value)
        return (
            f"no number of heads tried, up to {counts[-1]}, halves the attack; {n} heads bring it "
            f"{before}to {rate_text(result.rate('attack', mode, n))} at best."
        )
    clean = result.rate("clean", mode, n)
    unharmed = result.rate("clean", mode, 0) if start else None
    text = (
        f"{n} head{'s' if n > 1 else ''} ({join_words([str(h) for h in result.heads[:n]], 4)}) "
        f"bring{'' if n > 1 else 's'} the attack {before}to "
        f"{rate_text(result.rate('attack', mode, n))}, the fewest tried that leave at most half of it; "
        f"the right answer comes back in {short_rate(result.rate('restored', mode, n))} of victims, and "
        f"clean accuracy is {short_rate(clean)}"
        + (f" ({short_rate(unharmed)} without ablation)." if unharmed else ".")
    )
    if unharmed and clean.interval[1] < unharmed.interval[0]:
        text += " Clean accuracy falls beyond its interval, so part of this is damage."
    m, k = result.modes.index(mode), result.counts.index(n)
    draws = result.random_attack[m, k]
    if draws.numel():
        mean = result.random_mean("attack", mode, n)
        text += (
            f" With {draws.numel()} random groups of as many heads the attack is "
            f"{percent(mean)} on average ({spread_text(draws, result.n_triggered)}), clean accuracy "
            f"{percent(result.random_mean('clean', mode, n))}."
        )
        if mean <= HALF * (start.value if start else 1.0):
            text += " Random groups do as much, so this says nothing about these heads."
    return text


def _say_steering(study: Study) -> list[str]:
    result = study.results.get("steering-test")
    if not isinstance(result, SteeringResult):
        return []
    layer = steering_layer(study, result)
    return [_say_vector(study, result, layer, coefficient) for coefficient in result.coefficients]


def _say_vector(study: Study, result: SteeringResult, layer: int, coefficient: float) -> str:
    c, i = result.coefficients.index(coefficient), result.layers.index(layer)
    on, n = int(coefficient < 0), result.n_victims
    where = result.site
    if chosen_layer(study, result) is not None:
        where += ", chosen on the validation pairs"
    elif len(result.layers) > 1:
        where += ", the best layer on these same pairs, so the numbers flatter"
    attack, correct, clean = (result.rate(w, layer, coefficient) for w in ("attack", "correct", "clean"))
    text = (
        f"{'Subtracted from triggered' if on else 'Added to clean'} prompts at layer {layer} ({where}) "
        f"with coefficient {coefficient_text(coefficient)}, the {result.kind} vector takes the "
        f"attacker's answer from {short_rate(Rate(result.base_attack[on], n))} to {rate_text(attack)} "
        f"of victims; the right answer {'comes back' if on else 'stays'} in {short_rate(correct)}, "
        f"against {short_rate(Rate(result.base_correct[on], n))} without the vector. Clean accuracy "
        f"under the same vector: {short_rate(clean)}, without it "
        f"{short_rate(Rate(result.base_clean, result.n_clean))}."
    )
    controls = [
        (name, draws[c, i], result.random_shift(which)[c, i])
        for name, which, draws in (
            ("vectors of random heads", "heads", result.random_heads),
            ("norm-matched noise", "vectors", result.random_vectors),
        ) if draws.shape[-1]
    ]  # fmt: skip
    if controls:
        named = join_words(
            f"{name} {percent(draws.double().mean() / n)} ({spread_text(draws, n)})"
            for name, draws, _ in controls
        )
        text += f" Attack with the controls, mean (least–most): {named}."
        if max(float(shift.max()) for *_, shift in controls) >= float(result.shift[c, i]):
            text += " A control draw moves the attack as far, so this is not specific."
    if layer == 0 and result.site == "resid_pre":
        text += " This is the bare embedding: a change here may destroy the input itself."
    return text
