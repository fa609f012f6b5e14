"""Figures as the report's page holds them: data for plotly, and the script that draws it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from bkdlens.display.downloads import DataLink, DataStore
from bkdlens.results import Result


@dataclass(frozen=True)
class Figure:
    """A figure ready for the template: its title goes into html, where it can wrap."""

    id: str  # of its element, unique on the page
    title: str  # as plain text
    note: str  # the subtitle as plain text
    height: int  # pixels
    min_width: int  # pixels, below which it scrolls sideways
    data: Markup  # json for plotly
    links: tuple[DataLink, ...]  # to the numbers behind it


class Drawer:
    """Figures of one study, numbered."""

    def __init__(self, anchor: str, store: DataStore) -> None:
        self.anchor, self.store, self.n = anchor, store, 0

    def __call__(
        self,
        fig: go.Figure,
        min_width: int | None = None,  # by its columns for None
        on: str = "",
        data: Mapping[str, Result] | None = None,  # the results behind it by name
    ) -> Figure:
        """The figure with its title (and ``on``) and margins moved to the page, linked to its data."""
        self.n += 1
        layout = fig.layout
        title, note = map(_unmarked, (layout.title.text, layout.title.subtitle.text))
        domains = [layout[name].domain for name in layout if name.startswith("xaxis")]
        columns = len(set(domains))
        over = len(domains) > 1 or any((a.yref, a.y) == ("paper", 1.0) for a in layout.annotations)
        top = 30 if over else 12  # room for the titles of panels
        height = int(layout.height) - int(layout.margin.t) + top
        layout.title, layout.height = None, height
        layout.margin = {"l": 48, "r": 10, "t": top, "b": 40}
        text = fig.to_json()
        for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
            text = text.replace(sign, code)
        if min_width is None:
            min_width = 260 * columns if columns > 1 else 0
        name, links = f"{self.anchor}-f{self.n}", self.store.add(data or {})
        return Figure(name, title + on, note, height, min_width, Markup(text), links)


def _unmarked(text: str | None) -> str:
    """A plotly text as plain text, which the template escapes again."""
    return html.unescape(re.sub(r"<br\s*/?>", " · ", text or ""))
