"""Figures of heads: attribution with its controls, and how few heads carry it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.display.heatmaps import BARE, DIVERGING, box, gaps, index_ticks, share_colours, written
from bkdlens.display.rates import PERCENT_AXIS
from bkdlens.display.style import FAINT, escape, finish, model_note, numbers, rounded, style_of
from bkdlens.metrics import bootstrap_mean
from bkdlens.results import figure


@figure.register
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
    ranking: HeadAttribution | None = None,
) -> go.Figure:
    """Heatmaps side by side on one colour scale; ``main``'s top heads are outlined in all of them.

    Where ``main`` has the effects of whole layer outputs, these are a second row.

    Args:
        main: the suspected model's attribution.
        controls: those of un-poisoned models.
        first_token: show the effect on the answer's first token; ranks stay the whole answer's.
        top: how many heads are outlined.
        ranking: the suspected model's attribution on other pairs, which ranks its heads; ``main``
            itself for None.

    Returns:
        A heatmap of changes of probability per model, on one scale centred at 0.

    Examples:
        >>> fig = bkdlens.plot.attribution_controls(heads, [heads])
    """
    panels = [main, *controls]
    n_pairs, n_layers, n_heads = main.cie.shape
    with_layers = main.cie_attn_out is not None and not first_token
    rows = {"rows": 2, "row_heights": [n_layers, 2]} if with_layers else {"rows": 1}
    titles = [escape(panel.label) for panel in panels] if controls else None
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.2}
    fig = make_subplots(cols=len(panels), shared_yaxes=True, subplot_titles=titles, **rows, **spacing)
    heads = [_head_effects(panel, first_token) for panel in panels]
    outputs = [_layer_effects(panel) if with_layers else None for panel in panels]
    limit = max(1e-6, *(float(effects[0].abs().max()) for effects in [*heads, *outputs] if effects))
    ranks_of = [panel if panel is not main or ranking is None else ranking for panel in panels]
    outlined = ranks_of[0].top(top)
    what = "first-token ACIE" if first_token else "ACIE"
    columns = enumerate(zip(panels, heads, outputs, ranks_of, strict=True), start=1)
    for column, (panel, effects, whole, ranker) in columns:
        name, values = escape(panel.label), effects[0]
        ranks = torch.zeros(values.shape)
        text = [["−" if x < -0.1 * limit else "" for x in row] for row in values.tolist()]
        for rank, head in enumerate(ranker.ranking, start=1):
            ranks[head] = rank
            if column == 1 and rank <= top:
                text[head.layer][head.head] += str(rank)
        of = f"<br>rank %{{customdata[2]:d}} of {values.numel()} by ACIE{_elsewhere(ranker, panel)}"
        heat = _heatmap((*effects, ranks), "L%{y}H%{x}", what, of, name=name, **gaps(n_heads))
        fig.add_trace(heat.update(written(text, 10)), row=1, col=column)
        if whole is not None:
            heat = _heatmap(whole, "%{y} output of layer %{x}", "ACIE", name=name)
            heat.update(y=["attention", "MLP"], showlegend=False, **gaps(1))
            fig.add_trace(heat, row=2, col=column)
        for head in outlined:
            fig.add_shape(box(head.head, head.layer, 1.6), row=1, col=column)
    fig.update_xaxes(title_text="head", **index_ticks(n_heads), **BARE)
    fig.update_yaxes(dtick=math.ceil(n_layers / 16), tick0=0, **BARE)
    fig.update_yaxes(title_text="layer", row=1, col=1)
    if with_layers:
        fig.update_xaxes(title_text="layer, whole output", **index_ticks(n_layers), row=2)
        fig.update_yaxes(dtick=1, autorange="reversed", row=2)
    share_colours(fig, -limit, limit, DIVERGING, "ACIE", tickformat="+.2~g", nticks=7)
    label = escape(main.label)
    model, estimated = "" if controls else f"{label} · ", ""
    if main.method != "exact":
        estimated = f" · {main.method}: {int(main.exact.sum())} of {main.exact.numel()} exact"
    answer = "the first token of the backdoor's answer" if first_token else "the backdoor's answer"
    subtitle = (
        f"{model}{n_pairs} pairs · Δ probability of {answer}{model_note(main)}<br>"
        f"outlined: top {len(outlined)} by ACIE{_elsewhere(ranks_of[0], main)}, {label} · "
        f"− marks negative{estimated}"
    )
    title = "Effect of each head on the first token" if first_token else "Effect of each head (ACIE)"
    height = min(720, 210 + max(26 * n_layers, 180)) + 110 * with_layers
    return finish(fig, title, subtitle, height)


def _elsewhere(ranker: HeadAttribution, shown: HeadAttribution) -> str:
    return "" if ranker is shown else f" on {ranker.cie.shape[0]} other pairs"


def _head_effects(attribution: HeadAttribution, first_token: bool) -> tuple[torch.Tensor, ...]:
    """Mean and interval of the effects of heads, ``[layer head]`` each."""
    if not first_token:
        return attribution.acie, attribution.low, attribution.high
    interval = bootstrap_mean(attribution.cie_first, seed=attribution.provenance.seed)
    return attribution.acie_first, *interval


def _layer_effects(attribution: HeadAttribution) -> tuple[torch.Tensor, ...] | None:
    """Mean and interval of the effects of whole outputs, ``[attention or MLP, layer]`` each."""
    if attribution.cie_attn_out is None or attribution.cie_mlp_out is None:
        return None
    cie = torch.stack([attribution.cie_attn_out, attribution.cie_mlp_out], dim=1)
    return cie.mean(0), *bootstrap_mean(cie, seed=attribution.provenance.seed)


def _heatmap(
    data: tuple[torch.Tensor, ...], where: str, what: str, after: str = "", **style: Any
) -> go.Heatmap:
    """Mean effects, with the interval and what else is in ``data`` for the hover text."""
    interval = "95 % interval [%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]"
    hover = f"<b>{where}</b><br>{what} %{{z:+.4f}}<br>{interval}{after}"
    style |= {"customdata": rounded(torch.stack(data[1:], -1)), "hovertemplate": hover}
    return go.Heatmap(z=rounded(data[0]), coloraxis="coloraxis", **style)


def sparsity(
    attributions: Sequence[HeadAttribution], *, ranking: HeadAttribution | None = None
) -> go.Figure:
    """Share of the summed positive ACIE that the first heads carry, a line per condition.

    Args:
        attributions: one per condition.
        ranking: the first one's attribution on other pairs, in whose order its heads are summed; its
            own order for None, as of all others.

    Returns:
        A line per condition, in per cent of its summed positive effect.

    Examples:
        >>> fig = bkdlens.plot.sparsity([heads])
    """
    fig = go.Figure()
    n = max(a.acie.numel() for a in attributions)
    for i, attribution in enumerate(attributions):
        colour, dash, _, _ = style_of(attribution.label, i)
        heads = (attribution if i or ranking is None else ranking).ranking
        share, label = rounded(100 * attribution.carried(heads)), escape(attribution.label)
        line = go.Scatter(x=list(range(1, len(share) + 1)), y=share, mode="lines")
        line.line = {"color": colour, "dash": dash, "width": 2.2}
        line.name = f"{label} (sum {float(attribution.acie.clamp(min=0).sum()):.3g})"
        line.customdata = [str(head) for head in heads]
        carried = "first %{x} heads carry %{y:.1f} %<br>the last of them: %{customdata}"
        fig.add_trace(line.update(hovertemplate=f"{carried}<extra>{label}</extra>"))
    x = list(range(1, n + 1))
    y = [round(100 * k / n, 3) for k in x]
    fig.add_scatter(x=x, y=y, mode="lines", name="equal shares", hoverinfo="skip", line=FAINT)
    fig.update_xaxes(title_text="number of heads, strongest first")
    if n > 128:  # a few heads of a thousand would be lost at the edge
        fig.update_xaxes(type="log", dtick="D1" if n < 1000 else 1)
    fig.update_yaxes(**PERCENT_AXIS, title_text="share of positive ACIE (%)")
    pairs = f"{numbers(a.cie.shape[0] for a in attributions)} pairs{model_note(attributions[0])}"
    if ranking is not None:
        first = attributions[0]
        pairs += f" · {escape(first.label)} ranked{_elsewhere(ranking, first)}, the others on these"
    subtitle = f"{pairs} · a share of a tiny sum means little: see the sums"
    return finish(fig, "How few heads carry the effect", subtitle, height=420)
