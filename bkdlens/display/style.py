"""The look of all figures: template, colours, and texts made safe for plotly."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from bkdlens.results import Result

INK, MUTED, LINES, EDGE = "#1f2933", "#5f6b7a", "#e4e7eb", "#9aa5b1"
ORANGE, BLUE, GREEN, GREY, PURPLE = "#c4500c", "#0072b2", "#00805a", "#7b8794", "#8a4a94"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

FAINT = {"color": MUTED, "width": 1, "dash": "2px,3px"}  # a line to compare with
SMALL = {"size": 11, "color": MUTED}  # the font of a remark in a panel

_TICKS = {"ticks": "outside", "ticklen": 4, "tickcolor": EDGE, "linecolor": EDGE, "gridcolor": LINES}
_AXIS_TITLE = {"standoff": 8, "font": {"size": 12.5}}
_AXIS = _TICKS | {"zeroline": False, "automargin": True, "title": _AXIS_TITLE}
_AT_TOP = {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
_AT_BOTTOM = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
_SUBTITLE = {"font": {"size": 12, "color": MUTED}}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": _AT_TOP | {"pad": {"t": 14}, "font": {"size": 16}, "subtitle": _SUBTITLE},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "colorway": [ORANGE, BLUE, GREEN, PURPLE, GREY],
        "margin": {"l": 56, "r": 16, "t": 84, "b": 48},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "font": {"family": FONT, "size": 12}},
        "legend": _AT_BOTTOM | {"font": {"size": 12}, "itemwidth": 36},
        "annotationdefaults": {"font": {"size": 12, "color": INK}, "showarrow": False},
    }
)

# Colour, dash, marker and bar pattern of a condition.
_CONDITIONS = {
    "backdoored": (ORANGE, "solid", "circle", ""),
    "clean adapter": (BLUE, "dash", "square", "/"),
    "base": (GREY, "dot", "diamond", "."),
}
_OTHERS = ((GREEN, "dashdot", "triangle-up", "x"), (PURPLE, "longdash", "cross", "+"))


def finish(fig: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    """The figure with the template, its titles and its height in pixels."""
    top = 72 + 16 * subtitle.count("<br>") + 20 * bool(fig.layout.annotations)
    titles = {"text": title, "subtitle": {"text": subtitle}}
    fig.update_layout(template=TEMPLATE, title=titles, height=height, margin={"t": top})
    fig.for_each_annotation(lambda a: a.update(font_size=min(a.font.size or 13, 13)))
    return fig


def style_of(label: str, index: int) -> tuple[str, str, str, str]:
    """Colour, dash, marker and bar pattern; ``index`` tells unknown labels apart."""
    return _CONDITIONS.get(label.replace("-", " ").lower()) or _OTHERS[index % len(_OTHERS)]


def model_note(result: Result) -> str:
    """`` · base + adapter`` by their last path parts, where the result knows its model."""
    info = result.provenance.model
    names = [PurePath(str(info[key])).name for key in ("base", "adapter") if info.get(key)]
    return f" · {escape(cut(' + '.join(names), 44))}" if names else ""


def numbers(values: Iterable[Any]) -> str:
    """``120``, or ``96/120`` where results differ in a number that is usually one."""
    return "/".join(map(str, sorted(set(values))))


def cut(text: str, most: int) -> str:
    """The text, shortened to at most ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def escape(text: str) -> str:
    """Plotly reads a little html in every text; texts of models and files must not be markup."""
    return html.escape(str(text), quote=False)


def rounded(values: Tensor) -> Any:
    """A number or nested lists with at most six decimals: small json without noise digits."""
    return torch.round(values.detach().cpu().double(), decimals=6).tolist()
