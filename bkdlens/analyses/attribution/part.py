"""Head attribution in a study: the strongest heads of every condition, and how few carry the effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

from rich.console import RenderableType

from bkdlens.analyses.attribution import figures
from bkdlens.analyses.attribution.claims import (
    RANKING,
    by_condition,
    claims,
    largest,
    layer_shares,
    measured,
    ranked,
    top_count,
)
from bkdlens.analyses.attribution.measure import HeadAttribution, attribute_heads
from bkdlens.analyses.attribution.terminal import heatmap
from bkdlens.analyses.attribution.verdict import verdict
from bkdlens.analyses.base import Drawing, Part, Subject, unchanged
from bkdlens.data.pairs import PairSet
from bkdlens.display.drawing import Drawer
from bkdlens.display.tables import NOT_RUN, Basis, Cell, Number, Rows, Section, Table, other_models
from bkdlens.display.text import magnitude, percent, signed
from bkdlens.study import MAIN, Study
from bkdlens.types import AttributionMethod, Head

NAME = "attribution"
TOP = 8  # heads in the terminal's table and for machines


def run(subject: Subject) -> None:
    """The effect of every head, and of whole layer outputs, on the test pairs.

    What is patched in is the mean over the training pairs. The suspected model's heads are ranked on the
    validation pairs, so that the effects of the first ones are not the largest by chance.
    """
    run, settings = subject.run, subject.run.settings

    def attribute(pairs: PairSet) -> HeadAttribution:
        return attribute_heads(
            subject.model,
            pairs,
            cache=subject.cache,
            n_pairs=settings.n_attribution,
            method=cast(AttributionMethod, settings.attribution_method),
            layer_outputs=settings.layer_outputs,
            end_token=settings.attribution_end_token,
            label=subject.condition,
            seed=settings.seed,
            **run.options,
        )

    if subject.is_main:
        run.ranking = run.step(RANKING, partial(attribute, run.validation)).ranking
    run.step(f"{NAME}-{subject.condition}", partial(attribute, run.test))


def basis(study: Study) -> Basis:
    """The method, its settings, and un-poisoned models as controls."""
    found = by_condition(study)
    main, split = found[MAIN], "test " if RANKING in study.results else ""
    return Basis.of(
        main,
        f"last prompt token, prefill only; method {main.method}",
        f"{main.cie.shape[0]} {split}pairs, {main.acie.numel()} heads, 95 % bootstrap over pairs",
        other_models(found),
        ["site", "source", "victims_only", "end_token", "max_answer_tokens", "confirm"],
    )


def sections(study: Study, draw: Drawer) -> list[Section]:
    """Heatmaps of the whole answer and of its first token, the share of few heads, and the numbers."""
    parts: list[Any] = []
    data = measured(study)
    if data:
        main, *others = data.values()
        heads, ranks = ranked(study, main), _ranking(study)
        width = 250 * len(data) if others else 0
        for first in (False, True):
            fig = figures.attribution_controls(main, others, first_token=first, ranking=ranks)
            parts.append([draw(fig, width, data=data)])
        parts.append([draw(figures.sparsity([main, *others], ranking=ranks), data=data)])
        parts.append(head_table(main, others, heads, title=_title(study, main)))
        layers = layer_table(main)
        parts += [layers] if layers else []
    section = Section(
        NAME,
        "Head attribution",
        "The mean activation of one head over triggered prompts is patched into a clean run at the "
        "last prompt token. ACIE is how much that raises the probability of the backdoor's answer "
        f"(per-token geometric mean), averaged over pairs{_which_pairs(study)}. It has a floor and a "
        "ceiling, so use it to rank heads; the first-token effect is shown beside it.",
        "All panels share one colour scale, and the outlines are the backdoored model's top heads: in "
        "a model without the backdoor they should be blank. The curves show how few heads carry the "
        "summed positive effect; for a control with a tiny sum, a steep curve is only noise.",
        parts,
    )
    return [section]


def tables(study: Study, width: int, unicode: bool) -> Iterator[Table | RenderableType]:
    """The heatmap, the top heads, and whole layer outputs."""
    found = by_condition(study)
    main = found.pop(MAIN, None)
    if main is None:
        return
    yield heatmap(main, width, unicode=unicode)
    title = f"Top {TOP} heads, with 95 % interval{_by_validation(study)}"
    yield head_table(main, list(found.values()), ranked(study, main), TOP, title)
    layers = layer_table(main)
    if layers is not None:
        yield layers


def overview(study: Study) -> dict[str, Cell]:
    """What the paper's share of the heads carries."""
    main = by_condition(study).get(MAIN)
    return {"top 3 % of heads carry": NOT_RUN if main is None else _carried(study, main)}


