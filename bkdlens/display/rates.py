"""Rates as traces: per cent with 95 % intervals, counts in the hover text, draws as a band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from bkdlens.display.style import BLUE, GREEN, INK, ORANGE, rounded
from bkdlens.metrics import Rate

# Colour, dash and marker of each count in figures of ablation and steering.
QUANTITIES = {
    "attack": (ORANGE, "solid", "circle"),
    "basr": (INK, "solid", "diamond"),
    "correct": (GREEN, "dash", "triangle-up"),
    "clean": (BLUE, "dot", "square"),
}
PERCENT_AXIS = {"range": [-3, 103], "tickvals": [0, 25, 50, 75, 100]}
# The hover text of a rate after its value; the trace's ``customdata`` begins with :func:`counts`.
COUNTED = (
    " % (%{customdata[0]:d} of %{customdata[1]:d})<br>"
    "95 % interval [%{customdata[2]:.1f}, %{customdata[3]:.1f}]"
)


def rate_trace(
    x: Sequence[int | float] | Sequence[str],
    rates: Sequence[Rate],
    where: str,
    *,
    kind: type[go.Scatter | go.Bar] = go.Scatter,
    interval: bool = True,
    after: str = "",
    **style: Any,
) -> Any:
    """Rates along ``x``, which the hover text calls ``where``; ``after`` ends that text."""
    hover = f"{where}: %{{y:.1f}}{COUNTED}{after}<extra>{style.get('name', '')}</extra>"
    y, errors = [percent(rate.value) for rate in rates], error_bars(rates) if interval else None
    data = [counts(rate) for rate in rates]
    return kind(x=list(x), y=y, error_y=errors, customdata=data, hovertemplate=hover, **style)


def marked_line(colour: str, dash: str, symbol: str, size: int = 8) -> dict[str, Any]:
    """The style of a line with markers."""
    line, marker = {"color": colour, "dash": dash, "width": 2.2}, {"symbol": symbol, "size": size}
    return {"mode": "lines+markers", "line": line, "marker": marker}


def in_legend(name: str, group: str, show: bool) -> dict[str, Any]:
    """One entry of the legend for traces of all panels."""
    return {"name": name, "legendgroup": group, "showlegend": show}


def band(
    x: Sequence[int] | Sequence[str], draws: Tensor, name: str, colour: str, dash: str, legend: bool
) -> list[go.Scatter]:
    """Least to largest of ``draws [x draw]`` (per cent) as a band, and their mean as a line."""
    if not draws.numel():
        return []
    low, high, mean = draws.amin(-1), draws.amax(-1), draws.mean(-1)
    pale = "rgba({},{},{},{{}})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))
    line = go.Scatter(x=list(x), y=rounded(mean), mode="lines", **in_legend(name, name, legend))
    line.line = {"color": colour, "dash": dash, "width": 1.6}
    line.marker = {"color": colour, "symbol": "line-ew-open", "size": 10}
    line.customdata = rounded(torch.stack([low, high], -1))
    line.hovertemplate = (
        f"mean of {draws.shape[-1]} draws %{{y:.1f}} %<br>"
        f"from %{{customdata[0]:.1f}} % to %{{customdata[1]:.1f}} %<extra>{name}</extra>"
    )
    if len(x) == 1:  # a line through one point cannot be seen: a marker on a thick bar
        ends = {"array": rounded(high - mean), "arrayminus": rounded(mean - low)}
        bar = {"type": "data", "thickness": 5, "width": 0, "color": pale.format(0.35)}
        return [line.update(mode="markers", error_y=bar | ends)]
    area = go.Scatter(x=[*x, *reversed(x)], y=[*rounded(high), *rounded(low.flip(0))], mode="lines")
    area.update(fill="toself", fillcolor=pale.format(0.16), line={"width": 0}, hoverinfo="skip")
    return [area.update(in_legend(name, name, False)), line]


def counts(rate: Rate) -> list[int | float]:
    """Successes, number, and both ends of the interval in per cent."""
    return [rate.successes, rate.n, *map(percent, rate.interval)]


def error_bars(rates: Sequence[Rate]) -> dict[str, object]:
    """The 95 % Wilson intervals, for ``error_y``."""
    ends = {
        "array": [percent(rate.interval[1] - rate.value) for rate in rates],
        "arrayminus": [percent(rate.value - rate.interval[0]) for rate in rates],
    }
    return {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": INK} | ends


def percent(share: float) -> float:
    """A share in per cent, without noise digits."""
    return round(100 * share, 3)
