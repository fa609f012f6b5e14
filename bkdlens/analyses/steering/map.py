"""Steering as a map: every coefficient against every layer, a panel for each thing measured."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.heatmaps import BARE, SEQUENTIAL, gaps, index_ticks, share_colours, written
from bkdlens.display.rates import COUNTED, counts, percent
from bkdlens.display.style import escape, finish, model_note
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
    coefficients, layers = sorted(result.coefficients), list(result.layers)
    panels = PANELS | {"clean": result.clean_name}
    titles, up = list(panels.values()), [coefficient_text(c) for c in coefficients]
    fig = make_subplots(
        1, len(titles), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles
    )
    for column, (what, title) in enumerate(panels.items(), start=1):
        cells = [[_cell(result, what, coefficient=c, layer=x) for x in layers] for c in coefficients]
        z, data = ([[cell[i] for cell in row] for row in cells] for i in (0, 1))
        text = [[cell[2] for cell in row] for row in cells]
        if len(layers) > 12:  # too narrow for numbers; rings stay
            text = [[value.strip("0123456789 ") for value in row] for row in text]
        where = f"<b>{title}</b>, coefficient %{{y}}, layer %{{x}}<br>%{{z:.1f}}"
        after = "<br>without a vector %{customdata[4]:.1f} %%{customdata[5]}<extra></extra>"
        heat = go.Heatmap(x=layers, y=up, z=z, customdata=data, **written(text), **gaps(1))
        heat.update(name=title, coloraxis="coloraxis", hovertemplate=f"{where}{COUNTED}{after}")
        fig.add_trace(heat, row=1, col=column)
    fig.update_xaxes(title_text=f"layer ({escape(result.site)})", **index_ticks(len(layers)), **BARE)
    fig.update_yaxes(type="category", **BARE)
    fig.update_yaxes(title_text="coefficient", col=1)
    share_colours(fig, 0, 100, SEQUENTIAL)
    n_draws = sum(drawn["attack"].shape[-1] for drawn in result.controls.values())
    subtitle = (
        f"+ added to clean, − subtracted from triggered: {result.n_victims} victims, {result.n_clean} "
        f"clean prompts{model_note(result)}<br>"
        + (f"○ within the range of {n_draws} random draws" if n_draws else "no random controls")
        + (" · layer 0 is the bare embedding" if result.site == "resid_pre" else "")
    )
    kind, height = escape(result.kind), 210 + max(120, 34 * len(coefficients))
    return finish(fig, f"Steering with the {kind} vector, coefficient by layer", subtitle, height)


def _cell(result: SteeringResult, what: str, **at: Any) -> tuple[float, list[Any], str]:
    """Per cent, the hover text's data (counts, per cent without a vector, draws in words), and text."""
    rate, base = result.rate_at(what, **at), result.base(what, **at)
    drawn = result.draws(what, **at)
    ranges = "".join(
        f"<br>{name}: {percent(d.low):.1f} to {percent(d.high):.1f} % ({len(d)} draws)"
        for name, d in drawn.items()
    )
    farthest = max((int((d.successes - base.successes).abs().max()) for d in drawn.values()), default=-1)
    ring = " ○" if abs(rate.successes - base.successes) <= farthest else ""
    value = percent(rate.value)
    return value, [*counts(rate), percent(base.value), ranges], f"{value:.0f}{ring}"
