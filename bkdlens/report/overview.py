"""The tables of the report: a number, and its interval and count in smaller type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.display.text import (
    coefficient_text,
    interval_text,
    join_words,
    percent,
    plain_json,
    signed,
    spread_text,
)
from bkdlens.metrics import Rate
from bkdlens.report.selection import MAIN, TOP_SHARE, by_condition, fewest_heads, steering_layer
from bkdlens.study import Study
from bkdlens.types import Head


@dataclass(frozen=True)
class Cell:
    """A number, and its interval and count in smaller type."""

    text: str
    small: str = ""


Rows: TypeAlias = list[list[Cell | str]]


@dataclass(frozen=True)
class Table:
    """A table; ``folded`` ones open on demand; on a phone ``texts`` become cards, ``fit`` ones wrap."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    folded: bool = False
    texts: bool = False
    fit: bool = False


def headline_table(study: Study) -> Table | None:
    """How every condition behaves."""
    found = by_condition(study, "behaviour-", BehaviourResult)
    if not found:
        return None
    columns = (
        "condition",
        "attack success (ASR)",
        "false triggers (FTR)",
        "near trigger",
        "clean accuracy",
    )
    rows: Rows = [
        [r.label, rate_cell(r.asr), rate_cell(r.ftr), rate_cell(r.near), rate_cell(r.clean_accuracy)]
        for r in found.values()
    ]
    return Table("", columns, rows)


def overview_table(studies: Sequence[Study]) -> Table | None:
    """One row a study, for more than one."""
    if len(studies) < 2:
        return None
    rows: Rows = []
    for study in studies:
        main = by_condition(study, "behaviour-", BehaviourResult).get(MAIN)
        attribution = by_condition(study, "attribution-", HeadAttribution).get(MAIN)
        test = study.results.get("steering-test")
        top: Cell | str = "not run"
        if attribution is not None:
            n = attribution.acie.numel()
            few = max(1, round(TOP_SHARE * n))
            share = percent(attribution.concentration[few - 1])
            top = Cell(share, f"{few} of {n} heads")
        on: Cell | str = "not run"
        off = on
        if isinstance(test, SteeringResult):
            on, off = (_reached(study, test, sign) for sign in (1, -1))
        rows.append(
            [study.name, rate_cell(main.asr) if main else "not run",
             rate_cell(main.clean_accuracy) if main else "not run", top, _halving(study), on, off]
        )  # fmt: skip
    columns = ("study", "attack success", "clean accuracy", "top 3 % of heads carry",
               "heads to halve it", "attack, vector added",
               "attack, vector subtracted")  # fmt: skip
    return Table("", columns, rows)


def _halving(study: Study) -> Cell | str:
    result = study.results.get("ablation")
    if not isinstance(result, AblationResult):
        return "not run"
    return ", ".join(f"{mode} {fewest_heads(result, mode) or 'none'}" for mode in result.modes)


def _reached(study: Study, test: SteeringResult, sign: int) -> Cell | str:
    """Attack success on the test pairs at the study's layer and the first coefficient of one sign."""
    chosen = [c for c in test.coefficients if c * sign > 0]
    if not chosen:
        return "not run"
    coefficient, layer = chosen[0], steering_layer(study, test)
    cell = rate_cell(test.rate("attack", layer, coefficient))
    return Cell(cell.text, f"{cell.small} · {coefficient_text(coefficient)}, layer {layer}")


def probe_table(probes: Sequence[ProbeResult]) -> Table:
    """One row a probe and layer."""
    rows: Rows = [
        [probe.label, probe.kind.upper(), probe.against, str(layer), rate_cell(probe.rate(layer)),
         f"{float(probe.auroc[layer]):.3f}", percent(probe.validation[layer]),
         percent(probe.few_shot[layer]), f"{float(probe.separation[layer]):.2f}"]
        for probe in probes for layer in range(len(probe.n_correct))
    ]  # fmt: skip
    columns = ("condition", "probe", "against", "layer", "test accuracy", "AUROC", "validation",
               "few-shot", "separation")  # fmt: skip
    return Table("Probe numbers by layer", columns, rows, folded=True)


def head_table(main: HeadAttribution, others: Sequence[HeadAttribution], top: int = 16) -> Table:
    """The first heads of ``main``, with what they do in the controls; ≈ marks estimates."""
    positive = main.acie.clamp(min=0)
    total = float(positive.sum()) or 1.0
    rows: Rows = []
    so_far = 0.0
    for rank, head in enumerate(main.top(top), start=1):
        so_far += float(positive[head])
        rows.append(
            [str(rank), str(head),
             Cell(_effect(main, head),
                  f"{signed(main.low[head], 4)} to {signed(main.high[head], 4)}"),
             signed(main.acie_first[head], 4), percent(so_far / total),
             *(_effect(other, head) for other in others)]
        )  # fmt: skip
    columns = ("rank", "head", "ACIE", "first token", "share so far",
               *(f"ACIE, {other.label}" for other in others))  # fmt: skip
    estimated = "" if bool(main.exact.all()) else " (≈ estimated, not patched)"
    return Table(f"Top heads of {main.label}{estimated}", columns, rows)


