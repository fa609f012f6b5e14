"""The figure of what models answer: rates by condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.display.rates import PERCENT_AXIS, rate_trace
from bkdlens.display.style import escape, finish, model_note, numbers, style_of
from bkdlens.results import figure


def behaviour(results: Sequence[BehaviourResult]) -> go.Figure:
    """Attack success, false triggers, near triggers and clean accuracy, a bar per condition.

    Args:
        results: one per condition.

    Returns:
        Bars in per cent with 95 % intervals.

    Examples:
        >>> found = bkdlens.measure_behaviour(model, test, max_new_tokens=8)
        >>> fig = bkdlens.plot.behaviour([found])
    """
    fig = go.Figure()
    for i, result in enumerate(results):
        colour, _, _, pattern = style_of(result.label, i)
        rates = {
            "attack<br>success": result.asr,
            "false<br>triggers": result.ftr,
            "near<br>trigger": result.near,
            "clean<br>accuracy": result.clean_accuracy,
        }
        measured = {title: rate for title, rate in rates.items() if rate is not None}
        hatched = {
            "shape": pattern,
            "bgcolor": colour,
            "fgcolor": "#ffffff",
            "size": 7,
            "solidity": 0.25,
        }
        marker = {"color": colour, "line": {"color": colour, "width": 1}, "pattern": hatched}
        style: dict[str, Any] = {"name": escape(result.label), "marker": marker}
        fig.add_trace(rate_trace([*measured], [*measured.values()], "%{x}", kind=go.Bar, **style))
    fig.update_yaxes(**PERCENT_AXIS, title_text="rate (%)")
    fig.update_xaxes(tickangle=0)
    fig.update_layout(barmode="group", bargap=0.25, bargroupgap=0.08, showlegend=True)
    victims, clean = numbers(r.n_victims for r in results), numbers(r.n_clean for r in results)
    subtitle = f"{victims} victims, {clean} clean prompts{model_note(results[0])} · "
    return finish(fig, "Behaviour", f"{subtitle}bars: 95 % Wilson interval", height=420)


@figure.register
def _(result: BehaviourResult) -> go.Figure:
    return behaviour([result])
