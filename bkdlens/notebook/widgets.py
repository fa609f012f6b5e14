"""The interactive workbench of a notebook: patch heads by clicking on them, and see what changes.

The widgets hold what is chosen and nothing else; what is shown comes from the pure functions of
:mod:`bkdlens.notebook.numbers`, each called once for the same choice.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeAlias

import plotly.graph_objects as go
from transformer_lens import HookedTransformer

from bkdlens.analyses.attribution.figures import acie_heatmap
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.tokens.figures import answer_strips, attention
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.display.style import INK, MUTED, cut, finish, model_note
from bkdlens.errors import BkdlensError, DataError
from bkdlens.notebook.numbers import (
    SOURCES,
    Choice,
    Subject,
    activations,
    answer_of,
    answer_patched,
    effects,
    look,
    make_subject,
    new_z,
    strips,
)
from bkdlens.types import Head, HeadLike, name_heads, parse_heads

try:
    import anywidget  # noqa: F401 - what plotly's FigureWidget stands on
    import ipywidgets
except ImportError as error:
    raise BkdlensError(
        "explore needs ipywidgets and anywidget; install them with: pip install 'bkdlens[notebook]'."
    ) from error

Models: TypeAlias = HookedTransformer | Mapping[str, Any]
TOP = 8  # ranks written into the heatmap
ONE = "this one"  # the name of a model or backdoor that was given without any
QUIET = {"showSendToCloud": False, "displaylogo": False, "plotlyServerURL": ""}
CELL = "padding:4px 10px;border-bottom:1px solid #e4e7eb;text-align:left;vertical-align:top"


def explore(
    model: Models,
    pairs: PairSet | Mapping[str, PairSet],
    *,
    n_pairs: int | None = 32,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> Explorer:
    """An interactive patching bench, the last line of a notebook's cell.

    With several models or sets of pairs it has menus of them, and loads what is picked:
    ``bkdlens.explore({"tiny-llama": partial(bkdlens.load, "tiny-llama")}, {"jailbreak": pairs})``

    Clicking on a head patches it into the chosen prompt; the slider patches the strongest heads
    together. Figures are redrawn from what is known; only what a choice changes is run.

    Args:
        model: from :func:`bkdlens.load`; or by name, models or functions that load one for the name
            of a backdoor. Only the one on show is kept.
        pairs: prompt pairs with victims; or by the backdoor's name.
        n_pairs: at most so many victims for the heatmap and the menu of prompts, drawn with ``seed``.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where an answer is cut.
        seed: of the draw.

    Returns:
        Widgets, which a notebook shows.

    Raises:
        BkdlensError: if ipywidgets or anywidget are missing.
        DataError: if there are no models or pairs, no victim, or prompts that do not fit the context.

    Examples:
        >>> bench = bkdlens.explore(model, test, n_pairs=2)
    """
    models = dict(model) if isinstance(model, Mapping) else {ONE: model}
    sets = {ONE: pairs} if isinstance(pairs, PairSet) else dict(pairs)
    if not models or not sets:
        raise DataError("There is nothing to explore; give at least one model and one set of pairs.")

    def make(name: str, backdoor: str) -> Subject:
        found = models[name]
        loaded = found if isinstance(found, HookedTransformer) else found(backdoor)
        return make_subject(
            loaded, sets[backdoor], n_pairs=n_pairs, fmt=fmt, max_new_tokens=max_new_tokens, seed=seed
        )

    return Explorer(make, tuple(models), tuple(sets))


class Computed:
    """The functions of :mod:`bkdlens.notebook.numbers` on one subject, each run once."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        n = 4 * len(subject.pairs)
        self.activations = lru_cache(16)(partial(activations, subject))
        self.new = lru_cache(16)(lambda choice: new_z(subject, choice, self.activations))
        self.effects = lru_cache(32)(lambda choice: effects(subject, self.new(choice), choice))
        self.strips = lru_cache(n)(
            lambda choice, row, heads: strips(subject, self.new(choice), choice, row, heads)
        )
        self.patched = lru_cache(n)(
            lambda choice, row, heads: answer_patched(subject, self.new(choice), choice, row, heads)
        )
        self.answer = lru_cache(n)(partial(answer_of, subject))
        self.look = lru_cache(n)(partial(look, subject))

    @property
    def runs(self) -> dict[str, int]:
        """How often each was really run."""
        names = ("activations", "effects", "strips", "patched", "answer", "look")
        return {name: getattr(self, name).cache_info().misses for name in names}


