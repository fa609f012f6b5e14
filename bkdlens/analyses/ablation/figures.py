"""The figure of ablation: the attack, the right answers and the random groups, by number of heads."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.display.rates import PERCENT_AXIS, QUANTITIES, band, rate_trace
from bkdlens.display.style import GREY, escape, finish, model_note
from bkdlens.errors import ResultError, unknown


def ablation_curve(result: AblationResult, mode: str | None = None) -> go.Figure:
    """Attack success, restored right answers and clean accuracy by number of ablated heads.

    Args:
        result: from :func:`bkdlens.ablate_heads`.
        mode: one mode; a panel each for None.

    Raises:
        ResultError: for a mode that was not run.
    """
    if mode is not None and mode not in result.modes:
        raise ResultError(unknown("ablation mode in this result:", mode, result.modes))
    modes = result.modes if mode is None else (mode,)
    columns = min(2, len(modes))
    rows = math.ceil(len(modes) / columns)
    fig = make_subplots(
        rows, columns, shared_yaxes=True, horizontal_spacing=0.05, vertical_spacing=0.16 / rows,
        subplot_titles=[f"ablated by {escape(m)}" for m in modes] if mode is None else None,
    )  # fmt: skip
    x = [str(count) for count in result.counts]
    for i, name in enumerate(modes):
        row, column = 1 + i // columns, 1 + i % columns
        m = result.modes.index(name)
        draws = 100 * result.random_attack[m].double() / max(1, result.n_triggered)
        traces = band(x, draws, "attack, random heads (min–max)", GREY, "2px,3px", i == 0)
        for what, title, colour, dash, symbol in QUANTITIES:
            rates = [result.rate(what, name, count) for count in result.counts]
            traces.append(
                rate_trace(
                    x, rates, "%{x} heads", interval=what == "attack", name=title,
                    legendgroup=what, showlegend=i == 0, mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 2.2},
                    marker={"symbol": symbol, "size": 8},
                )
            )  # fmt: skip
        for trace in traces:
            fig.add_trace(trace, row=row, col=column)
    fig.update_xaxes(type="category")
    for column in range(1, columns + 1):
        fig.update_xaxes(title_text="heads ablated, strongest first", row=rows, col=column)
    fig.update_yaxes(**PERCENT_AXIS)
    fig.update_yaxes(title_text="rate (%)", col=1)
    n_groups = result.random_attack.shape[-1]
    first = "" if mode is None else f"by {escape(mode)} · "
    return finish(
        fig, "Ablating the top heads",
        f"{first}{result.n_triggered} triggered victims, {result.n_clean} clean prompts · "
        f"{n_groups or 'no'} random groups{model_note(result)}",
        height=140 + 310 * rows,
    )  # fmt: skip
