"""The figure of a patch: a target's probability, or the next token's divergence, prompt by prompt."""

from __future__ import annotations

import plotly.graph_objects as go

from bkdlens.analyses.patching.measure import PatchResult
from bkdlens.display.style import BLUE, GREY, ORANGE, cut, escape, finish, model_note, rounded
from bkdlens.results import figure
from bkdlens.types import name_heads


@figure.register
def patch(result: PatchResult) -> go.Figure:
    """The target's probability before and after a patch, or how far the next token moved (KL).

    Args:
        result: from :func:`bkdlens.patch_heads`.

    Returns:
        A marker or bar per prompt; probabilities in per cent, KL in nats.

    Examples:
        >>> fig = bkdlens.plot.patch(bkdlens.patch_heads(model, test.clean[:2], "L1H0", cache))
    """
    x = [str(i) for i in range(1, len(result.prompts) + 1)]
    texts = [escape(cut(prompt, 80)) for prompt in result.prompts]
    fig = go.Figure()
    if result.targets is None:
        fig.add_trace(
            go.Bar(x=x, y=rounded(result.divergence), marker={"color": BLUE}, customdata=texts,
                   name="KL", hovertemplate="%{customdata}<br>%{y:.3f} nats<extra></extra>")
        )  # fmt: skip
        fig.update_yaxes(title_text="KL of the next token (nats)", rangemode="tozero")
    else:
        drawn = (("before", result.before, GREY, "circle-open"),
                 ("after", result.after, ORANGE, "circle"))  # fmt: skip
        for name, values, colour, symbol in drawn:
            fig.add_trace(
                go.Scatter(
                    x=x, y=rounded(100 * values), mode="markers", name=name, customdata=texts,
                    marker={"color": colour, "symbol": symbol, "size": 10},
                    hovertemplate="%{customdata}<br>%{y:.2f} %<extra>" + name + "</extra>",
                )
            )  # fmt: skip
        fig.update_yaxes(title_text="P(target), per token (%)", range=[-3, 103])
    fig.update_xaxes(title_text="prompt", type="category")
    heads = name_heads(result.heads)
    return finish(
        fig, f"Patching {heads}",
        f"{len(result.prompts)} prompts · from {escape(result.source)}{model_note(result)}", height=400,
    )  # fmt: skip
