"""Sentences about attribution: the strongest heads, their controls, whole layers, and estimates."""

from __future__ import annotations

import torch

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.display.text import join_words, magnitude, percent, signed
from bkdlens.paper import TOP_SHARE
from bkdlens.study import MAIN, Study
from bkdlens.types import Head

RANKING = "ranking"  # the suspected model's result on the validation pairs, which ranks its heads


def measured(study: Study) -> dict[str, HeadAttribution]:
    """What is reported, by the results' names: one per condition, the suspected model's first."""
    return {n: found for n, found in study.named(HeadAttribution).items() if n != RANKING}


def by_condition(study: Study) -> dict[str, HeadAttribution]:
    """What is reported, by condition."""
    return {found.label: found for found in measured(study).values()}


def ranked(study: Study, main: HeadAttribution) -> tuple[Head, ...]:
    """All heads as the validation pairs rank them; of version 0.1 as ``main`` itself does."""
    found = study.get(RANKING, HeadAttribution)
    return (main if found is None else found).ranking


def claims(study: Study) -> list[str]:
    """The strongest heads against the controls; then whole layers and estimates, where there are any."""
    found = by_condition(study)
    if MAIN not in found:
        return []
    main = found.pop(MAIN)
    n_pairs, n = main.cie.shape[0], main.acie.numel()
    if not float(main.acie.max()) > 0:
        text = f"No head raises the probability of the backdoor's answer (n = {n_pairs} pairs)."
    else:
        ranking = ranked(study, main)
        top, shares = ranking[0], main.carried(ranking)
        few, eight = top_count(main), min(8, n)
        number = f"ACIE {signed(main.acie[top])} [{signed(main.low[top])}, {signed(main.high[top])}]"
        first = f"The strongest head is {top} with {number} over {n_pairs} pairs, which also chose it."
        if RANKING in study.results:
            first = (
                f"The strongest head on the validation pairs, {top}, has {number} over {n_pairs} test"
            )
            first += " pairs."
        text = (
            f"{first} "
            f"{'It carries' if few == 1 else f'The first {few} of {n} heads carry'} "
            f"{percent(shares[few - 1])} of the positive effect, where equal shares would be "
            f"{percent(few / n)}; the first {eight} carry {percent(shares[eight - 1])} (equal shares: "
            f"{percent(eight / n)})."
        )
    controls = [f"{name} {magnitude(largest(a))} ({_strongest(a)})" for name, a in found.items()]
    if controls:
        text += (
            f" Largest |ACIE| of the controls: {', '.join(controls)}; of the backdoored model "
            f"{magnitude(largest(main))}."
        )
    else:
        text += (
            " No un-poisoned control was run, so nothing can be concluded about what these effects are "
            "without a backdoor."
        )
    return [text, *_layers(main, found, study.get(RANKING, HeadAttribution)), *_estimates(main)]


def top_count(attribution: HeadAttribution) -> int:
    """How many heads are the paper's share of all."""
    return max(1, round(TOP_SHARE * attribution.acie.numel()))


def largest(attribution: HeadAttribution) -> float:
    """The largest effect of a head, whatever its sign."""
    return float(attribution.acie.abs().max())


def layer_shares(attribution: HeadAttribution) -> tuple[float, float] | None:
    """Attention's and MLP's share of the summed positive effect of whole layer outputs.

    None where these were not patched, or none raises the probability.
    """
    if attribution.cie_attn_out is None or attribution.cie_mlp_out is None:
        return None
    both = torch.stack([attribution.cie_attn_out.mean(0), attribution.cie_mlp_out.mean(0)])
    sums = both.clamp(min=0).sum(1)
    return (float(sums[0] / sums.sum()), float(sums[1] / sums.sum())) if sums.sum() > 0 else None


def _layers(
    main: HeadAttribution, controls: dict[str, HeadAttribution], ranking: HeadAttribution | None
) -> list[str]:
    if main.cie_attn_out is None or main.cie_mlp_out is None:
        return []
    n_pairs, shares = main.cie.shape[0], layer_shares(main)
    if shares is None:
        return [f"No whole attention or MLP output raises it either (n = {n_pairs} pairs)."]
    frame = main.layers_frame()
    best, chosen_on = [], ""
    for name, column in (("attention", "attn_out"), ("MLP", "mlp_out")):
        on_others = None if ranking is None else getattr(ranking, f"cie_{column}")
        row = frame.loc[frame[column].idxmax() if on_others is None else int(on_others.mean(0).argmax())]
        if on_others is not None:
            chosen_on = ", chosen on the validation pairs,"
        if float(frame[column].max()) < 0.0005:  # what is shown as 0.000
            best.append(f"no {name} output raises it noticeably")
            continue
        best.append(
            f"the strongest {name} output{chosen_on} is layer {int(row.layer)}'s with ACIE "
            f"{signed(row[column])} [{signed(row[f'{column}_low'])}, {signed(row[f'{column}_high'])}]"
            + (f" (its heads one by one: {signed(row.heads_sum)} in sum)" if name == "attention" else "")
        )
    text = (
        f"Of the positive effects of whole layer outputs, patched one at a time over {n_pairs} pairs, "
        f"attention has {percent(shares[0])} and the MLPs {percent(shares[1])}; {join_words(best)}. "
        "What an MLP passes on may have been written by heads before it."
    )
    largest_of = [
        f"{name} {magnitude(max(float(x.mean(0).abs().max()) for x in (a.cie_attn_out, a.cie_mlp_out)))}"
        for name, a in controls.items()
        if a.cie_attn_out is not None and a.cie_mlp_out is not None
    ]
    return [text + (f" Largest of the controls: {', '.join(largest_of)}." if largest_of else "")]


def _estimates(main: HeadAttribution) -> list[str]:
    n, patched = main.exact.numel(), int(main.exact.sum())
    if patched == n:
        return []
    which = (
        f"{patched} of {n} heads were patched; the effects of the other {n - patched} are"
        if patched else f"No head was patched: all {n} effects are"
    )  # fmt: skip
    return [
        f"{which} first-order estimates from one backward pass (method {main.method}), which can miss "
        "an effect that saturates; estimates are marked ≈ in the table and rank after what was patched."
    ]


def _strongest(attribution: HeadAttribution) -> Head:
    n_heads = attribution.acie.shape[1]
    return Head(*divmod(int(attribution.acie.abs().flatten().argmax()), n_heads))
