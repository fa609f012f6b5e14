"""Figures of the backdoor vector: its components, every layer, and one layer with every draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from bkdlens.analyses.steering.answers import Generations
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.analyses.steering.vector import BackdoorVector
from bkdlens.counts import Draws
from bkdlens.display.rates import (
    PERCENT_AXIS,
    QUANTITIES,
    band,
    in_legend,
    marked_line,
    percent,
    rate_trace,
)
from bkdlens.display.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINES,
    MUTED,
    ORANGE,
    PURPLE,
    escape,
    finish,
    model_note,
    rounded,
)
from bkdlens.errors import ChoiceError
from bkdlens.results import figure
from bkdlens.types import name_heads

# What is measured: its name, colour and marker; and its name where there is no vector.
MARKS = {
    "attack": ("attack success", ORANGE, "circle"),
    "correct": ("right answer (kept, restored)", GREEN, "triangle-up"),
    "clean": ("clean accuracy", BLUE, "square"),
}
WITHOUT = {"attack": "attack", "correct": "right answer", "clean": "clean accuracy"}
# The controls, by their names in the result: name in figures, and colour.
DOTS = {
    "random heads": ("attack, vectors of random heads", MUTED),
    "noise": ("attack, norm-matched noise", PURPLE),
}


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
    if chosen is not None:
        _check_layer(result, chosen)
    sizes = sorted({abs(c) for c in result.coefficients})
    fig = _grid(sizes, result)
    x = result.layers
    for coefficient in result.coefficients:
        at = {"row": 1 + sizes.index(abs(coefficient)), "col": 1 + (coefficient < 0)}
        for trace in _layer_traces(result, coefficient, coefficient == result.coefficients[0]):
            fig.add_trace(trace, **at)
        marks = {"y": 50, "textangle": -90, "font": {"size": 11, "color": MUTED}}
        if result.site == "resid_pre" and 0 in x:
            fig.add_vrect(x0=-0.5, x1=0.5, fillcolor="#eef1f4", line_width=0, layer="below", **at)
            fig.add_annotation(text="bare embedding", x=0, xshift=-10, **marks, **at)
        if chosen is not None:
            fig.add_vline(x=chosen, line={"color": INK, "width": 1.2, "dash": "4px,3px"}, **at)
            fig.add_annotation(text="chosen on validation", x=chosen, xshift=9, **marks, **at)
    fig.update_xaxes(dtick=math.ceil(len(x) / 16), range=[min(x) - 0.5, max(x) + 0.5])
    for column in (1, 2):
        fig.update_xaxes(title_text=f"layer ({escape(result.site)})", row=len(sizes), col=column)
    return finish(
        fig, f"Steering with the {escape(result.kind)} vector, by layer", _note(result),
        height=150 + panel_height * len(sizes),
    )  # fmt: skip


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
    _check_layer(result, layer)
    sizes = sorted({abs(c) for c in result.coefficients})
    fig = _grid(sizes, result)
    first_right = 2 + len(result.controls)  # where the attack ends and the correct answers begin
    for coefficient in result.coefficients:
        at: dict[str, Any] = {"coefficient": coefficient, "layer": layer}
        panel = {"row": 1 + sizes.index(abs(coefficient)), "col": 1 + (coefficient < 0)}
        for i, (what, (name, colour, symbol)) in enumerate(MARKS.items()):
            x = 0 if i == 0 else first_right + 2 * (i - 1)
            for rate, named, marker in (
                (result.base(what, **at), f"{WITHOUT[what]}, no vector", f"{symbol}-open"),
                (result.rate_at(what, **at), name, symbol),
            ):
                trace = rate_trace([x], [rate], named, name=named, mode="markers", showlegend=False)
                trace.update(marker={"color": colour, "symbol": marker, "size": 10})
                trace.error_y.color = colour
                fig.add_trace(trace, **panel)
                x += 1
        for x, (control, draws) in enumerate(result.draws("attack", **at).items(), start=2):
            for trace in _draw_dots(x, draws, *DOTS[control]):
                fig.add_trace(trace, **panel)
    controls = [control.replace(" ", "<br>") for control in result.controls]
    ticks = ["no<br>vector", "<b>vector</b>", *controls]
    ticks += ["right,<br>none", "right,<br>vector", "clean,<br>none", "clean,<br>vector"]
    fig.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, range=[-0.6, len(ticks) - 0.4])
    fig.update_xaxes(showgrid=False, showticklabels=True, tickangle=0, tickfont={"size": 11})
    fig.add_vline(x=first_right - 0.5, line={"color": "#9aa5b1", "width": 1})
    bare = " (the bare embedding)" if layer == 0 and result.site == "resid_pre" else ""
    title = f"Steering with the {escape(result.kind)} vector at layer {layer}{bare}"
    subtitle = f"{_note(result)} · left of the line: attack success"
    return finish(fig, title, subtitle, height=150 + 270 * len(sizes))


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
    shown = direction[order]
    share = 100 * float(shown.square().sum() / direction.square().sum().clamp(min=1e-30))
    fig = go.Figure(
        go.Bar(
            x=[str(i) for i in order.tolist()], y=rounded(shown), name=escape(result.kind),
            marker={"color": [ORANGE if v >= 0 else BLUE for v in shown.tolist()]},
            hovertemplate="component %{x}<br>%{y:+.4f}<extra></extra>",
        )
    )  # fmt: skip
    fig.update_xaxes(type="category", title_text="component of the residual stream", tickangle=-90,
                     tickfont={"size": 10}, showgrid=False)  # fmt: skip
    fig.update_yaxes(title_text="value", zeroline=True, zerolinecolor="#9aa5b1")
    heads = name_heads(result.heads)
    return finish(
        fig, f"Largest components of the {escape(result.kind)} vector",
        f"{len(result.heads)} heads ({heads}) · norm {result.norm:.2f} · the {len(shown)} largest of "
        f"{len(direction)} carry {share:.0f} % of its squared length",
        height=380,
    )  # fmt: skip


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
    columns = [[escape(text).replace("\n", "<br>") for text in c] for c in result.columns.values()]
    fig = go.Figure(
        go.Table(
            header={"values": [f"<b>{escape(title)}</b>" for title in result.columns],
                    "align": "left", "fill": {"color": "#eef1f4"}, "line": {"color": LINES}},
            cells={"values": columns, "align": "left", "line": {"color": LINES},
                   "fill": {"color": "#ffffff"}, "height": 26},
        )
    )  # fmt: skip
    n = len(columns[0]) if columns else 0
    return finish(fig, "Answers side by side", f"{n} prompts{model_note(result)} · greedy decoding",
                   height=200 + 90 * n)  # fmt: skip


@figure.register
def _(result: SteeringResult) -> go.Figure:
    return steering_at(result) if len(result.layers) == 1 else steering_by_layer(result)


def _grid(sizes: Sequence[float], result: SteeringResult) -> go.Figure:
    """A row a size of the coefficient; + on the left, − on the right."""
    rows = len(sizes)
    titles = [
        f"{title} ({sign}{size:g})" if factor * size in result.coefficients else ""
        for size in sizes
        for factor, sign, title in (
            (1, "+", "added to clean prompts"), (-1, "−", "subtracted from triggered")
        )
    ]  # fmt: skip
    fig = make_subplots(
        rows, 2, shared_yaxes=True, shared_xaxes=rows > 1, horizontal_spacing=0.05,
        vertical_spacing=0.22 / (rows + 1), subplot_titles=titles,
    )  # fmt: skip
    fig.update_yaxes(**PERCENT_AXIS)
    fig.update_yaxes(title_text="rate (%)", col=1)
    return fig


def _layer_traces(result: SteeringResult, coefficient: float, legend: bool) -> list[go.Scatter]:
    """Bands of the controls, lines without a vector, and the rates by layer, of one coefficient."""
    where, i = "layer %{x}", result.coefficients.index(coefficient)
    x, n = result.layers, max(1, result.n_victims)
    traces: list[go.Scatter] = []
    for control, drawn in reversed(result.controls.items()):
        name, colour = DOTS[control]
        dash = "2px,3px" if colour == MUTED else "4px,2px,1px,2px"
        shares = 100 * drawn["attack"][i].double() / n
        band_colour = GREY if colour == MUTED else colour
        traces += band(x, shares, f"{name} (min–max)", band_colour, dash, legend)
    bases = {what: result.base(what, coefficient=coefficient) for what in MARKS}
    for what in ("attack", "correct"):
        name = f"{WITHOUT[what]}, no vector"
        line = {"mode": "lines", "line": {"color": MARKS[what][1], "width": 1, "dash": "dot"}}
        style = in_legend(name, name, legend) | line
        traces.append(rate_trace(x, [bases[what]] * len(x), where, interval=False, **style))
    for what, (_, colour, dash, symbol) in QUANTITIES.items():
        after = f"<br>without a vector {percent(bases[what].value)} %" if what == "clean" else ""
        style = in_legend(MARKS[what][0], what, legend) | marked_line(colour, dash, symbol, size=7)
        rates = [result.rate(what, layer, coefficient) for layer in x]
        traces.append(rate_trace(x, rates, where, interval=what == "attack", after=after, **style))
    return traces


def _draw_dots(x: int, draws: Draws, name: str, colour: str) -> list[go.Scatter]:
    """A dot per draw, side by side around ``x``, and a line at their mean."""
    n, mean = len(draws), rounded(torch.tensor(100 * draws.mean))
    style = {"name": name, "showlegend": False}
    dots = go.Scatter(
        x=[x + 0.5 * ((d + 0.5) / n - 0.5) for d in range(n)],
        y=rounded(100 * draws.successes.double() / max(1, draws.n)),
        mode="markers",
        customdata=draws.successes.tolist(),
        opacity=0.8,
        marker={"color": colour, "symbol": "circle-open", "size": 6},
        hovertemplate=f"a draw: %{{y:.1f}} % (%{{customdata:d}} of {draws.n})<extra>{name}</extra>",
        **style,
    )
    line = go.Scatter(
        x=[x - 0.32, x + 0.32],
        y=[mean, mean],
        mode="lines",
        line={"color": colour, "width": 2},
        hovertemplate=f"mean of {n} draws: %{{y:.1f}} %<extra>{name}</extra>",
        **style,
    )
    return [dots, line]


def _check_layer(result: SteeringResult, layer: int) -> None:
    if layer not in result.layers:
        raise ChoiceError("layer in this result:", layer, result.layers)


def _note(result: SteeringResult) -> str:
    draws = ", ".join(f"{d['attack'].shape[-1]} of {name}" for name, d in result.controls.items())
    return (
        f"{len(result.heads)} heads · {result.n_victims} victims, {result.n_clean} clean prompts<br>"
        + (f"draws: {draws}" if draws else "no random controls")
        + model_note(result)
    )
