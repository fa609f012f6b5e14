"""Figures of heads: attribution with its controls, how few carry it, and patching."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.display.rates import PERCENT_AXIS
from bkdlens.display.style import (
    DIVERGING,
    INK,
    LINES,
    MUTED,
    condition_style,
    escape,
    finish,
    gap,
    index_ticks,
    model_note,
    numbers,
    rounded,
)
from bkdlens.metrics import bootstrap_mean
from bkdlens.results import figure


def acie_heatmap(attribution: HeadAttribution, *, first_token: bool = False, top: int = 8) -> go.Figure:
    """Average effect by layer (up) and head (across), the top heads outlined with their rank.

    Args:
        attribution: from :func:`bkdlens.attribute_heads`.
        first_token: show the effect on the answer's first token; ranks stay the whole answer's.
        top: how many heads are outlined.

    Returns:
        A heatmap of changes of probability, on a scale centred at 0.

    Examples:
        >>> fig = bkdlens.plot.acie_heatmap(heads, top=4)
    """
    return attribution_controls(attribution, (), first_token=first_token, top=top)


def attribution_controls(
    main: HeadAttribution,
    controls: Sequence[HeadAttribution],
    *,
    first_token: bool = False,
    top: int = 8,
) -> go.Figure:
    """Heatmaps side by side on one colour scale; ``main``'s top heads are outlined in all of them.

    Where ``main`` has the effects of whole layer outputs, these are a second row.

    Args:
        main: the suspected model's.
        controls: of un-poisoned models.
        first_token: show the effect on the answer's first token; ranks stay the whole answer's.
        top: how many heads are outlined.

    Returns:
        A heatmap of changes of probability per model, on one scale centred at 0.

    Examples:
        >>> fig = bkdlens.plot.attribution_controls(heads, [heads])
    """
    panels = [main, *controls]
    n_pairs, n_layers, n_heads = main.cie.shape
    with_layers = main.cie_attn_out is not None and not first_token
    fig = make_subplots(
        2 if with_layers else 1, len(panels), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=[escape(panel.label) for panel in panels] if controls else None,
        row_heights=[n_layers, 2] if with_layers else None, vertical_spacing=0.2,
    )  # fmt: skip
    values = [panel.acie_first if first_token else panel.acie for panel in panels]
    outputs = [_layer_outputs(panel) if with_layers else None for panel in panels]
    shown = [*values, *(output[0] for output in outputs if output is not None)]
    limit = max(1e-6, *(float(value.abs().max()) for value in shown))
    marked = main.top(top)
    outlines: list[dict[str, object]] = []
    what = "first-token ACIE" if first_token else "ACIE"
    for column, (panel, value) in enumerate(zip(panels, values, strict=True), start=1):
        low, high = panel.low, panel.high
        if first_token:
            low, high = bootstrap_mean(panel.cie_first, seed=panel.provenance.seed)
        rank = torch.zeros(value.shape)
        text = [["−" if x < -0.1 * limit else "" for x in row] for row in value.tolist()]
        for r, head in enumerate(panel.ranking, start=1):
            rank[head] = r
            if column == 1 and r <= top:
                text[head.layer][head.head] += str(r)
        fig.add_trace(
            go.Heatmap(
                z=rounded(value), customdata=rounded(torch.stack([low, high, rank], -1)),
                text=text, texttemplate="%{text}", textfont={"size": 10}, coloraxis="coloraxis",
                name=escape(panel.label), xgap=gap(n_heads), ygap=gap(n_heads),
                hovertemplate="<b>L%{y}H%{x}</b><br>" + what + " %{z:+.4f}<br>95 % interval "
                "[%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]<br>rank %{customdata[2]:d} of "
                f"{value.numel()} by ACIE",
            ),
            row=1, col=column,
        )  # fmt: skip
        if (output := outputs[column - 1]) is not None:
            mean, low, high = output
            fig.add_trace(
                go.Heatmap(
                    z=rounded(mean), customdata=rounded(torch.stack([low, high], -1)),
                    y=["attention", "MLP"], coloraxis="coloraxis", xgap=1, ygap=1, showlegend=False,
                    name=escape(panel.label),
                    hovertemplate="<b>%{y} output of layer %{x}</b><br>ACIE %{z:+.4f}<br>"
                    "95 % interval [%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]",
                ),
                row=2, col=column,
            )  # fmt: skip
        axis = "" if column == 1 else str(column)
        outlines += [
            {"type": "rect", "xref": f"x{axis}", "yref": f"y{axis}", "x0": head.head - 0.5,
             "x1": head.head + 0.5, "y0": head.layer - 0.5, "y1": head.layer + 0.5,
             "line": {"color": INK, "width": 1.6}}
            for head in marked
        ]  # fmt: skip
    fig.update_layout(shapes=outlines)
    fig.update_layout(plot_bgcolor=LINES)
    fig.update_xaxes(title_text="head", **index_ticks(n_heads), showgrid=False, ticks="")
    fig.update_yaxes(dtick=math.ceil(n_layers / 16), tick0=0, showgrid=False, ticks="")
    fig.update_yaxes(title_text="layer", row=1, col=1)
    if with_layers:
        fig.update_xaxes(title_text="layer, whole output", **index_ticks(n_layers), row=2)
        fig.update_yaxes(dtick=1, autorange="reversed", row=2)
    fig.update_layout(
        coloraxis={"cmin": -limit, "cmax": limit, "colorscale": DIVERGING,
                   "colorbar": {"title": {"text": "ACIE"}, "thickness": 12, "tickformat": "+.2~g",
                                "nticks": 7}}
    )  # fmt: skip
    answer = "the first token of the backdoor's answer" if first_token else "the backdoor's answer"
    return finish(
        fig,
        "Effect of each head on the first token" if first_token else "Effect of each head (ACIE)",
        f"{'' if controls else escape(main.label) + ' · '}{n_pairs} pairs · Δ probability of "
        f"{answer}{model_note(main)}<br>outlined: top {len(marked)} by ACIE, {escape(main.label)} · "
        "− marks negative" + _how(main),
        height=min(720, 210 + max(26 * n_layers, 180)) + 110 * with_layers,
    )


def _layer_outputs(attribution: HeadAttribution) -> tuple[torch.Tensor, ...] | None:
    """Mean and interval of the effects of whole outputs, ``[attention or MLP, layer]``."""
    both = attribution.cie_attn_out, attribution.cie_mlp_out
    if both[0] is None or both[1] is None:
        return None
    cie = torch.stack([both[0], both[1]], dim=1)
    return cie.mean(0), *bootstrap_mean(cie, seed=attribution.provenance.seed)


def _how(attribution: HeadAttribution) -> str:
    """What is estimated, where not everything is patched."""
    if attribution.method == "exact":
        return ""
    return (
        f" · {attribution.method}: {int(attribution.exact.sum())} of {attribution.exact.numel()} exact"
    )


def sparsity(attributions: Sequence[HeadAttribution]) -> go.Figure:
    """Share of the summed positive ACIE that the first heads carry, a line a condition.

    Args:
        attributions: one per condition.

    Returns:
        A line per condition, in per cent of its summed positive effect.

    Examples:
        >>> fig = bkdlens.plot.sparsity([heads])
    """
    fig = go.Figure()
    n = max(a.acie.numel() for a in attributions)
    for i, attribution in enumerate(attributions):
        colour, dash, _, _ = condition_style(attribution.label, i)
        share = rounded(100 * attribution.concentration)
        total = float(attribution.acie.clamp(min=0).sum())
        names = [str(head) for head in attribution.ranking]
        fig.add_trace(
            go.Scatter(
                x=list(range(1, len(share) + 1)), y=share, customdata=names, mode="lines",
                name=f"{escape(attribution.label)} (sum {total:.3g})",
                line={"color": colour, "dash": dash, "width": 2.2},
                hovertemplate="first %{x} heads carry %{y:.1f} %<br>the last of them: "
                f"%{{customdata}}<extra>{escape(attribution.label)}</extra>",
            )
        )  # fmt: skip
    fig.add_trace(
        go.Scatter(
            x=list(range(1, n + 1)), y=[round(100 * k / n, 3) for k in range(1, n + 1)],
            mode="lines", name="equal shares", hoverinfo="skip",
            line={"color": MUTED, "width": 1, "dash": "2px,3px"},
        )
    )  # fmt: skip
    fig.update_xaxes(title_text="number of heads, strongest first")
    if n > 128:  # a few heads of a thousand would be lost at the edge
        fig.update_xaxes(type="log", dtick="D1" if n < 1000 else 1)
    fig.update_yaxes(**PERCENT_AXIS, title_text="share of positive ACIE (%)")
    pairs = sorted({a.cie.shape[0] for a in attributions})
    return finish(
        fig, "How few heads carry the effect",
        f"{numbers(pairs)} pairs{model_note(attributions[0])} · a share of a tiny sum means little: "
        "see the sums",
        height=420,
    )  # fmt: skip


@figure.register
def _(result: HeadAttribution) -> go.Figure:
    return acie_heatmap(result)
