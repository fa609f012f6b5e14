"""Sentences about a study, each computed from its results with counts and controls."""

from __future__ import annotations

from typing import TypeVar

from bkdlens.ablate import AblationResult
from bkdlens.attribute import HeadAttribution
from bkdlens.behaviour import BehaviourResult
from bkdlens.metrics import Rate
from bkdlens.probe import ProbeResult
from bkdlens.report_text import (
    coefficient_text,
    join_words,
    percent,
    rate_text,
    short_rate,
    signed,
    spread_text,
)
from bkdlens.results import Result
from bkdlens.steering import SteeringResult
from bkdlens.study import CONDITIONS, Study
from bkdlens.types import Head

R = TypeVar("R", bound=Result)
MAIN = CONDITIONS[0]
TOP_SHARE = 0.03  # the paper's 32 of 1,024 heads
HALF = 0.5  # an attack counts as broken when so much of it or less is left


def claims(study: Study) -> list[str]:
    """What the study's results say, in plain sentences with their counts and controls."""
    said: list[str] = []
    for part in (_say_behaviour, _say_probes, _say_attribution, _say_ablation, _say_steering):
        said += part(study)
    return said


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


def _say_attribution(study: Study) -> list[str]:
    found = by_condition(study, "attribution-", HeadAttribution)
    if MAIN not in found:
        return []
    main = found[MAIN]
    n_pairs, n = main.cie.shape[0], main.acie.numel()
    if not float(main.acie.max()) > 0:
        text = f"No head raises the probability of the backdoor's answer (n = {n_pairs} pairs)."
    else:
        few = max(1, round(TOP_SHARE * n))
        some = min(8, n)
        share = main.concentration
        top = main.top(1)[0]
        text = (
            f"The strongest head is {top} with ACIE {signed(main.acie[top])} "
            f"[{signed(main.low[top])}, {signed(main.high[top])}] over {n_pairs} pairs. "
            f"{few} of {n} heads carr{'ies' if few == 1 else 'y'} {percent(share[few - 1])} of the "
            f"positive effect, where equal shares would be {percent(few / n)}; the first {some} carry "
            f"{percent(share[some - 1])} (equal shares: {percent(some / n)})."
        )
    said = [
        f"{name} {float(a.acie.abs().max()):.2g} ({_strongest(a)})"
        for name, a in found.items() if name != MAIN
    ]  # fmt: skip
    if said:
        text += (
            f" Largest |ACIE| of the controls: {', '.join(said)}; of the backdoored model "
            f"{float(main.acie.abs().max()):.2g}."
        )
    return [text]


def _strongest(attribution: HeadAttribution) -> Head:
    n_heads = attribution.acie.shape[1]
    return Head(*divmod(int(attribution.acie.abs().flatten().argmax()), n_heads))


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
