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

    id: str
    title: str
    note: str
    height: int
    min_width: int
    data: Markup
    links: tuple[DataLink, ...] = ()  # to the numbers behind it


class Drawer:
    """Figures of one study, numbered."""

    def __init__(self, anchor: str, store: DataStore) -> None:
        self.anchor, self.store, self.n = anchor, store, 0

    def __call__(
        self,
        fig: go.Figure,
        min_width: int | None = None,
        on: str = "",
        data: Mapping[str, Result] | None = None,
    ) -> Figure:
        """The figure for the page.

        Args:
            fig: from :mod:`bkdlens.plot`; its title and margins move to the page.
            min_width: below it the figure scrolls sideways; by its columns for None.
            on: ends the title.
            data: the results behind it by name, which it links to.
        """
        self.n += 1
        title, note = (
            _unmarked(text) for text in (fig.layout.title.text, fig.layout.title.subtitle.text)
        )
        panels = sum(1 for name in fig.layout if name.startswith("xaxis"))
        columns = len({fig.layout[name].domain for name in fig.layout if name.startswith("xaxis")})
        titled = any((a.yref, a.y) == ("paper", 1.0) for a in fig.layout.annotations) or panels > 1
        fig.layout.title = None
        top = 30 if titled else 12
        height = int(fig.layout.height) - int(fig.layout.margin.t) + top
        fig.layout.margin = {"l": 48, "r": 10, "t": top, "b": 40}
        fig.layout.height = height
        text = fig.to_json()
        for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
            text = text.replace(sign, code)
        if min_width is None:
            min_width = 260 * columns if columns > 1 else 0
        return Figure(f"{self.anchor}-f{self.n}", title + on, note, height, min_width, Markup(text),
                      self.store.add(data or {}))  # fmt: skip


def _unmarked(text: str | None) -> str:
    """A plotly text as plain text, which the template escapes again."""
    return html.unescape(re.sub(r"<br\s*/?>", " · ", text or ""))
