"""The look of all figures: template, colours, and texts made safe for plotly."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from bkdlens.results import Result

INK, MUTED, LINES = "#1f2933", "#5f6b7a", "#e4e7eb"
ORANGE, BLUE, GREEN, GREY, PURPLE = "#c4500c", "#0072b2", "#00805a", "#7b8794", "#8a4a94"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# Blue to orange stays apart for every common colour blindness; in grey the two ends look alike, so
# negative cells carry a minus sign as well.
DIVERGING = [
    [0.0, "#0b4a82"], [0.25, "#6ea6d2"], [0.5, "#ffffff"], [0.75, "#f0a367"], [1.0, "#9a3a02"],
]  # fmt: skip
SEQUENTIAL = [[0.0, "#ffffff"], [0.35, "#b9d7ea"], [0.7, "#3f87bd"], [1.0, "#08306b"]]

_AXIS = {
    "gridcolor": LINES, "linecolor": "#9aa5b1", "zeroline": False, "ticks": "outside",
    "ticklen": 4, "tickcolor": "#9aa5b1",
    "title": {"standoff": 8, "font": {"size": 12.5}}, "automargin": True,
}  # fmt: skip
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yanchor": "top",
                  "yref": "container", "pad": {"t": 14},
                  "font": {"size": 16}, "subtitle": {"font": {"size": 12, "color": MUTED}}},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "colorway": [ORANGE, BLUE, GREEN, PURPLE, GREY],
        "margin": {"l": 56, "r": 16, "t": 84, "b": 48},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "font": {"family": FONT, "size": 12}},
        "legend": {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom",
                   "font": {"size": 12}, "itemwidth": 36},
        "annotationdefaults": {"font": {"size": 12, "color": INK}, "showarrow": False},
    }
)  # fmt: skip

# Colour, dash, marker and bar pattern of a condition.
_CONDITIONS = {
    "backdoored": (ORANGE, "solid", "circle", ""),
    "clean adapter": (BLUE, "dash", "square", "/"),
    "base": (GREY, "dot", "diamond", "."),
}
_OTHERS = ((GREEN, "dashdot", "triangle-up", "x"), (PURPLE, "longdash", "cross", "+"))


def finish(fig: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    """The figure with the template, its titles and its height."""
    top = 72 + 16 * subtitle.count("<br>") + 20 * bool(fig.layout.annotations)
    fig.update_layout(
        template=TEMPLATE, title={"text": title, "subtitle": {"text": subtitle}}, height=height,
        margin={"t": top},
    )  # fmt: skip
    fig.for_each_annotation(lambda a: a.update(font_size=min(a.font.size or 13, 13)))
    return fig


def condition_style(label: str, index: int) -> tuple[str, str, str, str]:
    """Colour, dash, marker and bar pattern; ``index`` sets apart the labels that are not known."""
    known = _CONDITIONS.get(label.replace("-", " ").lower())
    return known or _OTHERS[index % len(_OTHERS)]


def model_note(result: Result) -> str:
    """`` · base + adapter`` by their last path parts, where the result knows its model."""
    info = result.provenance.model
    names = [PurePath(str(info[key])).name for key in ("base", "adapter") if info.get(key)]
    return f" · {escape(cut(' + '.join(names), 44))}" if names else ""


def numbers(values: Sequence[object]) -> str:
    """``96/120``, where results differ in a number that is usually one."""
    return "/".join(map(str, values))


def cut(text: str, most: int) -> str:
    """The text, shortened if it is longer than that."""
    return text if len(text) <= most else text[: most - 1] + "…"


def escape(text: str) -> str:
    """Plotly reads a little html in every text; texts of models and files must not be markup."""
    return html.escape(str(text), quote=False)


def rounded(values: Tensor) -> Any:
    """A number or nested lists, of at most six decimals: small json, and no noise digits in the file."""
    return torch.round(values.detach().cpu().double(), decimals=6).tolist()


def index_ticks(n: int) -> dict[str, object]:
    """Ticks of layers or heads: every whole number where they fit."""
    return {"tick0": 0, "dtick": 1 if n <= 10 else 2} if n <= 20 else {"nticks": 7}


def gap(n: int) -> float:
    """Between the cells of a heatmap, in pixels."""
    return 1.0 if n <= 16 else 0.4