def numbers(study: Study) -> dict[str, Number]:
    """The strongest head, how few carry the effect, attention against MLP, and the controls."""
    controls = by_condition(study)
    main = controls.pop(MAIN, None)
    found: dict[str, Number] = {}
    if main is not None:
        top, shares = ranked(study, main)[0], layer_shares(main)
        interval = f"{signed(main.low[top])} to {signed(main.high[top])} · {main.cie.shape[0]} pairs"
        found["strongest head, ACIE"] = Cell(f"{top} {signed(main.acie[top])}", interval)
        found["top 3 % of heads carry"] = _carried(study, main)
        if shares is not None:
            text = f"{percent(shares[0])} / {percent(shares[1])}"
            found["whole outputs: attention / MLP share"] = Cell(text)
    for name, other in controls.items():
        found[f"largest |ACIE|, {name} (control)"] = Cell(magnitude(largest(other)))
    return found


def drawing(study: Study) -> Drawing | None:
    """The heatmap of the suspected model."""
    main = by_condition(study).get(MAIN)
    if main is None:
        return None
    fig = figures.attribution_controls(main, (), ranking=_ranking(study))
    return fig, {f"{NAME}-{MAIN}": main}


def summary(study: Study) -> dict[str, Any]:
    """The top heads of every condition: the suspected model's as the validation pairs rank them."""
    found = {
        name: [
            {
                "head": str(head),
                "acie": float(heads.acie[head]),
                "interval": [float(heads.low[head]), float(heads.high[head])],
            }
            for head in (ranked(study, heads) if name == MAIN else heads.ranking)[:TOP]
        ]
        for name, heads in by_condition(study).items()
    }
    return {"attribution": found} if found else {}


def head_table(
    main: HeadAttribution,
    others: Sequence[HeadAttribution],
    ranking: Sequence[Head],
    top: int = 16,
    title: str = "",
) -> Table:
    """The first heads of ``ranking``: what they do in ``main`` and the controls; ≈ marks estimates."""
    heads = ranking[:top]
    rows: Rows = [
        [
            str(rank),
            str(head),
            Cell(_effect(main, head), f"{signed(main.low[head], 4)} to {signed(main.high[head], 4)}"),
            signed(main.acie_first[head], 4),
            percent(share),
            *(_effect(other, head) for other in others),
        ]
        for rank, (head, share) in enumerate(zip(heads, main.carried(heads), strict=True), start=1)
    ]
    controls = [f"ACIE, {other.label}" for other in others]
    columns = ["rank", "head", "ACIE", "first token", "share so far", *controls]
    return Table(title, columns, rows)


def layer_table(main: HeadAttribution) -> Table | None:
    """Whole attention and MLP outputs beside the heads' sum, where they were patched."""
    if main.cie_attn_out is None or main.cie_mlp_out is None:
        return None
    frame = main.layers_frame()
    sums = float(frame.attn_out.clip(lower=0).sum() + frame.mlp_out.clip(lower=0).sum()) or 1.0
    sign = "≈ " if main.method == "atp" else ""

    def cells(row: Any, name: str) -> tuple[Cell, str]:
        value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        interval = f"{signed(low, 4)} to {signed(high, 4)}"
        return Cell(sign + signed(value, 4), interval), percent(max(0.0, value) / sums)

    rows: Rows = [
        [str(int(row.layer)), signed(row.heads_sum, 4), *cells(row, "attn_out"), *cells(row, "mlp_out")]
        for _, row in frame.iterrows()
    ]
    sides = ("attention output, ACIE", "share", "MLP output, ACIE", "share")
    title = "Whole layer outputs (share: of the positive effects of all of them)"
    return Table(title, ("layer", "heads one by one, sum", *sides), rows, folded=True)


def _carried(study: Study, main: HeadAttribution) -> Cell:
    few = top_count(main)
    share = main.carried(ranked(study, main)[:few])[-1]
    return Cell(percent(share), f"{few} of {main.acie.numel()} heads{_by_validation(study)}")


def _ranking(study: Study) -> HeadAttribution | None:
    """The result on the validation pairs; None of version 0.1."""
    return study.get(RANKING, HeadAttribution)


def _by_validation(study: Study) -> str:
    return "" if _ranking(study) is None else ", ranked on the validation pairs"


def _which_pairs(study: Study) -> str:
    if _ranking(study) is None:
        return ""
    return (
        " of the test set; the mean is over the training pairs, and the backdoored model's heads are "
        "ranked on the validation pairs, so that the first are not the largest by chance"
    )


def _title(study: Study, main: HeadAttribution) -> str:
    estimated = "" if bool(main.exact.all()) else " (≈ estimated, not patched)"
    return f"Top heads of {main.label}{_by_validation(study)}{estimated}"


def _effect(attribution: HeadAttribution, head: Head) -> str:
    return ("" if bool(attribution.exact[head]) else "≈ ") + signed(attribution.acie[head], 4)


PART = Part(
    name=NAME, step="attribute", needs=(), for_controls=True, run=run, claims=claims, basis=basis,
    sections=sections, tables=tables, overview=overview, numbers=numbers, drawing=drawing,
    summary=summary, verdict=verdict, rechoose=unchanged,
)  # fmt: skip
