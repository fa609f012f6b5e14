"""Figures of probes: by layer, and trained at one layer against tested at another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.display.heatmaps import BARE, SEQUENTIAL, gaps, index_ticks, share_colours
from bkdlens.display.rates import PERCENT_AXIS, in_legend, marked_line, rate_trace
from bkdlens.display.style import FAINT, SMALL, escape, finish, model_note, numbers, rounded, style_of
from bkdlens.results import figure

ProbeMeasure = Literal["accuracy", "few_shot", "separation"]


def layer_accuracy(probes: Sequence[ProbeResult], what: ProbeMeasure = "accuracy") -> go.Figure:
    """A measure of the probes by layer, a panel per kind of prompt that they tell triggered ones from.

    Args:
        probes: any conditions, kinds and ``against``.
        what: ``"accuracy"`` on the test prompts, ``"few_shot"`` (a few prompts per class), or
            ``"separation"`` of the class means over the spread within the classes.

    Returns:
        A line per condition and kind, in per cent; separation as a ratio.

    Examples:
        >>> fig = bkdlens.plot.layer_accuracy([bkdlens.train_probes(cache, n_draws=1)])
    """
    against, kinds, labels = (
        list(dict.fromkeys(getattr(probe, axis) for probe in probes))
        for axis in ("against", "kind", "label")
    )
    titles = [f"triggered against {escape(other)}" for other in against]
    fig = make_subplots(
        1, len(titles), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=titles
    )
    seen: set[tuple[str, str]] = set()
    for probe in probes:
        place, series = labels.index(probe.label), (probe.label, probe.kind)
        colour, dash, symbol, _ = style_of(probe.label, place)
        name = escape(probe.label + (f", {probe.kind}" if len(kinds) > 1 else ""))
        style = in_legend(name, name, series not in seen) | marked_line(colour, dash, symbol, size=7)
        style["line"]["width"] = 2
        style["marker"]["symbol"] += "-open" * (kinds.index(probe.kind) % 2)
        seen.add(series)
        layers = range(len(probe.n_correct))
        if what == "accuracy":
            # Side by side, so that the intervals can be told apart; the hover rounds back.
            nudge = 0.09 * (place - (len(labels) - 1) / 2)
            rates = [probe.rate(layer) for layer in layers]
            trace = rate_trace([layer + nudge for layer in layers], rates, "layer %{x:.0f}", **style)
            trace.error_y.color = colour
        else:
            scale, unit = (100, "%{y:.1f} %") if what == "few_shot" else (1, "%{y:.2f}")
            trace = go.Scatter(x=list(layers), y=rounded(scale * getattr(probe, what)), **style)
            tested = f"{probe.n_test} test prompts<extra>{name}</extra>"
            trace.hovertemplate = f"layer %{{x}}: {unit}<br>{tested}"
        fig.add_trace(trace, row=1, col=1 + against.index(probe.against))
    if what == "separation":
        fig.update_yaxes(rangemode="tozero")
        fig.update_yaxes(title_text="class distance / spread", col=1)
    else:
        lowest = min(float(getattr(probe, what).min()) for probe in probes)
        fig.update_yaxes(**PERCENT_AXIS | {"range": [min(40, 100 * lowest - 12), 103]})
        fig.update_yaxes(title_text="accuracy (%)", col=1)
        chance = {"text": "chance", "font": SMALL}
        corner = {"annotation": chance, "annotation_position": "bottom right"}
        for column in range(1, len(against) + 1):
            fig.add_hline(y=50, line=FAINT, row=1, col=column, **corner)
    most = max(len(probe.n_correct) for probe in probes)
    fig.update_xaxes(title_text="layer (0: bare embedding)", dtick=math.ceil(most / 12))
    shots = numbers(str(probe.provenance.settings.get("shots", "few")) for probe in probes)
    title = {
        "accuracy": "Probe accuracy by layer",
        "few_shot": f"{shots}-shot probe accuracy by layer",
        "separation": "Distance of class means by layer",
    }[what]
    measured, bars = "last prompt token", ""
    if what == "accuracy":
        paired = all(probe.pair_correct is not None for probe in probes)
        bars = f" · bars: 95 % {'interval, by pair' if paired else 'Wilson interval'}"
        measured = f"{escape('/'.join(kinds).upper())} probes"
    subtitle = f"{measured}, {_tested(probes)}{bars}"
    return finish(fig, title, subtitle, height=430)


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
    titles = [escape(probe.label) for probe in probes] if len(probes) > 1 else None
    fig = make_subplots(
        1, len(probes), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles
    )
    hover = "trained on layer %{y}<br>tested on layer %{x}<br>accuracy %{z:.1f} % of"
    for column, probe in enumerate(probes, start=1):
        heat = go.Heatmap(z=rounded(100 * probe.ilca), coloraxis="coloraxis", **gaps(n))
        heat.update(name=escape(probe.label), hovertemplate=f"{hover} {probe.n_test} prompts")
        fig.add_trace(heat, row=1, col=column)
    square = {"range": [-0.5, n - 0.5], "constrain": "domain", **index_ticks(n), **BARE}
    fig.update_xaxes(title_text="tested on layer", **square)
    fig.update_yaxes(**square)
    fig.update_yaxes(title_text="trained on layer", scaleanchor="x", col=1)
    share_colours(fig, 50, 100, SEQUENTIAL)
    title = "Probes across layers" + ("" if titles else f": {escape(first.label)}")
    kind = f"{escape(first.kind.upper())}, triggered against {escape(first.against)}"
    return finish(fig, title, f"{kind} · {_tested(probes)}", height=430)


def _tested(probes: Sequence[ProbeResult]) -> str:
    return f"{numbers(probe.n_test for probe in probes)} test prompts{model_note(probes[0])}"


@figure.register
def _(result: ProbeResult) -> go.Figure:
    return layer_accuracy([result])
