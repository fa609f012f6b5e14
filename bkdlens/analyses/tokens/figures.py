"""Figures of single prompts, token by token: where a head looks, how probable an answer's tokens are."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import torch

from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern
from bkdlens.display.heatmaps import BARE, SEQUENTIAL, box, colour_bar, written
from bkdlens.display.style import MUTED, cut, escape, finish, model_note, rounded
from bkdlens.results import figure

PER_ROW = 10  # tokens per line: wide enough to be read in a notebook


@figure.register
def attention(result: HeadPattern, *, query: int = -1) -> go.Figure:
    """Attention of one prompt token over the prompt, which reads in lines; the trigger is outlined.

    Args:
        result: from :func:`bkdlens.head_pattern`.
        query: the token that looks; the last prompt token, where interventions act, for -1.

    Returns:
        A heatmap of the prompt's tokens in reading order, in per cent.

    Examples:
        >>> look = bkdlens.head_pattern(model, test[0].triggered, "L3H2")
        >>> fig = bkdlens.plot.attention(look)
    """
    query %= len(result.tokens)
    weights = 100 * result.pattern[query, : query + 1].double()
    n, on = len(weights), result.trigger[: query + 1]
    texts, data = [], []
    for i, (token, marked) in enumerate(zip(result.tokens, on.tolist(), strict=False)):
        name = escape(cut(token, 9))
        texts.append(f"<b>{name}</b>" if marked else name)
        data.append([i, escape(token), "in the trigger" if marked else "not in the trigger"])
    heat = go.Heatmap(z=_lines(rounded(weights), None), colorscale=SEQUENTIAL, zmin=0, xgap=1, ygap=3)
    heat.update(written(_lines(texts, "")), customdata=_lines(data, [None, "", ""]), hoverongaps=False)
    heat.update(zmax=max(1.0, float(weights.max())), colorbar=colour_bar(nticks=5))
    where = "<b>%{customdata[1]}</b><br>token %{customdata[0]}, %{customdata[2]}"
    heat.update(name=str(result.head), hovertemplate=f"{where}<br>attention %{{z:.2f}} %")
    fig = go.Figure(heat)
    fig.update_layout(shapes=_outlines(on.tolist()))
    fig.update_xaxes(showticklabels=False, showline=False, **BARE)
    fig.update_yaxes(autorange="reversed", showline=False, title_text="token", **BARE)
    starts = range(0, n, PER_ROW)
    fig.update_yaxes(tickvals=list(range(len(starts))), ticktext=list(map(str, starts)))
    trigger, count = f"no trigger is marked in these {n} tokens", int(on.sum())
    if count:
        share, even = float(weights[on].sum()), f"an even share would be {100 * count / n:.1f} %"
        trigger = f"{share:.1f} % on the trigger, outlined: {count} of {n} tokens, {even}"
    who = "the last prompt token" if query == len(result.tokens) - 1 else f"token {query}"
    subtitle = f"attention of {who}{model_note(result)}<br>{trigger}"
    return finish(fig, f"Where {result.head} looks", subtitle, height=170 + 30 * max(3, len(starts)))


@figure.register
def answer_strips(result: AnswerProbs) -> go.Figure:
    """Probability of an answer's tokens, a strip per run, and their geometric mean beside it.

    Args:
        result: from :func:`bkdlens.answer_probs`.

    Returns:
        A strip per run, in per cent.

    Examples:
        >>> fig = bkdlens.plot.answer_strips(bkdlens.answer_probs(model, test[0]))
    """
    n, runs = len(result.tokens), [escape(run) for run in result.runs]
    probs = 100 * torch.cat([result.log_probs.exp(), result.whole[:, None]], dim=1).double()
    names, rows = [*map(escape, result.tokens), "the whole"], list(range(len(runs)))
    hovers = []
    for run, best, row in zip(runs, result.best, result.best_log_probs.exp().double(), strict=True):
        likely = [
            f"most probable here: {escape(token)} ({_percent(100 * p)} %)"
            for token, p in zip(best, row.tolist(), strict=True)
        ]
        likely.append("geometric mean of the tokens")
        hovers.append([[run, name, text] for name, text in zip(names, likely, strict=True)])
    texts = [[_percent(p) if n <= 16 else "" for p in row] for row in probs.tolist()]
    heat = go.Heatmap(z=rounded(probs), x=[*range(n), n + 0.25], y=rows, zmin=0, zmax=100, name="")
    heat.update(written(texts), xgap=2, ygap=4, colorscale=SEQUENTIAL)
    heat.colorbar = colour_bar(tickvals=[0, 50, 100])
    where = "%{customdata[0]}: <b>%{customdata[1]}</b>"
    hover = f"{where}<br>P = %{{z:.2f}} %<br>%{{customdata[2]}}"
    fig = go.Figure(heat.update(customdata=hovers, hovertemplate=hover))
    fig.add_vline(x=n - 0.375, line={"color": MUTED, "width": 1})
    ticks = range(0, n, -(-n // 24))
    labels = [*(escape(cut(result.tokens[i], 12)) for i in ticks), "<b>whole</b>"]
    fig.update_xaxes(tickvals=[*ticks, n + 0.25], ticktext=labels, **BARE)
    fig.update_yaxes(autorange="reversed", tickvals=rows, ticktext=runs, **BARE)
    answer, note = escape(cut(result.answer, 70)), model_note(result)
    subtitle = f"“{answer}”<br>per cent, each token after the answer's own start{note}"
    return finish(fig, "The answer's probability, token by token", subtitle, height=170 + 42 * len(runs))


def _percent(p: float) -> str:
    """A whole number; below one per cent, one digit."""
    return f"{p:.0f}" if p >= 0.95 else f"{p:.1f}" if p >= 0.05 else "<0.1"


def _lines(values: list[Any], blank: Any) -> list[list[Any]]:
    """The values in lines, the last one filled up."""
    filled = [*values, *[blank] * (-len(values) % PER_ROW)]
    return [filled[i : i + PER_ROW] for i in range(0, len(filled), PER_ROW)]


def _outlines(on: list[bool]) -> list[dict[str, Any]]:
    """A box around each run of marked cells of a line."""
    shapes = []
    for start in (i for i, marked in enumerate(on) if marked):
        row, column = divmod(start, PER_ROW)
        if column and on[start - 1]:
            continue
        end = next((i for i in range(start, len(on)) if not on[i]), len(on))
        shapes.append(box(column, row, 1.8, cells=min(end - start, PER_ROW - column)))
    return shapes
