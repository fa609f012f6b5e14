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

# Draws a figure when it comes near the window, all of them before printing, and fits them to paper.
DRAW = """
"use strict";
const specs = new Map();
for (const box of document.querySelectorAll(".plot"))
  specs.set(box, JSON.parse(document.getElementById(box.id + "-data").textContent));
const config = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
function draw(box) {
  const spec = specs.get(box);
  if (!spec) return;
  specs.delete(box);
  Plotly.newPlot(box, spec.data, spec.layout, config);
}
const boxes = [...specs.keys()];
if ("IntersectionObserver" in window) {
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries)
      if (entry.isIntersecting) { observer.unobserve(entry.target); draw(entry.target); }
  }, {rootMargin: "600px"});
  boxes.forEach(box => observer.observe(box));
} else boxes.forEach(draw);
for (const link of document.querySelectorAll("a[data-csv]")) {
  const text = document.getElementById(link.dataset.csv).content.textContent;
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
}
window.addEventListener("beforeprint", () => {
  document.body.classList.add("paper");
  for (const fold of document.querySelectorAll("details.record, #ab details")) fold.open = true;
  for (const box of boxes) {
    draw(box);
    Plotly.relayout(box, {width: box.clientWidth, autosize: false});
  }
});
window.addEventListener("afterprint", () => {
  document.body.classList.remove("paper");
  for (const box of boxes) Plotly.relayout(box, {width: null, autosize: true});
});
"""


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
