"""Figures of the backdoor vector: its components, every layer, and one layer with every draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from bkdlens.analyses.steering.measure import BackdoorVector, SteeringResult
from bkdlens.display.rates import PERCENT_AXIS, QUANTITIES, band, percent, rate_trace
from bkdlens.display.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    escape,
    finish,
    model_note,
    rounded,
)
from bkdlens.errors import ResultError, unknown
from bkdlens.metrics import Rate
from bkdlens.types import name_heads

RIGHT = "right answer (kept, restored)"


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

    Raises:
        ResultError: for a chosen layer that was not run.
    """
    if chosen is not None:
        _check_layer(result, chosen)
    sizes = sorted({abs(c) for c in result.coefficients})
    fig = _grid(sizes, result)
    x = result.layers
    for c, coefficient in enumerate(result.coefficients):
        at = {"row": 1 + sizes.index(abs(coefficient)), "col": 1 + (coefficient < 0)}
        for trace in _layer_traces(result, c, legend=c == 0):
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

    Raises:
        ResultError: for a layer that was not run.
    """
    layer = result.layers[0] if layer is None else layer
    _check_layer(result, layer)
    sizes = sorted({abs(c) for c in result.coefficients})
    fig = _grid(sizes, result)
    i = result.layers.index(layer)
    controls = [
        control for control in (
            (result.random_heads, "random<br>heads", "attack, vectors of random heads", MUTED),
            (result.random_vectors, "noise", "attack, norm-matched noise", PURPLE),
        ) if control[0].shape[-1]
    ]  # fmt: skip
    right = 2 + len(controls)  # where the attack ends and the right answers begin
    for c, coefficient in enumerate(result.coefficients):
        at = {"row": 1 + sizes.index(abs(coefficient)), "col": 1 + (coefficient < 0)}
        attack, correct, clean = _without(result, coefficient)
        for x, rate, name, colour, symbol in (
            (0, attack, "attack, no vector", ORANGE, "circle-open"),
            (1, result.rate("attack", layer, coefficient), "attack success", ORANGE, "circle"),
            (right, correct, "right answer, no vector", GREEN, "triangle-up-open"),
            (right + 1, result.rate("correct", layer, coefficient), RIGHT, GREEN, "triangle-up"),
            (right + 2, clean, "clean accuracy, no vector", BLUE, "square-open"),
            (right + 3, result.rate("clean", layer, coefficient), "clean accuracy", BLUE, "square"),
        ):
            trace = rate_trace([x], [rate], name, name=name, mode="markers", showlegend=False,
                               marker={"color": colour, "symbol": symbol, "size": 10})  # fmt: skip
            trace.error_y.color = colour
            fig.add_trace(trace, **at)
        for x, (values, _, name, colour) in enumerate(controls, start=2):
            for trace in _draw_dots(x, values[c, i], result.n_victims, name, colour):
                fig.add_trace(trace, **at)
    ticks = ["no<br>vector", "<b>vector</b>", *(title for _, title, _, _ in controls), "right,<br>none",
             "right,<br>vector", "clean,<br>none", "clean,<br>vector"]  # fmt: skip
    fig.update_xaxes(
        tickvals=list(range(len(ticks))), ticktext=ticks, range=[-0.6, len(ticks) - 0.4],
        showgrid=False, showticklabels=True, tickangle=0, tickfont={"size": 11},
    )  # fmt: skip
    fig.add_vline(x=right - 0.5, line={"color": "#9aa5b1", "width": 1})
    bare = " (the bare embedding)" if layer == 0 and result.site == "resid_pre" else ""
    return finish(
        fig, f"Steering with the {escape(result.kind)} vector at layer {layer}{bare}",
        _note(result) + " · left of the line: attack success", height=150 + 270 * len(sizes),
    )  # fmt: skip


def vector(result: BackdoorVector, *, top: int = 40) -> go.Figure:
    """The ``top`` largest components of a backdoor vector, sorted by size."""
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


def _layer_traces(result: SteeringResult, c: int, legend: bool) -> list[go.Scatter]:
    """Bands of the controls, lines without a vector, and the rates by layer, of one coefficient."""
    x, where, n = result.layers, "layer %{x}", max(1, result.n_victims)
    traces: list[go.Scatter] = []
    for values, name, colour, dash in (
        (result.random_vectors, "attack, norm-matched noise (min–max)", PURPLE, "4px,2px,1px,2px"),
        (result.random_heads, "attack, vectors of random heads (min–max)", GREY, "2px,3px"),
    ):
        traces += band(x, 100 * values[c].double() / n, name, colour, dash, legend)
    attack, correct, clean = _without(result, result.coefficients[c])
    for base, name, colour in (
        (attack, "attack, no vector", ORANGE), (correct, "right answer, no vector", GREEN)
    ):  # fmt: skip
        traces.append(
            rate_trace(
                x, [base] * len(x), where, interval=False, name=name, legendgroup=name,
                showlegend=legend, mode="lines", line={"color": colour, "width": 1, "dash": "dot"},
            )
        )  # fmt: skip
    for what, title, colour, dash, symbol in QUANTITIES:
        field = "correct" if what == "restored" else what
        rates = [result.rate(field, layer, result.coefficients[c]) for layer in x]
        traces.append(
            rate_trace(
                x, rates, where, interval=what == "attack", name=RIGHT if what == "restored" else title,
                after=f"<br>without a vector {percent(clean.value)} %" if what == "clean" else "",
                legendgroup=what, showlegend=legend, mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2.2},
                marker={"symbol": symbol, "size": 7},
            )
        )  # fmt: skip
    return traces


def _draw_dots(x: int, draws: Tensor, n_victims: int, name: str, colour: str) -> list[go.Scatter]:
    """A dot a draw, side by side around ``x``, and a line at their mean."""
    n = draws.numel()
    shares = 100 * draws.double() / max(1, n_victims)
    mean = rounded(shares.mean())
    return [
        go.Scatter(
            x=[x + 0.5 * ((d + 0.5) / n - 0.5) for d in range(n)], y=rounded(shares), mode="markers",
            name=name, showlegend=False, customdata=draws.tolist(), opacity=0.8,
            marker={"color": colour, "symbol": "circle-open", "size": 6},
            hovertemplate=f"a draw: %{{y:.1f}} % (%{{customdata:d}} of {n_victims})"
            f"<extra>{name}</extra>",
        ),
        go.Scatter(
            x=[x - 0.32, x + 0.32], y=[mean, mean], mode="lines", name=name, showlegend=False,
            line={"color": colour, "width": 2},
            hovertemplate=f"mean of {n} draws: %{{y:.1f}} %<extra>{name}</extra>",
        ),
    ]  # fmt: skip


def _without(result: SteeringResult, coefficient: float) -> tuple[Rate, Rate, Rate]:
    """Attack, right answers and clean accuracy without a vector, on the prompts of this sign."""
    on = int(coefficient < 0)
    n = result.n_victims
    return (
        Rate(result.base_attack[on], n),
        Rate(result.base_correct[on], n),
        Rate(result.base_clean, result.n_clean),
    )


def _check_layer(result: SteeringResult, layer: int) -> None:
    if layer not in result.layers:
        raise ResultError(unknown("layer in this result:", layer, result.layers))


def _note(result: SteeringResult) -> str:
    draws = ", ".join(
        f"{values.shape[-1]} of {name}"
        for values, name in ((result.random_heads, "random heads"), (result.random_vectors, "noise"))
        if values.shape[-1]
    )
    return (
        f"{len(result.heads)} heads · {result.n_victims} victims, {result.n_clean} clean prompts<br>"
        + (f"draws: {draws}" if draws else "no random controls")
        + model_note(result)
    )
