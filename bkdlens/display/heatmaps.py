"""What heatmaps share: colour scales, cells and outlines, and axes of layers or heads."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from bkdlens.display.style import INK, LINES

# Blue to orange stays apart for every common colour blindness; in grey the two ends look alike, so
# negative cells carry a minus sign as well.
DIVERGING = ["#0b4a82", "#6ea6d2", "#ffffff", "#f0a367", "#9a3a02"]
SEQUENTIAL = [[0.0, "#ffffff"], [0.35, "#b9d7ea"], [0.7, "#3f87bd"], [1.0, "#08306b"]]
BARE = {"showgrid": False, "ticks": ""}  # the look of an axis


def share_colours(
    fig: go.Figure, low: float, high: float, colours: list[Any], title: str = "%", **bar: Any
) -> None:
    """Put all heatmaps of the figure on one colour scale, over a grey ground."""
    scale = {"cmin": low, "cmax": high, "colorscale": colours, "colorbar": colour_bar(title, **bar)}
    fig.update_layout(plot_bgcolor=LINES, coloraxis=scale)


def colour_bar(title: str = "%", **more: Any) -> dict[str, Any]:
    """The legend of a colour scale."""
    return {"title": {"text": title}, "thickness": 12, **more}


def written(text: list[list[str]], size: int = 11) -> dict[str, Any]:
    """``text [row column]`` written into the cells."""
    return {"text": text, "texttemplate": "%{text}", "textfont": {"size": size}}


def box(column: int, row: int, width: float, cells: int = 1) -> dict[str, Any]:
    """An outline around ``cells`` cells side by side, the first of them at this place."""
    ends = {"x0": column - 0.5, "x1": column + cells - 0.5, "y0": row - 0.5, "y1": row + 0.5}
    return {"type": "rect", **ends, "line": {"color": INK, "width": width}}


def index_ticks(n: int) -> dict[str, object]:
    """Ticks of layers or heads: every whole number where they fit."""
    return {"tick0": 0, "dtick": 1 if n <= 10 else 2} if n <= 20 else {"nticks": 7}


def gaps(n: int) -> dict[str, float]:
    """Pixels between the cells of a heatmap with ``n`` columns."""
    return dict.fromkeys(("xgap", "ygap"), 1.0 if n <= 16 else 0.4)
