"""The interactive workbench of a notebook: patch heads by clicking on them, and see what changes.

The widgets hold what is chosen and nothing else; what is shown comes from the pure functions of
:mod:`bkdlens.notebook.numbers`, each called once per choice.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import plotly.graph_objects as go
from transformer_lens import HookedTransformer

from bkdlens.analyses.attribution.figures import acie_heatmap
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.tokens.figures import answer_strips, attention
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.display.heatmaps import box
from bkdlens.display.style import MUTED, cut, finish, model_note
from bkdlens.errors import BkdlensError, DataError
from bkdlens.notebook import numbers
from bkdlens.notebook.numbers import SOURCES, Choice, Subject
from bkdlens.types import MAX_NEW_TOKENS, Head, HeadLike, name_heads, parse_heads

try:
    import anywidget  # noqa: F401 - what plotly's FigureWidget stands on
    import ipywidgets
except ImportError as error:
    raise BkdlensError(
        "explore needs ipywidgets and anywidget; install them with: pip install 'bkdlens[notebook]'."
    ) from error

MOST_HEADS = 32  # that the slider patches together
ONE = "this one"  # the name of a model or backdoor that was given without any
QUIET = {"showSendToCloud": False, "displaylogo": False, "plotlyServerURL": ""}
CELL = "padding:4px 10px;border-bottom:1px solid #e4e7eb;text-align:left;vertical-align:top"


def explore(
    model: HookedTransformer | Mapping[str, Any],
    pairs: PairSet | Mapping[str, PairSet],
    *,
    n_pairs: int | None = 32,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
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
        n_pairs: the most victims for the heatmap and the menu of prompts, drawn with ``seed``.
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
        chosen = models[name]
        loaded = chosen if isinstance(chosen, HookedTransformer) else chosen(backdoor)
        return numbers.make_subject(
            loaded, sets[backdoor], n_pairs=n_pairs, fmt=fmt, max_new_tokens=max_new_tokens, seed=seed
        )

    return Explorer(make, tuple(models), tuple(sets))


class Computed:
    """The functions of :mod:`bkdlens.notebook.numbers` on one subject, each run once per choice."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        per_prompt = lru_cache(4 * len(subject.pairs))
        self.activations = lru_cache(16)(partial(numbers.activations, subject))
        self.new = lru_cache(16)(lambda choice: numbers.new_z(subject, choice, self.activations))
        self.effects = lru_cache(32)(lambda choice: numbers.effects(subject, self.new(choice), choice))
        self.strips = per_prompt(self._patched(numbers.strips))
        self.patched = per_prompt(self._patched(numbers.answer_patched))
        self.answer = per_prompt(partial(numbers.answer_of, subject))
        self.look = per_prompt(partial(numbers.look, subject))

    def _patched(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda choice, *what: run(self.subject, self.new(choice), choice, *what)

    @property
    def runs(self) -> dict[str, int]:
        """How often each function was really run."""
        names = ("activations", "effects", "strips", "patched", "answer", "look")
        return {name: getattr(self, name).cache_info().misses for name in names}


class Explorer(ipywidgets.VBox):
    """The widgets of :func:`explore`; ``heatmap``, ``strips`` and ``attention`` are FigureWidgets."""

    def __init__(
        self, make: Callable[[str, str], Subject], models: tuple[str, ...], backdoors: tuple[str, ...]
    ) -> None:
        # Of several models only the one on show stays in memory.
        self._computed = lru_cache(1)(lambda name, backdoor: Computed(make(name, backdoor)))
        self._clicked: Head | None = None
        self._quiet = False
        self.model, self.backdoor = _menu("model", models), _menu("backdoor", backdoors)
        self.source, self.site = _menu("source", SOURCES), _menu("site", ("z", "result"))
        self.position = _menu("position", [("-1", -1)])
        self.prompt, self.n_heads = _slider("prompt"), _slider("top heads")
        self.status, self.texts = ipywidgets.HTML(), ipywidgets.HTML()
        self.computed = self._computed(models[0], backdoors[0])  # the numbers of what is on show
        self._fit()
        self._shown = [go.FigureWidget(fig) for fig in self._figures()]
        for figure in self._shown:
            figure._config = figure._config | QUIET
        self.heatmap, self.strips, self.attention = self._shown
        self.heatmap.data[0].on_click(self._on_click)
        self.texts.value = self.answers_html()
        subjects, sliders = (self.model, self.backdoor), (self.prompt, self.n_heads)
        how = (self.source, self.site, self.position)
        for control in (*subjects, *how, *sliders):
            control.observe(partial(self._on_change, control), names="value")
        menus = [*(menu for menu in subjects if len(menu.options) > 1), *how]
        wrapped = ipywidgets.Layout(flex_flow="row wrap")
        controls = [ipywidgets.HBox(row, layout=wrapped) for row in (menus, sliders)]
        super().__init__([*controls, self.status, self.heatmap, self.strips, self.texts, self.attention])

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
        """What is patched: the head that was clicked on, else as many as the slider says."""
        return (self._clicked,) if self._clicked else self.effects.top(self.n_heads.value)

    @property
    def row(self) -> int:
        """The chosen pair, from 0."""
        return self.prompt.value - 1

    def select(self, head: HeadLike | None) -> None:
        """Patch this head alone, as a click does; None goes back to the strongest heads.

        Raises:
            HeadError: for a head that the model lacks.
        """
        cfg = self.computed.subject.model.cfg
        self._clicked = None if head is None else parse_heads([head], cfg.n_layers, cfg.n_heads)[0]
        self._redraw()

    def answers(self) -> dict[str, str]:
        """The generated texts after the clean, the triggered and the patched prompt, by run."""
        patched = self.computed.patched(self.choice, self.row, self.heads)
        both = {side: self.computed.answer(side, self.row) for side in ("clean", "triggered")}
        return both | {f"{self.choice.on}, patched": patched}

    def answers_html(self) -> str:
        """The prompt and the generated texts before and after as a table; all texts are escaped."""
        pair = self.computed.subject.pairs[self.row]
        patched = f"{self.choice.on}, patched: {name_heads(self.heads, MOST_HEADS)}"
        runs, prompts = ["clean", "triggered", patched], [pair.clean, pair.triggered, "as above"]
        lines = zip(runs, prompts, self.answers().values(), strict=True)
        head = _row("th", ("run", "prompt", "generated answer"))
        body = "".join(_row("td", line) for line in lines)
        return f'<table style="border-collapse:collapse">{head}{body}</table>'

    def __repr__(self) -> str:
        choice, heads, answers = self.choice, name_heads(self.heads, MOST_HEADS), self.answers()
        before, patched = answers[choice.on], answers[f"{choice.on}, patched"]
        return (
            f"Explorer({choice.source} into {choice.on}, {choice.site} at position {choice.position}: "
            f"{heads} on prompt {self.prompt.value}: {before!r} -> {patched!r})"
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget, and for pages that cannot show one the table of answers."""
        bundle: dict[str, Any] = super()._repr_mimebundle_(**kwargs) or {}
        return bundle | {"text/plain": repr(self), "text/html": self.answers_html()}

    def _figures(self) -> list[go.Figure]:
        choice, row, heads = self.choice, self.row, self.heads
        probabilities = self.computed.strips(choice, row, heads)
        pattern = self.computed.look(row, heads[0])
        effects = effect_map(self.effects, choice, heads)
        figures = [effects, answer_strips(probabilities), attention(pattern)]
        # A FigureWidget is measured before it is on the page, which puts a subtitle over its title, so
        # that subtitles become lines of the titles.
        for title in (fig.layout.title for fig in figures):
            small = f'<span style="font-size:12px;color:{MUTED}">{title.subtitle.text}</span>'
            title.update(text=f"{title.text}<br>{small}", subtitle=None)
        return figures

    def _fit(self) -> None:
        """Make menus and sliders fit the subject."""
        subject, self._quiet, self._clicked = self.computed.subject, True, None
        places = enumerate(subject.last_tokens, start=1)
        self.position.options = [(f"{-i} ({cut(token, 12)})", -i) for i, token in places]
        self.prompt.max = len(subject.pairs)
        self.n_heads.max = min(MOST_HEADS, subject.model.cfg.n_layers * subject.model.cfg.n_heads)
        self._quiet = False

    def _on_change(self, control: Any, _: Any) -> None:
        if not self._quiet:
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
            for widget, fig in zip(self._shown, self._figures(), strict=True):
                _put(widget, fig)
            self.texts.value = self.answers_html()
            self.status.value = ""
        except BkdlensError as error:  # a callback has nobody to raise to
            self.status.value = f'<b style="color:#9a3a02">{html.escape(str(error))}</b>'


def effect_map(attribution: HeadAttribution, choice: Choice, heads: tuple[Head, ...]) -> go.Figure:
    """The heatmap of effects, the patched heads outlined."""
    fig = acie_heatmap(attribution)
    way = "rise" if choice.on == "clean" else "fall"
    hover = fig.data[0].hovertemplate.replace("by ACIE", "").replace("ACIE", way)
    fig.data[0].hovertemplate, fig.layout.coloraxis.colorbar.title.text = hover, way
    fig.layout.shapes = [box(head.head, head.layer, 2.4) for head in heads]
    subtitle = (
        f"mean {way} of its probability in {len(attribution.cie)} {choice.on} prompts · "
        f"{choice.source}, {choice.site} at {choice.position}<br>outlined, patched below: "
        f"{name_heads(heads)} · numbers: the first ranks · − negative{model_note(attribution)}"
    )
    title = f"Each head patched alone: {way} of the backdoor's answer"
    return finish(fig, title, subtitle, height=int(fig.layout.height))


def _put(widget: go.FigureWidget, fig: go.Figure) -> None:
    """Show another figure of the same kind in the widget, its callbacks kept."""
    with widget.batch_update():
        for old, new in zip(widget.data, fig.data, strict=True):
            old.update(new.to_plotly_json(), overwrite=True)
        widget.update_layout(fig.layout.to_plotly_json(), overwrite=True)


def _row(tag: str, texts: tuple[str, ...]) -> str:
    cells = (f'<{tag} style="{CELL}">{html.escape(text)}</{tag}>' for text in texts)
    return f"<tr>{''.join(cells)}</tr>"


def _menu(name: str, options: Any) -> Any:
    return ipywidgets.Dropdown(options=options, description=name)


def _slider(name: str) -> Any:
    return ipywidgets.IntSlider(1, 1, 1, description=name, continuous_update=False)
