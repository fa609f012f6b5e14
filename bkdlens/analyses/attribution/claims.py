"""Sentences about attribution: the strongest heads, their controls, whole layers, and estimates."""

from __future__ import annotations

import torch

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.display.text import join_words, percent, signed
from bkdlens.paper import TOP_SHARE
from bkdlens.study import MAIN, Study
from bkdlens.types import Head


def claims(study: Study) -> list[str]:
    """The strongest heads against the controls; then whole layers and estimates, where there are any."""
    found = study.by_condition(HeadAttribution)
    if MAIN not in found:
        return []
    main = found.pop(MAIN)
    n_pairs, n = main.cie.shape[0], main.acie.numel()
    if not float(main.acie.max()) > 0:
        text = f"No head raises the probability of the backdoor's answer (n = {n_pairs} pairs)."
    else:
        top, shares = main.top(1)[0], main.concentration
        few, eight = top_count(main), min(8, n)
        text = (
            f"The strongest head is {top} with ACIE {signed(main.acie[top])} "
            f"[{signed(main.low[top])}, {signed(main.high[top])}] over {n_pairs} pairs. "
            f"{few} of {n} heads carr{'ies' if few == 1 else 'y'} {percent(shares[few - 1])} of the "
            f"positive effect, where equal shares would be {percent(few / n)}; the first {eight} carry "
            f"{percent(shares[eight - 1])} (equal shares: {percent(eight / n)})."
        )
    controls = [f"{name} {largest(a):.2g} ({_strongest(a)})" for name, a in found.items()]
    if controls:
        text += (
            f" Largest |ACIE| of the controls: {', '.join(controls)}; of the backdoored model "
            f"{largest(main):.2g}."
        )
    return [text, *_layers(main, found), *_estimates(main)]


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


def _layers(main: HeadAttribution, controls: dict[str, HeadAttribution]) -> list[str]:
    if main.cie_attn_out is None or main.cie_mlp_out is None:
        return []
    n_pairs, shares = main.cie.shape[0], layer_shares(main)
    if shares is None:
        return [f"No whole attention or MLP output raises it either (n = {n_pairs} pairs)."]
    frame = main.layers_frame()
    best = []
    for name, column in (("attention", "attn_out"), ("MLP", "mlp_out")):
        row = frame.loc[frame[column].idxmax()]
        best.append(
            f"the strongest {name} output is layer {int(row.layer)}'s with ACIE {signed(row[column])} "
            f"[{signed(row[f'{column}_low'])}, {signed(row[f'{column}_high'])}]"
            + (f" (its heads one by one: {signed(row.heads_sum)} in sum)" if name == "attention" else "")
        )
    text = (
        f"Of the positive effects of whole layer outputs, patched one at a time over {n_pairs} pairs, "
        f"attention has {percent(shares[0])} and the MLPs {percent(shares[1])}; {join_words(best)}. "
        "What an MLP passes on may have been written by heads before it."
    )
    largest_of = [
        f"{name} {max(float(x.mean(0).abs().max()) for x in (a.cie_attn_out, a.cie_mlp_out)):.2g}"
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