def layer_table(main: HeadAttribution) -> Table | None:
    """Whole attention and MLP outputs beside the heads' sum, where they were patched."""
    if main.cie_attn_out is None or main.cie_mlp_out is None:
        return None
    frame = main.layers_frame()
    sums = float(frame.attn_out.clip(lower=0).sum() + frame.mlp_out.clip(lower=0).sum()) or 1.0
    sign = "≈ " if main.method == "atp" else ""
    rows: Rows = [
        [str(row.layer), signed(row.heads_sum, 4),
         *(part for name in ("attn_out", "mlp_out") for part in (
             Cell(sign + signed(getattr(row, name), 4),
                  f"{signed(getattr(row, f'{name}_low'), 4)} to "
                  f"{signed(getattr(row, f'{name}_high'), 4)}"),
             percent(max(0.0, getattr(row, name)) / sums)))]
        for row in frame.itertuples()
    ]  # fmt: skip
    columns = ("layer", "heads one by one, sum", "attention output, ACIE", "share",
               "MLP output, ACIE", "share")  # fmt: skip
    title = "Whole layer outputs (share: of the positive effects of all of them)"
    return Table(title, columns, rows, folded=True)


def _effect(attribution: HeadAttribution, head: Head) -> str:
    return ("" if bool(attribution.exact[head]) else "≈ ") + signed(attribution.acie[head], 4)


def ablation_table(result: AblationResult) -> Table:
    """One row a mode and number of heads, with the random groups where there are any."""
    measured = ("attack", "restored", "clean")
    n_groups = result.random_attack.shape[-1]
    rows: Rows = [
        [mode, str(n), *(rate_cell(result.rate(what, mode, n)) for what in measured),
         *(_random_cell(result, what, mode, n) for what in measured if n_groups)]
        for mode in result.modes for n in result.counts
    ]  # fmt: skip
    columns = ["mode", "heads", *measured]
    title = "Ablation numbers"
    if n_groups:
        columns += [f"random: {what}" for what in measured]
        title += f" (random groups: mean and least–most of {n_groups})"
    return Table(title, columns, rows)


def steering_table(title: str, result: SteeringResult, layers: Sequence[int], *, folded: bool) -> Table:
    """One row a coefficient and layer, with the controls where there are any."""
    n = result.n_victims
    controls = [
        (name, draws)
        for name, draws in (
            ("random heads", result.random_heads), ("random noise", result.random_vectors)
        ) if draws.shape[-1]
    ]  # fmt: skip
    rows: Rows = [
        [Cell(coefficient_text(c), f"{'clean' if c > 0 else 'triggered'} prompts"), str(layer),
         rate_cell(Rate(result.base_attack[c < 0], n)), rate_cell(result.rate("attack", layer, c)),
         rate_cell(Rate(result.base_correct[c < 0], n)), rate_cell(result.rate("correct", layer, c)),
         rate_cell(result.rate("clean", layer, c)),
         *(_draws_cell(draws[j, result.layers.index(layer)], n) for _, draws in controls)]
        for j, c in enumerate(result.coefficients) for layer in layers
    ]  # fmt: skip
    columns = ("coefficient", "layer", "attack before", "attack", "right before", "right",
               "clean accuracy", *(name for name, _ in controls))  # fmt: skip
    drawn = join_words(str(draws.shape[-1]) for _, draws in controls)
    note = f" (controls: attack, mean and least–most of {drawn} draws)" if controls else ""
    return Table(title + note, columns, rows, folded=folded)


def provenance_table(study: Study) -> Table | None:
    """Where every result comes from."""
    rows: Rows = []
    for name, result in study.results.items():
        p = result.provenance
        model = ", ".join(
            f"{key} {plain_json(value)}" for key, value in p.model.items() if value is not None
        )
        rows.append(
            [name, model or "–", f"{p.data or '–'}, digest {p.data_digest or '–'}", str(p.n_pairs),
             str(p.seed), plain_json(p.prompt_format), plain_json(p.settings)]
        )  # fmt: skip
    columns = ("result", "model", "data and digest", "pairs", "seed", "prompt format", "settings")
    return Table("", columns, rows) if rows else None


def rate_cell(rate: Rate | None) -> Cell:
    """A rate in per cent, over its interval and count; a dash for None."""
    if rate is None:
        return Cell("–")
    return Cell(percent(rate.value), f"{interval_text(rate)} · {rate.successes}/{rate.n}")


def _draws_cell(draws: torch.Tensor, n: int) -> Cell:
    if not draws.numel() or not n:
        return Cell("–")
    return Cell(percent(draws.double().mean() / n), spread_text(draws, n))


def _random_cell(result: AblationResult, what: str, mode: str, count: int) -> Cell:
    at = result.modes.index(mode), result.counts.index(count)
    n = result.n_clean if what == "clean" else result.n_triggered
    return _draws_cell(getattr(result, f"random_{what}")[at], n)
