"""Figures of single prompts, token by token: where a head looks, how probable an answer's tokens are."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import torch

from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern
from bkdlens.display.style import INK, MUTED, SEQUENTIAL, cut, escape, finish, model_note, rounded
from bkdlens.results import figure

PER_ROW = 10  # tokens a line: wide enough to be read in a notebook
BLANK: tuple[Any, Any, Any] = (None, "", [None, "", ""])  # value, text and hover of no token


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
    rows = -(-n // PER_ROW)
    z, texts, more = ([[fill] * PER_ROW for _ in range(rows)] for fill in BLANK)
    for i, (weight, token) in enumerate(zip(rounded(weights), result.tokens, strict=False)):
        row, column = divmod(i, PER_ROW)
        name = escape(cut(token, 9))
        z[row][column] = weight
        texts[row][column] = f"<b>{name}</b>" if on[i] else name
        more[row][column] = [i, escape(token), "in the trigger" if on[i] else "not in the trigger"]
    top = max(1.0, float(weights.max()))
    fig = go.Figure(
        go.Heatmap(
            z=z, text=texts, customdata=more, texttemplate="%{text}", textfont={"size": 11}, xgap=1,
            ygap=3, zmin=0, zmax=top, colorscale=SEQUENTIAL, hoverongaps=False, name=str(result.head),
            colorbar={"title": {"text": "%"}, "thickness": 12, "nticks": 5},
            hovertemplate="<b>%{customdata[1]}</b><br>token %{customdata[0]}, %{customdata[2]}<br>"
            "attention %{z:.2f} %",
        )
    )  # fmt: skip
    fig.update_layout(shapes=_outlines(on.tolist()))
    fig.update_xaxes(showticklabels=False, showgrid=False, ticks="", showline=False)
    fig.update_yaxes(
        autorange="reversed", showgrid=False, ticks="", showline=False, title_text="token",
        tickvals=list(range(rows)), ticktext=[str(PER_ROW * row) for row in range(rows)],
    )  # fmt: skip
    count, share = int(on.sum()), float(weights[on].sum())
    trigger = (
        f"{share:.1f} % on the trigger, outlined: {count} of {n} tokens, an even share would be "
        f"{100 * count / n:.1f} %"
        if count
        else f"no trigger is marked in these {n} tokens"
    )
    who = "the last prompt token" if query == len(result.tokens) - 1 else f"token {query}"
    return finish(
        fig, f"Where {result.head} looks", f"attention of {who}{model_note(result)}<br>{trigger}",
        height=170 + 30 * max(3, rows),
    )  # fmt: skip


@figure.register
def answer_strips(result: AnswerProbs) -> go.Figure:
    """Probability of an answer's tokens, a strip a run; beside it the geometric mean of the whole.

    Args:
        result: from :func:`bkdlens.answer_probs`.

    Returns:
        A strip per run, in per cent.

    Examples:
        >>> fig = bkdlens.plot.answer_strips(bkdlens.answer_probs(model, test[0]))
    """
    n = len(result.tokens)
    probs = 100 * torch.cat([result.log_probs.exp(), result.whole[:, None]], dim=1).double()
    best = 100 * result.best_log_probs.exp().double()
    texts = [[_percent(p) if n <= 16 else "" for p in row] for row in probs.tolist()]
    hovers = [
        [f"most probable here: {escape(token)} ({_percent(p)} %)"
         for token, p in zip(tokens, row, strict=True)] + ["geometric mean of the tokens"]
        for tokens, row in zip(result.best, best.tolist(), strict=True)
    ]  # fmt: skip
    names = [*map(escape, result.tokens), "the whole"]
    fig = go.Figure(
        go.Heatmap(
            z=rounded(probs), x=[*range(n), n + 0.25], y=list(range(len(result.runs))), text=texts,
            texttemplate="%{text}", textfont={"size": 11}, xgap=2, ygap=4, zmin=0, zmax=100,
            colorscale=SEQUENTIAL, name="",
            customdata=[
                [[escape(run), what, more] for what, more in zip(names, row, strict=True)]
                for run, row in zip(result.runs, hovers, strict=True)
            ],
            colorbar={"title": {"text": "%"}, "thickness": 12, "tickvals": [0, 50, 100]},
            hovertemplate="%{customdata[0]}: <b>%{customdata[1]}</b><br>P = %{z:.2f} %<br>"
            "%{customdata[2]}",
        )
    )  # fmt: skip
    fig.add_vline(x=n - 0.375, line={"color": MUTED, "width": 1})
    every = -(-n // 24)
    ticks = [i for i in range(n) if i % every == 0]
    fig.update_xaxes(
        tickvals=[*ticks, n + 0.25], showgrid=False, ticks="",
        ticktext=[*(escape(cut(result.tokens[i], 12)) for i in ticks), "<b>whole</b>"],
    )  # fmt: skip
    fig.update_yaxes(
        autorange="reversed", showgrid=False, ticks="", tickvals=list(range(len(result.runs))),
        ticktext=[escape(run) for run in result.runs],
    )  # fmt: skip
    return finish(
        fig, "The answer's probability, token by token",
        f"“{escape(cut(result.answer, 70))}”<br>per cent, each token after the answer's own start"
        f"{model_note(result)}",
        height=170 + 42 * len(result.runs),
    )  # fmt: skip


def _percent(p: float) -> str:
    """A whole number; below one per cent, one digit."""
    return f"{p:.0f}" if p >= 0.95 else f"{p:.1f}" if p >= 0.05 else "<0.1"


def _outlines(on: list[bool]) -> list[dict[str, Any]]:
    """A box around each run of marked cells of a line."""
    shapes = []
    for start in (i for i, marked in enumerate(on) if marked):
        row, column = divmod(start, PER_ROW)
        if column and on[start - 1]:
            continue
        end = next((i for i in range(start, len(on)) if not on[i]), len(on))
        last = min(end - row * PER_ROW, PER_ROW)
        shapes.append(
            {"type": "rect", "x0": column - 0.5, "x1": last - 0.5, "y0": row - 0.5, "y1": row + 0.5,
             "line": {"color": INK, "width": 1.8}}
        )  # fmt: skip
    return shapes
