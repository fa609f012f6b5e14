"""Steering as a map: every coefficient against every layer, a panel for each thing measured."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.rates import percent
from bkdlens.display.style import LINES, SEQUENTIAL, escape, finish, index_ticks, model_note
from bkdlens.display.text import coefficient_text

PANELS = {"attack": "attack success", "correct": "right answer", "clean": "clean accuracy"}


def steering_map(result: SteeringResult) -> go.Figure:
    """Rates by coefficient (up) and layer (across): the attack, correct answers, clean accuracy.

    A ring marks attack cells that are no farther from the untouched rate than the farthest random draw:
    there the vector does no more than chance. Cells show per cent; the hover text has counts,
    interval, the rate without a vector and the range of the random draws.

    Args:
        result: from :func:`bkdlens.sweep_layers`.

    Returns:
        A figure of three heatmaps on one scale, 0 to 100 per cent.

    Examples:
        >>> swept = bkdlens.sweep_layers(model, test, vector, layers=[1, 2], n_random=1)
        >>> fig = bkdlens.plot.steering_map(swept)
    """
    coefficients = sorted(result.coefficients)
    fig = make_subplots(
        1, len(PANELS), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[*PANELS.values()]
    )
    wide = len(result.layers) > 12
    for column, (what, title) in enumerate(PANELS.items(), start=1):
        cells = [[_cell(result, what, c, layer) for layer in result.layers] for c in coefficients]
        heat = go.Heatmap(
            z=[[cell[0] for cell in row] for row in cells],
            x=list(result.layers),
            y=[coefficient_text(c) for c in coefficients],
            text=[[c[1].strip("0123456789 ") if wide else c[1] for c in row] for row in cells],
            customdata=[[cell[2:] for cell in row] for row in cells],
            hovertemplate=f"<b>{title}</b>, coefficient %{{y}}, layer %{{x}}<br>%{{z:.1f}} % "
            "(%{customdata[0]:d} of %{customdata[1]:d})<br>95 % interval [%{customdata[2]:.1f}, "
            "%{customdata[3]:.1f}]<br>without a vector %{customdata[4]:.1f} %"
            "%{customdata[5]}<extra></extra>",
            texttemplate="%{text}",
            textfont={"size": 11},
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            name=title,
        )
        fig.add_trace(heat, row=1, col=column)
    title = f"layer ({escape(result.site)})"
    fig.update_xaxes(title_text=title, **index_ticks(len(result.layers)), showgrid=False, ticks="")
    fig.update_yaxes(type="category", showgrid=False, ticks="")
    fig.update_yaxes(title_text="coefficient", col=1)
    bar = {"title": {"text": "%"}, "thickness": 12}
    scale = {"cmin": 0, "cmax": 100, "colorscale": SEQUENTIAL, "colorbar": bar}
    fig.update_layout(plot_bgcolor=LINES, coloraxis=scale)
    n_draws = sum(drawn["attack"].shape[-1] for drawn in result.controls.values())
    subtitle = (
        f"+ added to clean, − subtracted from triggered: {result.n_victims} victims, {result.n_clean} "
        f"clean prompts{model_note(result)}<br>"
        + (f"○ within the range of {n_draws} random draws" if n_draws else "no random controls")
        + (" · layer 0 is the bare embedding" if result.site == "resid_pre" else "")
    )
    kind, height = escape(result.kind), 210 + max(120, 34 * len(coefficients))
    return finish(fig, f"Steering with the {kind} vector, coefficient by layer", subtitle, height)


def _cell(result: SteeringResult, what: str, coefficient: float, layer: int) -> list[Any]:
    """Per cent, text, count, number, interval, per cent without a vector, and the draws in words."""
    at: dict[str, Any] = {"coefficient": coefficient, "layer": layer}
    rate, base = result.rate_at(what, **at), result.base(what, **at)
    drawn = result.draws(what, **at)
    ranges = "".join(
        f"<br>{name}: {percent(d.low):.1f} to {percent(d.high):.1f} % ({len(d)} draws)"
        for name, d in drawn.items()
    )
    farthest = max((int((d.successes - base.successes).abs().max()) for d in drawn.values()), default=-1)
    ring = " ○" if abs(rate.successes - base.successes) <= farthest else ""
    text = f"{percent(rate.value):.0f}{ring}"
    ends = [percent(end) for end in rate.interval]
    return [percent(rate.value), text, rate.successes, rate.n, *ends, percent(base.value), ranges]