class Explorer(ipywidgets.VBox):
    """The widgets of :func:`explore`; ``heatmap``, ``strips`` and ``attention`` are FigureWidgets.

    ``select`` does what a click does. ``computed`` holds the numbers of what is on show.
    """

    def __init__(
        self, make: Callable[[str, str], Subject], models: tuple[str, ...], backdoors: tuple[str, ...]
    ) -> None:
        # Of several models only the one on show stays in memory.
        self._computed = lru_cache(1)(lambda name, backdoor: Computed(make(name, backdoor)))
        self._clicked: Head | None = None
        self._quiet = False
        self.model = _menu("model", models)
        self.backdoor = _menu("backdoor", backdoors)
        self.source = _menu("source", SOURCES)
        self.site = _menu("site", ("z", "result"))
        self.position = _menu("position", [("-1", -1)])
        self.prompt = _slider("prompt", 1)
        self.n_heads = _slider("top heads", 1)
        self.status, self.texts = ipywidgets.HTML(), ipywidgets.HTML()
        self.computed = self._computed(models[0], backdoors[0])
        self._fit()
        figures = self._figures()
        self.heatmap, self.strips, self.attention = (go.FigureWidget(_flat(fig)) for fig in figures)
        for figure in (self.heatmap, self.strips, self.attention):
            figure._config = figure._config | QUIET
        self.heatmap.data[0].on_click(self._on_click)
        self.texts.value = self.answers_html()
        menus = [menu for menu in (self.model, self.backdoor) if len(menu.options) > 1]
        for control in (self.model, self.backdoor, self.source, self.site, self.position, self.prompt,
                        self.n_heads):  # fmt: skip
            control.observe(partial(self._on_change, control), names="value")
        row = ipywidgets.Layout(flex_flow="row wrap")
        super().__init__([
            ipywidgets.HBox([*menus, self.source, self.site, self.position], layout=row),
            ipywidgets.HBox([self.prompt, self.n_heads], layout=row),
            self.status, self.heatmap, self.strips, self.texts, self.attention,
        ])  # fmt: skip

    @property
    def choice(self) -> Choice:
        """How heads are patched."""
        return Choice(self.source.value, self.site.value, self.position.value)

    @property
    def effects(self) -> HeadAttribution:
        """The heatmap's numbers."""
        return self.computed.effects(self.choice)

    @property
    def heads(self) -> tuple[Head, ...]:
        """What is patched: the head that was clicked on, else the strongest so many."""
        return (self._clicked,) if self._clicked else self.effects.top(self.n_heads.value)

    @property
    def row(self) -> int:
        """The chosen pair, from 0."""
        return self.prompt.value - 1

    def select(self, head: HeadLike | None) -> None:
        """Patch this head alone, as a click does; None goes back to the strongest.

        Raises:
            HeadError: for a head that the model lacks.
        """
        cfg = self.computed.subject.model.cfg
        self._clicked = None if head is None else parse_heads([head], cfg.n_layers, cfg.n_heads)[0]
        self._redraw()

    def answers(self) -> dict[str, str]:
        """The generated texts: of the clean, the triggered and the patched prompt, by run."""
        found, choice = self.computed, self.choice
        return {
            "clean": found.answer("clean", self.row),
            "triggered": found.answer("triggered", self.row),
            f"{choice.on}, patched": found.patched(choice, self.row, self.heads),
        }

    def answers_html(self) -> str:
        """The prompt and the generated texts before and after as a table; all texts are escaped."""
        pair = self.computed.subject.pairs[self.row]
        named = ", ".join(map(str, self.heads))
        prompts = {"clean": pair.clean, "triggered": pair.triggered}
        lines = [
            (run if run in prompts else f"{run}: {named}", prompts.get(run, "as above"), answer)
            for run, answer in self.answers().items()
        ]
        head = "".join(f'<th style="{CELL}">{t}</th>' for t in ("run", "prompt", "generated answer"))
        body = "".join(
            "<tr>" + "".join(f'<td style="{CELL}">{html.escape(text)}</td>' for text in line) + "</tr>"
            for line in lines
        )
        return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'

    def __repr__(self) -> str:
        choice, (before, patched) = self.choice, self._before_and_after()
        named = ", ".join(map(str, self.heads))
        return (
            f"Explorer({choice.source} into {choice.on}, {choice.site} at position {choice.position}: "
            f"{named} on prompt {self.prompt.value}: {before!r} -> {patched!r})"
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget, and for pages that cannot show one the table of answers."""
        bundle: dict[str, Any] = super()._repr_mimebundle_(**kwargs) or {}
        return bundle | {"text/plain": repr(self), "text/html": self.answers_html()}

    def _before_and_after(self) -> tuple[str, str]:
        answers = self.answers()
        return answers[self.choice.on], answers[f"{self.choice.on}, patched"]

    def _figures(self) -> tuple[go.Figure, go.Figure, go.Figure]:
        found, heads = self.computed, self.heads
        return (
            effect_map(self.effects, self.choice, heads),
            answer_strips(found.strips(self.choice, self.row, heads)),
            attention(found.look(self.row, heads[0])),
        )

    def _fit(self) -> None:
        """Make menus and sliders fit the subject."""
        subject, self._quiet = self.computed.subject, True
        self._clicked = None
        self.position.options = [
            (f"{-1 - i} ({cut(token, 12)})", -1 - i) for i, token in enumerate(subject.last_tokens)
        ]
        self.prompt.max = len(subject.pairs)
        self.n_heads.max = min(32, subject.model.cfg.n_layers * subject.model.cfg.n_heads)
        self._quiet = False

    def _on_change(self, control: Any, _: Any) -> None:
        if self._quiet:
            return
        if control is self.n_heads:
            self._clicked = None
        self._redraw(load=control in (self.model, self.backdoor))

    def _on_click(self, _: Any, points: Any, __: Any) -> None:
        if points.xs:
            self.select((int(points.ys[0]), int(points.xs[0])))

    def _redraw(self, load: bool = False) -> None:
        self.status.value = "running …"
        try:
            if load:
                self.computed = self._computed(self.model.value, self.backdoor.value)
                self._fit()
            figures = self._figures()
            for widget, fig in zip((self.heatmap, self.strips, self.attention), figures, strict=True):
                _put(widget, fig)
            self.texts.value = self.answers_html()
            self.status.value = ""
        except BkdlensError as error:  # a callback has nobody to raise to
            self.status.value = f'<b style="color:#9a3a02">{html.escape(str(error))}</b>'


def effect_map(attribution: HeadAttribution, choice: Choice, heads: tuple[Head, ...]) -> go.Figure:
    """The heatmap of effects, the patched heads outlined."""
    fig = acie_heatmap(attribution, top=TOP)
    fig.layout.shapes = [
        {"type": "rect", "x0": head.head - 0.5, "x1": head.head + 0.5, "y0": head.layer - 0.5,
         "y1": head.layer + 0.5, "line": {"color": INK, "width": 2.4}}
        for head in heads
    ]  # fmt: skip
    way = "rise" if choice.on == "clean" else "fall"
    fig.data[0].hovertemplate = fig.data[0].hovertemplate.replace("by ACIE", "").replace("ACIE", way)
    fig.layout.coloraxis.colorbar.title.text = way
    named = name_heads(heads)
    return finish(
        fig, f"Each head patched alone: {way} of the backdoor's answer",
        f"mean {way} of its probability in {len(attribution.cie)} {choice.on} prompts · "
        f"{choice.source}, {choice.site} at {choice.position}<br>outlined, patched below: {named} · "
        f"numbers: the first ranks · − negative{model_note(attribution)}",
        height=int(fig.layout.height),
    )  # fmt: skip


def _flat(fig: go.Figure) -> go.Figure:
    """The subtitle as lines of the title: a FigureWidget is measured before it is on the page, which
    puts a subtitle over its title."""
    title = fig.layout.title
    fig.update_layout(
        title={"text": f'{title.text}<br><span style="font-size:12px;color:{MUTED}">'
               f"{title.subtitle.text}</span>", "subtitle": None}
    )  # fmt: skip
    return fig


def _put(widget: go.FigureWidget, fig: go.Figure) -> None:
    """Show another figure of the same kind in the widget, its callbacks kept."""
    fig = _flat(fig)
    with widget.batch_update():
        for old, new in zip(widget.data, fig.data, strict=True):
            old.update(new.to_plotly_json(), overwrite=True)
        widget.update_layout(fig.layout.to_plotly_json(), overwrite=True)


def _menu(name: str, options: Any) -> Any:
    return ipywidgets.Dropdown(options=options, description=name)


def _slider(name: str, most: int) -> Any:
    return ipywidgets.IntSlider(1, 1, most, description=name, continuous_update=False)
