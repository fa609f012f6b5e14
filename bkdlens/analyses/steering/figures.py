"""Figures of the backdoor vector: its components, every layer, and one layer with every draw."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from bkdlens.analyses.steering.answers import Generations
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.analyses.steering.vector import BackdoorVector
from bkdlens.counts import Draws
from bkdlens.display import rates, style
from bkdlens.errors import ChoiceError
from bkdlens.results import figure
from bkdlens.types import name_heads

# The names of each count without a vector and with one.
NAMES = {
    "attack": ("attack, no vector", "attack success"),
    "correct": ("right answer, no vector", "right answer (kept, restored)"),
    "clean": ("clean accuracy, no vector", "clean accuracy"),
}
# Each control's name in figures, the colour of its draws, and the colour and dash of its band.
CONTROLS = {
    "random heads": ("attack, vectors of random heads", style.MUTED, style.GREY, "2px,3px"),
    "noise": ("attack, norm-matched noise", style.PURPLE, style.PURPLE, "4px,2px,1px,2px"),
}


def names(result: SteeringResult) -> dict[str, tuple[str, str]]:
    """The names of each count, clean answers by what they are compared with."""
    return NAMES | {"clean": (f"{result.clean_name}, no vector", result.clean_name)}


def steering_by_layer(
    result: SteeringResult, *, chosen: int | None = None, panel_height: int = 270
) -> go.Figure:
    """The vector at every layer: added to clean prompts (left), subtracted from triggered (right).

    A row for each size of the coefficient; the bands are the attack success with vectors of random
    heads and with norm-matched noise, from the least to the largest draw, where there are any.

    Args:
        result: from :func:`bkdlens.sweep_layers`.
        chosen: a layer that was chosen on other pairs, to be marked.
        panel_height: of each row, in pixels.

    Returns:
        Rates in per cent by layer, with the spread of the controls.

    Raises:
        ChoiceError: for a chosen layer that was not run.

    Examples:
        >>> swept = bkdlens.sweep_layers(model, test, vector, layers=[1, 2], n_random=1)
        >>> fig = bkdlens.plot.steering_by_layer(swept, chosen=2)
    """
    if chosen is not None and chosen not in result.layers:
        raise ChoiceError("layer in this result:", chosen, result.layers)
    fig, panels, rows = _grid(result)
    x = result.layers
    label = {"y": 50, "textangle": -90, "font": style.SMALL}
    for coefficient, at in panels.items():
        for trace in _layer_traces(result, coefficient, coefficient == result.coefficients[0]):
            fig.add_trace(trace, **at)
        if result.site == "resid_pre" and 0 in x:
            fig.add_vrect(x0=-0.5, x1=0.5, fillcolor="#eef1f4", line_width=0, layer="below", **at)
            fig.add_annotation(text="bare embedding", x=0, xshift=-10, **label, **at)
        if chosen is not None:
            fig.add_vline(x=chosen, line={"color": style.INK, "width": 1.2, "dash": "4px,3px"}, **at)
            fig.add_annotation(text="chosen on validation", x=chosen, xshift=9, **label, **at)
    fig.update_xaxes(dtick=math.ceil(len(x) / 16), range=[min(x) - 0.5, max(x) + 0.5])
    fig.update_xaxes(title_text=f"layer ({style.escape(result.site)})", row=rows)
    title = f"Steering with the {style.escape(result.kind)} vector, by layer"
    return style.finish(fig, title, _note(result), height=150 + panel_height * rows)


def steering_at(result: SteeringResult, layer: int | None = None) -> go.Figure:
    """The vector at one layer beside its controls, every draw a dot; panels as in the sweep.

    Args:
        result: from :func:`bkdlens.sweep_layers`.
        layer: one of the result's; its first for None.

    Returns:
        Rates in per cent with 95 % intervals, and every draw of the controls.

    Raises:
        ChoiceError: for a layer that was not run.

    Examples:
        >>> swept = bkdlens.sweep_layers(model, test, vector, layers=[2], n_random=1)
        >>> fig = bkdlens.plot.steering_at(swept)
    """
    layer = result.layers[0] if layer is None else layer
    fig, panels, rows = _grid(result)
    first_right = 2 + len(result.controls)  # where the attack ends and the correct answers begin
    starts = {"attack": 0, "correct": first_right, "clean": first_right + 2}
    for coefficient, panel in panels.items():
        at: dict[str, Any] = {"coefficient": coefficient, "layer": layer}
        for what, x in starts.items():
            (before, after), (colour, _, symbol) = names(result)[what], rates.QUANTITIES[what]
            untouched, steered = result.base(what, **at), result.rate_at(what, **at)
            dots = (x, before, untouched, f"{symbol}-open"), (x + 1, after, steered, symbol)
            for place, name, rate, marker in dots:
                trace = rates.rate_trace([place], [rate], name, name=name, mode="markers")
                trace.update(marker={"color": colour, "symbol": marker, "size": 10}, showlegend=False)
                trace.error_y.color = colour
                fig.add_trace(trace, **panel)
        for x, (control, draws) in enumerate(result.draws("attack", **at).items(), start=2):
            for trace in _draw_dots(x, draws, *CONTROLS[control][:2]):
                fig.add_trace(trace, **panel)
    controls = [control.replace(" ", "<br>") for control in result.controls]
    ticks = ["no<br>vector", "<b>vector</b>", *controls]
    ticks += ["right,<br>none", "right,<br>vector", "clean,<br>none", "clean,<br>vector"]
    fig.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, range=[-0.6, len(ticks) - 0.4])
    fig.update_xaxes(showgrid=False, showticklabels=True, tickangle=0, tickfont={"size": 11})
    fig.add_vline(x=first_right - 0.5, line={"color": style.EDGE, "width": 1})
    bare = " (the bare embedding)" if layer == 0 and result.site == "resid_pre" else ""
    title = f"Steering with the {style.escape(result.kind)} vector at layer {layer}{bare}"
    subtitle = f"{_note(result)} · left of the line: attack success"
    return style.finish(fig, title, subtitle, height=150 + 270 * rows)


@figure.register
def vector(result: BackdoorVector, *, top: int = 40) -> go.Figure:
    """The ``top`` largest components of a backdoor vector, sorted by size.

    Args:
        result: the vector.
        top: how many components are drawn.

    Returns:
        Bars in the units of the residual stream.

    Examples:
        >>> fig = bkdlens.plot.vector(vector)
    """
    direction = result.direction.double()
    order = direction.abs().argsort(descending=True, stable=True)[:top]
    shown, kind = direction[order], style.escape(result.kind)
    share = 100 * float(shown.square().sum() / direction.square().sum().clamp(min=1e-30))
    bars = go.Bar(x=[str(i) for i in order.tolist()], y=style.rounded(shown), name=kind)
    bars.marker = {"color": [style.ORANGE if value >= 0 else style.BLUE for value in shown.tolist()]}
    fig = go.Figure(bars.update(hovertemplate="component %{x}<br>%{y:+.4f}<extra></extra>"))
    fig.update_xaxes(title_text="component of the residual stream", type="category", showgrid=False)
    fig.update_xaxes(tickangle=-90, tickfont={"size": 10})
    fig.update_yaxes(title_text="value", zeroline=True, zerolinecolor=style.EDGE)
    subtitle = (
        f"{len(result.heads)} heads ({name_heads(result.heads)}) · norm {result.norm:.2f} · the "
        f"{len(shown)} largest of {len(direction)} carry {share:.0f} % of its squared length"
    )
    return style.finish(fig, f"Largest components of the {kind} vector", subtitle, height=380)


@figure.register
def generations(result: Generations) -> go.Figure:
    """Answers side by side as a table; texts are escaped.

    Args:
        result: from :func:`bkdlens.sample_generations`.

    Returns:
        A table, one row per prompt.

    Examples:
        >>> answers = bkdlens.sample_generations(model, test, vector, 2, 1.0, n=2)
        >>> fig = bkdlens.plot.generations(answers)
    """
    columns = [[style.escape(text).replace("\n", "<br>") for text in c] for c in result.columns.values()]
    titles, ruled = [f"<b>{style.escape(title)}</b>" for title in result.columns], {"color": style.LINES}
    header = {"values": titles, "align": "left", "fill": {"color": "#eef1f4"}, "line": ruled}
    cells = {"values": columns, "align": "left", "fill": {"color": "#ffffff"}, "line": ruled}
    fig = go.Figure(go.Table(header=header, cells=cells | {"height": 26}))
    n = len(columns[0]) if columns else 0
    subtitle = f"{n} prompts{style.model_note(result)} · greedy decoding"
    return style.finish(fig, "Answers side by side", subtitle, height=200 + 90 * n)


@figure.register
def _(result: SteeringResult) -> go.Figure:
    return steering_at(result) if len(result.layers) == 1 else steering_by_layer(result)


def _grid(result: SteeringResult) -> tuple[go.Figure, dict[float, dict[str, int]], int]:
    """An empty figure, each coefficient's panel in it, and its rows.

    There is a row for each size of the coefficient, with + on the left and − on the right.
    """
    sizes = sorted({abs(c) for c in result.coefficients})
    panels = {c: {"row": 1 + sizes.index(abs(c)), "col": 1 + (c < 0)} for c in result.coefficients}
    rows, titles = len(sizes), []
    for size in sizes:
        titles.append(f"added to clean prompts (+{size:g})" if size in panels else "")
        titles.append(f"subtracted from triggered (−{size:g})" if -size in panels else "")
    spacing = {"horizontal_spacing": 0.05, "vertical_spacing": 0.22 / (rows + 1)}
    shared = {"shared_xaxes": rows > 1, "shared_yaxes": True}
    fig = make_subplots(rows, 2, subplot_titles=titles, **shared, **spacing)
    fig.update_yaxes(**rates.PERCENT_AXIS)
    fig.update_yaxes(title_text="rate (%)", col=1)
    return fig, panels, rows


def _layer_traces(result: SteeringResult, coefficient: float, legend: bool) -> list[go.Scatter]:
    """Bands of the controls, lines without a vector, and the rates by layer, of one coefficient."""
    where, i = "layer %{x}", result.coefficients.index(coefficient)
    x, n = result.layers, max(1, result.n_victims)
    traces: list[go.Scatter] = []
    for control, drawn in reversed(result.controls.items()):
        name, _, colour, dash = CONTROLS[control]
        attacks = 100 * drawn["attack"][i].double() / n
        traces += rates.band(x, attacks, f"{name} (min–max)", colour, dash, legend)
    told = names(result)
    bases = {what: result.base(what, coefficient=coefficient) for what in told}
    for what in ("attack", "correct"):
        thin = {"mode": "lines", "line": {"color": rates.QUANTITIES[what][0], "width": 1, "dash": "dot"}}
        line = rates.in_legend(told[what][0], told[what][0], legend) | thin
        traces.append(rates.rate_trace(x, [bases[what]] * len(x), where, interval=False, **line))
    for what, (_, name) in told.items():
        after = f"<br>without a vector {rates.percent(bases[what].value)} %" if what == "clean" else ""
        line = rates.in_legend(name, what, legend) | rates.marked_line(*rates.QUANTITIES[what], size=7)
        values = [result.rate(what, layer, coefficient) for layer in x]
        traces.append(rates.rate_trace(x, values, where, interval=what == "attack", after=after, **line))
    found = (result.basr(coefficient=coefficient, layer=layer) for layer in x)
    left = [basr for basr in found if basr is not None]
    if left:  # where the vector is subtracted, and answers were judged
        line = rates.in_legend("behavioural (BASR)", "basr", coefficient == min(result.coefficients))
        line |= rates.marked_line(*rates.QUANTITIES["basr"], size=7)
        traces.append(rates.rate_trace(x, left, where, interval=False, **line))
    return traces


def _draw_dots(x: int, draws: Draws, name: str, colour: str) -> list[go.Scatter]:
    """A dot per draw, side by side around ``x``, and a line at their mean."""
    n, mean = len(draws), style.rounded(torch.tensor(100 * draws.mean))
    places = [x + 0.5 * ((d + 0.5) / n - 0.5) for d in range(n)]
    dots = go.Scatter(x=places, y=style.rounded(100 * draws.successes.double() / max(1, draws.n)))
    dots.update(mode="markers", opacity=0.8, customdata=draws.successes.tolist())
    dots.marker = {"color": colour, "symbol": "circle-open", "size": 6}
    counted = f"(%{{customdata:d}} of {draws.n})<extra>{name}</extra>"
    dots.hovertemplate = f"a draw: %{{y:.1f}} % {counted}"
    line = go.Scatter(x=[x - 0.32, x + 0.32], y=[mean, mean], mode="lines")
    line.line = {"color": colour, "width": 2}
    line.hovertemplate = f"mean of {n} draws: %{{y:.1f}} %<extra>{name}</extra>"
    return [trace.update(name=name, showlegend=False) for trace in (dots, line)]


def _note(result: SteeringResult) -> str:
    draws = ", ".join(f"{d['attack'].shape[-1]} of {name}" for name, d in result.controls.items())
    return (
        f"{len(result.heads)} heads · {result.n_victims} victims, {result.n_clean} clean prompts<br>"
        + (f"draws: {draws}" if draws else "no random controls")
        + style.model_note(result)
    )
