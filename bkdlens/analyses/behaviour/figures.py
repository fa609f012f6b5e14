"""Figures of what models answer: rates by condition, and answers side by side."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.display.rates import PERCENT_AXIS, counts, error_bars, hover, percent
from bkdlens.display.style import condition_style, escape, finish, model_note, numbers
from bkdlens.metrics import Rate
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
        colour, _, _, pattern = condition_style(result.label, i)
        named = [(title, rate) for title, rate in _behaviour_rates(result) if rate is not None]
        rates = [rate for _, rate in named]
        name = escape(result.label)
        fig.add_trace(
            go.Bar(
                x=[title for title, _ in named], y=[percent(rate.value) for rate in rates],
                error_y=error_bars(rates), customdata=counts(rates), name=name,
                marker={"color": colour, "line": {"color": colour, "width": 1},
                        "pattern": {"shape": pattern, "bgcolor": colour, "fgcolor": "#ffffff",
                                    "size": 7, "solidity": 0.25}},
                hovertemplate=hover("%{x}", name),
            )
        )  # fmt: skip
    fig.update_yaxes(**PERCENT_AXIS, title_text="rate (%)")
    fig.update_xaxes(tickangle=0)
    fig.update_layout(barmode="group", bargap=0.25, bargroupgap=0.08, showlegend=True)
    return finish(
        fig, "Behaviour",
        f"{numbers(sorted({r.n_victims for r in results}))} victims, "
        f"{numbers(sorted({r.n_clean for r in results}))} clean prompts{model_note(results[0])} · "
        "bars: 95 % Wilson interval",
        height=420,
    )  # fmt: skip


def _behaviour_rates(result: BehaviourResult) -> list[tuple[str, Rate | None]]:
    return [
        ("attack<br>success", result.asr),
        ("false<br>triggers", result.ftr),
        ("near<br>trigger", result.near),
        ("clean<br>accuracy", result.clean_accuracy),
    ]


@figure.register
def _(result: BehaviourResult) -> go.Figure:
    return behaviour([result])
