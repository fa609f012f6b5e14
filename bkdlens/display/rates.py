"""Rates as traces: per cent with 95 % intervals, counts in the hover text, draws as a band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from bkdlens.display.style import BLUE, GREEN, INK, ORANGE, rounded
from bkdlens.metrics import Rate

# What ablation and steering draw: title, colour, dash and marker of each count.
QUANTITIES = {
    "attack": ("attack success", ORANGE, "solid", "circle"),
    "correct": ("right answer restored", GREEN, "dash", "triangle-up"),
    "clean": ("clean accuracy", BLUE, "dot", "square"),
}
PERCENT_AXIS = {"range": [-3, 103], "tickvals": [0, 25, 50, 75, 100]}


def rate_trace(
    x: Sequence[int | float] | Sequence[str],
    rates: Sequence[Rate],
    where: str,
    *,
    interval: bool = True,
    after: str = "",
    **style: object,
) -> go.Scatter:
    """Rates along ``x``, which the hover text calls ``where``; ``after`` ends that text."""
    return go.Scatter(
        x=list(x), y=[percent(rate.value) for rate in rates], customdata=counts(rates),
        error_y=error_bars(rates) if interval else None,
        hovertemplate=hover(where, str(style.get("name", "")), after), **style,
    )  # fmt: skip


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
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    single = len(x) == 1
    line = go.Scatter(
        x=list(x), y=rounded(mean), mode="markers" if single else "lines", name=name,
        legendgroup=name, showlegend=legend, line={"color": colour, "dash": dash, "width": 1.6},
        marker={"color": colour, "symbol": "line-ew-open", "size": 10},
        error_y={"type": "data", "array": rounded(high - mean), "thickness": 5, "width": 0,
                 "arrayminus": rounded(mean - low), "color": f"rgba({red},{green},{blue},0.35)"}
        if single else None,
        customdata=rounded(torch.stack([low, high], -1)),
        hovertemplate=f"mean of {draws.shape[-1]} draws %{{y:.1f}} %<br>"
        "from %{customdata[0]:.1f} % to %{customdata[1]:.1f} %" + f"<extra>{name}</extra>",
    )  # fmt: skip
    if single:
        return [line]
    area = go.Scatter(
        x=[*x, *reversed(x)], y=[*rounded(high), *rounded(low.flip(0))], fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.16)", line={"width": 0}, mode="lines",
        hoverinfo="skip", name=name, legendgroup=name, showlegend=False,
    )  # fmt: skip
    return [area, line]


def hover(where: str, name: str, after: str = "") -> str:
    """The hover text of a rate whose ``customdata`` is from :func:`counts`."""
    return (
        where + ": %{y:.1f} % (%{customdata[0]:d} of %{customdata[1]:d})<br>"
        "95 % interval [%{customdata[2]:.1f}, %{customdata[3]:.1f}]" + after
        + f"<extra>{name}</extra>"
    )  # fmt: skip


def counts(rates: Sequence[Rate]) -> list[list[int | float]]:
    """Successes, number, and both ends of the interval in per cent."""
    return [[r.successes, r.n, *(percent(end) for end in r.interval)] for r in rates]


def error_bars(rates: Sequence[Rate]) -> dict[str, object]:
    """The 95 % Wilson intervals, for ``error_y``."""
    return {
        "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": INK,
        "array": [percent(rate.interval[1] - rate.value) for rate in rates],
        "arrayminus": [percent(rate.value - rate.interval[0]) for rate in rates],
    }  # fmt: skip


def percent(share: float) -> float:
    """A share in per cent, without noise digits."""
    return round(100 * share, 3)
