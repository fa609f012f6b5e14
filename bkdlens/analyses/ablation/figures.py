"""The figure of ablation: the attack, the right answers and the random groups, by number of heads."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.display.rates import PERCENT_AXIS, QUANTITIES, band, in_legend, marked_line, rate_trace
from bkdlens.display.style import GREY, escape, finish, model_note
from bkdlens.errors import ChoiceError
from bkdlens.metrics import Rate
from bkdlens.results import figure

TITLES = {"attack": "attack success", "correct": "right answer restored", "clean": "clean accuracy"}


@figure.register
def ablation_curve(result: AblationResult, mode: str | None = None) -> go.Figure:
    """Attack success, BASR, restored right answers and clean accuracy by number of ablated heads.

    Args:
        result: from :func:`bkdlens.ablate_heads`.
        mode: one mode; a panel each for None.

    Returns:
        A panel per mode; rates in per cent with 95 % intervals.

    Raises:
        ChoiceError: for a mode that was not run.

    Examples:
        >>> found = bkdlens.ablate_heads(model, test, heads.top(2), cache=cache, n_random=1)
        >>> fig = bkdlens.plot.ablation_curve(found)
    """
    if mode is not None and mode not in result.modes:
        raise ChoiceError("ablation mode in this result:", mode, result.modes)
    modes = result.modes if mode is None else (mode,)
    columns = min(2, len(modes))
    rows = math.ceil(len(modes) / columns)
    spacing = {"horizontal_spacing": 0.05, "vertical_spacing": 0.16 / rows}
    titles = [f"ablated by {escape(m)}" for m in modes] if mode is None else None
    fig = make_subplots(rows, columns, shared_yaxes=True, subplot_titles=titles, **spacing)
    x = [str(count) for count in result.counts]
    for i, name in enumerate(modes):
        draws = 100 * result.random_attack[result.modes.index(name)].double() / max(1, result.n_victims)
        traces = band(x, draws, "attack, random heads (min–max)", GREY, "2px,3px", i == 0)
        places = [{"mode": name, "heads": count} for count in result.counts]
        lines: dict[str, list[Rate]]
        lines = {what: [result.rate_at(what, **at) for at in places] for what in TITLES}
        told = TITLES | {"clean": result.clean_name}
        lines["basr"] = [basr for at in places if (basr := result.basr(**at)) is not None]
        if lines["basr"]:  # which results of version 0.1 lack
            told = told | {"basr": "behavioural (BASR)"}
        for what, title in told.items():
            style = in_legend(title, what, i == 0) | marked_line(*QUANTITIES[what])
            rates = lines[what]
            traces.append(rate_trace(x, rates, "%{x} heads", interval=what == "attack", **style))
        fig.add_traces(traces, rows=1 + i // columns, cols=1 + i % columns)
    fig.update_xaxes(type="category")
    fig.update_xaxes(title_text="heads ablated, strongest first", row=rows)
    fig.update_yaxes(**PERCENT_AXIS)
    fig.update_yaxes(title_text="rate (%)", col=1)
    by = "" if mode is None else f"by {escape(mode)} · "
    subtitle = (
        f"{by}{result.n_victims} triggered victims, {result.n_clean} clean prompts · "
        f"{result.random_attack.shape[-1] or 'no'} random groups{model_note(result)}"
    )
    return finish(fig, "Ablating the top heads", subtitle, height=140 + 310 * rows)
