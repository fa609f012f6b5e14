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
    shared = {"x": x, "customdata": [escape(cut(prompt, 80)) for prompt in result.prompts]}
    fig = go.Figure()
    if result.targets is None:
        hover = "%{customdata}<br>%{y:.3f} nats<extra></extra>"
        kl = rounded(result.divergence)
        fig.add_bar(y=kl, name="KL", marker={"color": BLUE}, hovertemplate=hover, **shared)
        fig.update_yaxes(title_text="KL of the next token (nats)", rangemode="tozero")
    else:
        runs = ("before", GREY, "circle-open"), ("after", ORANGE, "circle")
        for name, colour, symbol in runs:
            marker = {"color": colour, "symbol": symbol, "size": 10}
            y = rounded(100 * getattr(result, name))
            hover = f"%{{customdata}}<br>%{{y:.2f}} %<extra>{name}</extra>"
            fig.add_scatter(y=y, mode="markers", name=name, marker=marker, hovertemplate=hover, **shared)
        fig.update_yaxes(title_text="P(target), per token (%)", range=[-3, 103])
    fig.update_xaxes(title_text="prompt", type="category")
    subtitle = f"{len(result.prompts)} prompts · from {escape(result.source)}{model_note(result)}"
    return finish(fig, f"Patching {name_heads(result.heads)}", subtitle, height=400)
