"""Figures of probes: by layer, and trained at one layer against tested at another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.display.rates import PERCENT_AXIS, rate_trace
from bkdlens.display.style import (
    LINES,
    MUTED,
    SEQUENTIAL,
    condition_style,
    escape,
    finish,
    gap,
    index_ticks,
    model_note,
    numbers,
    rounded,
)
from bkdlens.results import figure

ProbeMeasure = Literal["accuracy", "few_shot", "separation"]


def layer_accuracy(probes: Sequence[ProbeResult], what: ProbeMeasure = "accuracy") -> go.Figure:
    """A measure of the probes by layer, a panel per kind of prompt that they tell triggered ones from.

    Args:
        probes: any conditions, kinds and ``against``.
        what: ``"accuracy"`` on the test prompts, ``"few_shot"`` (a few prompts a class), or
            ``"separation"`` of the class means over the spread within the classes.

    Returns:
        A line per condition and kind, in per cent; separation as a ratio.

    Examples:
        >>> fig = bkdlens.plot.layer_accuracy([bkdlens.train_probes(cache, n_draws=1)])
    """
    against = list(dict.fromkeys(probe.against for probe in probes))
    kinds = list(dict.fromkeys(probe.kind for probe in probes))
    labels = list(dict.fromkeys(probe.label for probe in probes))
    fig = make_subplots(
        1, len(against), shared_yaxes=True, horizontal_spacing=0.05,
        subplot_titles=[f"triggered against {escape(other)}" for other in against],
    )  # fmt: skip
    seen: set[tuple[str, str]] = set()
    for probe in probes:
        colour, dash, symbol, _ = condition_style(probe.label, labels.index(probe.label))
        open_marker = kinds.index(probe.kind) % 2 == 1
        name = escape(probe.label + (f", {probe.kind}" if len(kinds) > 1 else ""))
        key = (probe.label, probe.kind)
        style: dict[str, Any] = {
            "name": name, "legendgroup": name, "showlegend": key not in seen,
            "mode": "lines+markers", "line": {"color": colour, "dash": dash, "width": 2},
            "marker": {"symbol": symbol + ("-open" if open_marker else ""), "size": 7},
        }  # fmt: skip
        seen.add(key)
        layers = list(range(len(probe.n_correct)))
        if what == "accuracy":
            # Side by side, so that the intervals can be told apart; the hover rounds back.
            nudge = 0.09 * (labels.index(probe.label) - (len(labels) - 1) / 2)
            x = [layer + nudge for layer in layers]
            trace = rate_trace(x, [probe.rate(i) for i in layers], "layer %{x:.0f}", **style)
            trace.error_y.color = colour
        else:
            scale = 100 if what == "few_shot" else 1
            unit = "%{y:.1f} %" if what == "few_shot" else "%{y:.2f}"
            trace = go.Scatter(
                x=layers, y=rounded(scale * getattr(probe, what)),
                hovertemplate=f"layer %{{x}}: {unit}<br>{probe.n_test} test prompts"
                f"<extra>{name}</extra>",
                **style,
            )  # fmt: skip
        fig.add_trace(trace, row=1, col=1 + against.index(probe.against))
    if what == "separation":
        fig.update_yaxes(rangemode="tozero")
        fig.update_yaxes(title_text="class distance / spread", col=1)
    else:
        lowest = min(float(getattr(probe, what).min()) for probe in probes)
        fig.update_yaxes(**PERCENT_AXIS)
        fig.update_yaxes(range=[min(40, 100 * lowest - 12), 103])
        fig.update_yaxes(title_text="accuracy (%)", col=1)
        for column in range(1, len(against) + 1):
            fig.add_hline(y=50, line={"color": MUTED, "width": 1, "dash": "2px,3px"},
                          annotation={"text": "chance", "font": {"size": 11, "color": MUTED}},
                          annotation_position="bottom right", row=1, col=column)  # fmt: skip
    last = max(len(probe.n_correct) for probe in probes) - 1
    fig.update_xaxes(title_text="layer (0: bare embedding)", dtick=math.ceil((last + 1) / 12))
    titles = {
        "accuracy": "Probe accuracy by layer",
        "few_shot": f"{_shots(probes)}-shot probe accuracy by layer",
        "separation": "Distance of class means by layer",
    }
    named = "/".join(dict.fromkeys(probe.kind.upper() for probe in probes))
    drawn = f"{named} probes" if what == "accuracy" else "last prompt token"
    return finish(
        fig, titles[what],
        f"{drawn}, {numbers(sorted({p.n_test for p in probes}))} test prompts{model_note(probes[0])}"
        + (" · bars: 95 % Wilson interval" if what == "accuracy" else ""),
        height=430,
    )  # fmt: skip


def ilca_heatmap(probe: ProbeResult) -> go.Figure:
    """Accuracy of the probe trained at one layer (up) and tested at another (across).

    Args:
        probe: from :func:`bkdlens.train_probes`.

    Returns:
        A heatmap from chance to 100 per cent.

    Examples:
        >>> fig = bkdlens.plot.ilca_heatmap(bkdlens.train_probes(cache, n_draws=1))
    """
    return ilca_controls([probe])


def ilca_controls(probes: Sequence[ProbeResult]) -> go.Figure:
    """Accuracy of probes trained at one layer and tested at another, conditions side by side.

    Args:
        probes: one per condition.

    Returns:
        A heatmap per condition, on one colour scale from chance to 100 per cent.

    Examples:
        >>> probe = bkdlens.train_probes(cache, n_draws=1)
        >>> fig = bkdlens.plot.ilca_controls([probe, probe])
    """
    first, n = probes[0], probes[0].ilca.shape[0]
    fig = make_subplots(
        1, len(probes), shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=[escape(p.label) for p in probes] if len(probes) > 1 else None,
    )  # fmt: skip
    for column, probe in enumerate(probes, start=1):
        fig.add_trace(
            go.Heatmap(
                z=rounded(100 * probe.ilca), coloraxis="coloraxis", xgap=gap(n), ygap=gap(n),
                name=escape(probe.label),
                hovertemplate="trained on layer %{y}<br>tested on layer %{x}<br>accuracy %{z:.1f} % "
                f"of {probe.n_test} prompts",
            ),
            row=1, col=column,
        )  # fmt: skip
    square = {"range": [-0.5, n - 0.5], "showgrid": False, "ticks": "", "constrain": "domain"}
    fig.update_xaxes(title_text="tested on layer", **index_ticks(n), **square)
    fig.update_yaxes(**index_ticks(n), **square)
    fig.update_yaxes(title_text="trained on layer", scaleanchor="x", col=1)
    fig.update_layout(
        plot_bgcolor=LINES,
        coloraxis={"cmin": 50, "cmax": 100, "colorscale": SEQUENTIAL,
                   "colorbar": {"title": {"text": "%"}, "thickness": 12}},
    )  # fmt: skip
    labels = f": {escape(first.label)}" if len(probes) == 1 else ""
    return finish(
        fig, f"Probes across layers{labels}",
        f"{escape(first.kind.upper())}, triggered against {escape(first.against)} · "
        f"{numbers(sorted({p.n_test for p in probes}))} test prompts{model_note(first)}",
        height=430,
    )  # fmt: skip


def _shots(probes: Sequence[ProbeResult]) -> str:
    return numbers(sorted({str(p.provenance.settings.get("shots", "few")) for p in probes}))


@figure.register
def _(result: ProbeResult) -> go.Figure:
    return layer_accuracy([result])
