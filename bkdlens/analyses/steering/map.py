"""Steering as a map: every coefficient against every layer, a panel for each thing measured."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.rates import percent
from bkdlens.display.style import (
    LINES,
    SEQUENTIAL,
    escape,
    finish,
    index_ticks,
    model_note,
)

PANELS = (("attack", "attack success"), ("correct", "right answer"), ("clean", "clean accuracy"))


def steering_map(result: SteeringResult) -> go.Figure:
    """Rates by coefficient (up) and layer (across): the attack, right answers, clean accuracy.

    A ring marks attack cells that are no farther from the untouched rate than the farthest random draw:
    there the vector does no more than chance. Cells show per cent; the hover text has counts,
    interval, the rate without a vector and the range of the random draws.

    Args:
        result: from :func:`bkdlens.sweep_layers`.
    """
    order = sorted(range(len(result.coefficients)), key=lambda c: result.coefficients[c])
    names = [f"{result.coefficients[c]:+g}".replace("-", "−") for c in order]
    fig = make_subplots(
        1, len(PANELS), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=[title for _, title in PANELS],
    )  # fmt: skip
    few = len(result.layers) <= 12
    for column, (what, title) in enumerate(PANELS, start=1):
        cells = [[_cell(result, what, c, i) for i in range(len(result.layers))] for c in order]
        fig.add_trace(
            go.Heatmap(
                z=[[cell[0] for cell in row] for row in cells], x=list(result.layers), y=names,
                text=[[c[1] if few else c[1].strip("0123456789 ") for c in row] for row in cells],
                customdata=[[cell[2:] for cell in row] for row in cells], texttemplate="%{text}",
                textfont={"size": 11}, coloraxis="coloraxis", xgap=1, ygap=1, name=title,
                hovertemplate=f"<b>{title}</b>, coefficient %{{y}}, layer %{{x}}<br>%{{z:.1f}} % "
                "(%{customdata[0]:d} of %{customdata[1]:d})<br>95 % interval [%{customdata[2]:.1f}, "
                "%{customdata[3]:.1f}]<br>without a vector %{customdata[4]:.1f} %"
                "%{customdata[5]}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    title = f"layer ({escape(result.site)})"
    fig.update_xaxes(title_text=title, **index_ticks(len(result.layers)), showgrid=False, ticks="")
    fig.update_yaxes(type="category", showgrid=False, ticks="")
    fig.update_yaxes(title_text="coefficient", col=1)
    fig.update_layout(
        plot_bgcolor=LINES,
        coloraxis={"cmin": 0, "cmax": 100, "colorscale": SEQUENTIAL,
                   "colorbar": {"title": {"text": "%"}, "thickness": 12}},
    )  # fmt: skip
    controls = _draws(result)
    return finish(
        fig, f"Steering with the {escape(result.kind)} vector, coefficient by layer",
        f"+ added to clean, − subtracted from triggered: {result.n_victims} victims, {result.n_clean} "
        f"clean prompts{model_note(result)}<br>"
        + (f"○ within the range of {controls} random draws" if controls else "no random controls")
        + (" · layer 0 is the bare embedding" if result.site == "resid_pre" else ""),
        height=210 + max(120, 34 * len(order)),
    )  # fmt: skip


def _cell(result: SteeringResult, what: str, c: int, i: int) -> list[Any]:
    """Per cent, text, count, number, interval, per cent without a vector, and the draws in words."""
    coefficient, layer = result.coefficients[c], result.layers[i]
    rate, on = result.rate(what, layer, coefficient), int(coefficient < 0)
    base = {
        "attack": result.base_attack[on],
        "correct": result.base_correct[on],
        "clean": result.base_clean,
    }[what]
    text, drawn = f"{percent(rate.value):.0f}", ""
    if what == "attack":
        farthest = 0
        for draws, name in (
            (result.random_heads[c, i], "random heads"),
            (result.random_vectors[c, i], "noise"),
        ):
            if draws.numel():
                drawn += f"<br>{name}: {_range(draws, rate.n)}"
                farthest = max(farthest, int((draws - base).abs().max()))
        if _draws(result) and abs(rate.successes - base) <= farthest:
            text = text + " ○"
    low, high = (percent(end) for end in rate.interval)
    return [percent(rate.value), text, rate.successes, rate.n, low, high,
            percent(base / max(1, rate.n)), drawn]  # fmt: skip


def _range(draws: Tensor, n: int) -> str:
    low, high = (percent(float(end) / max(1, n)) for end in (draws.min(), draws.max()))
    return f"{low:.1f} to {high:.1f} % ({draws.numel()} draws)"


def _draws(result: SteeringResult) -> int:
    return int(result.random_heads.shape[-1] + result.random_vectors.shape[-1])
