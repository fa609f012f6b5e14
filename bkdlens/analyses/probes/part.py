"""Probes in a study: of every condition, against clean and near-trigger prompts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, cast

from bkdlens.analyses.base import Drawing, Part, Subject, unchanged
from bkdlens.analyses.probes import figures
from bkdlens.analyses.probes.measure import ProbeResult, train_probes
from bkdlens.analyses.probes.verdict import verdict
from bkdlens.counts import Draws
from bkdlens.display.drawing import Drawer
from bkdlens.display.tables import Basis, Cell, Number, Rows, Section, Table, other_models, rate_cell
from bkdlens.display.text import join_words, percent, rate_text, short_rate, spread_text
from bkdlens.study import MAIN, Study
from bkdlens.types import ProbeKind

NAME = "probe"
Groups = dict[tuple[str, str], dict[str, ProbeResult]]  # (kind, against), then condition


def grouped(study: Study) -> Groups:
    """The study's probes by (kind, against), each by condition; those against clean prompts first."""
    groups: Groups = {}
    for probe in study.named(ProbeResult).values():
        groups.setdefault((probe.kind, probe.against), {})[probe.label] = probe
    return dict(sorted(groups.items(), key=lambda item: item[0][::-1]))


def best_layer(probe: ProbeResult) -> int:
    """The layer that is best on the validation prompts, so that its test rate is not selected."""
    return int(probe.validation.argmax())


def best_rate(probe: ProbeResult) -> str:
    """The test accuracy at :func:`best_layer`, in words."""
    layer = best_layer(probe)
    return f"{short_rate(probe.rate(layer))} at layer {layer}"


def few_shot_layer(probe: ProbeResult) -> int:
    """The layer that is best from a few prompts on the validation prompts (of version 0.1: from all)."""
    if probe.few_shot_validation is None:
        return best_layer(probe)
    return int(probe.few_shot_validation.argmax())


def few_shot_draws(probe: ProbeResult) -> Draws | None:
    """The draws at :func:`few_shot_layer`; None where only their mean was kept."""
    if probe.few_shot_correct is None:
        return None
    return Draws(probe.few_shot_correct[few_shot_layer(probe)], probe.n_test)


def few_shot_cell(probe: ProbeResult) -> Cell:
    """The few-shot accuracy at :func:`few_shot_layer`, with the least and the most of its draws."""
    layer, draws = few_shot_layer(probe), few_shot_draws(probe)
    spread = f"{spread_text(draws)} · " if draws else ""
    return Cell(percent(probe.few_shot[layer]), f"{spread}layer {layer}")


def run(subject: Subject) -> None:
    """One step per kind of probe and per set of prompts that it tells from the triggered ones.

    Fit on validation pairs, because the training pairs may have tuned the model; tested on test pairs.
    """
    run, settings = subject.run, subject.run.settings

    def train(kind: str, against: Literal["clean", "near"]) -> ProbeResult:
        return train_probes(
            subject.validation_cache,
            test=subject.test_cache,
            kind=cast(ProbeKind, kind),
            against=against,
            label=subject.condition,
            seed=settings.seed,
            progress=run.progress,
        )

    has_near = all(pair.near is not None for pairs in (run.validation, run.test) for pair in pairs)
    sides: list[Literal["clean", "near"]] = ["clean", "near"] if has_near else ["clean"]
    for kind in settings.probe_kinds:
        for against in sides:
            run.step(f"{NAME}-{subject.condition}-{kind}-{against}", partial(train, kind, against))


def claims(study: Study) -> list[str]:
    """Test accuracy at the layer chosen on validation, beside the controls', which may reach it too."""
    sentences = []
    groups = grouped(study)
    last_kind = {against: kind for kind, against in groups}
    for (kind, against), found in groups.items():
        if MAIN not in found:
            continue
        main, layer = found[MAIN], best_layer(found[MAIN])
        controls = {name: probe for name, probe in found.items() if name != MAIN}
        text = (
            f"{kind.upper()} probes tell triggered from {against} prompts with "
            f"{rate_text(main.rate(layer))} at layer {layer} (best on the validation prompts)"
            + "".join(f"; {name}: {best_rate(probe)}" for name, probe in controls.items())
            + "."
        )
        low = main.rate(layer).interval[0]
        reached = [n for n, p in controls.items() if p.rate(best_layer(p)).interval[1] >= low]
        if reached:
            one = len(reached) == 1
            text += (
                f" The interval{'' if one else 's'} of {join_words(reached)} reach{'es' if one else ''} "
                "it, so this accuracy alone is no sign of a backdoor."
            )
        elif controls:
            text += " No control's interval reaches it."
        else:
            text += (
                " No un-poisoned control was run, which may reach as much, so nothing can be concluded "
                "about a backdoor."
            )
        if kind == last_kind[against]:  # few-shot accuracy does not depend on the probe's kind
            shots = main.provenance.settings.get("shots", "A few")
            best = ", ".join(f"{n} {_few_shot(probe)}" for n, probe in found.items())
            text += (
                f" From {shots} prompts per class, at the layer that is best on the validation prompts: "
                f"{best}."
            )
        sentences.append(text)
    return sentences


def _few_shot(probe: ProbeResult) -> str:
    """Mean and spread of the few-shot accuracy, in words."""
    layer, draws = few_shot_layer(probe), few_shot_draws(probe)
    spread = f" ({spread_text(draws)} over {len(draws)} draws)" if draws else ""
    return f"{percent(probe.few_shot[layer])}{spread} at layer {layer}"


def basis(study: Study) -> Basis:
    """The position, the split, and un-poisoned models and near triggers as controls."""
    groups = grouped(study)
    main = next(found[MAIN] for found in groups.values() if MAIN in found)
    near = ["probes against near triggers"] if any(against == "near" for _, against in groups) else []
    models = dict.fromkeys(name for found in groups.values() for name in other_models(found))
    return Basis.of(
        main,
        "residual stream at the last prompt token",
        f"{main.n_test} test prompts per probe, half of them triggered",
        [*near, *models],
        ["split", "shots", "fit", "tested"],
    )


def sections(study: Study, draw: Drawer) -> list[Section]:
    """Accuracy by layer per kind, few-shot accuracy, separation, the matrices, and every number."""
    groups = grouped(study)
    probes = [probe for found in groups.values() for probe in found.values()]
    data = study.named(ProbeResult)
    parts: list[Any] = [
        [draw(figures.layer_accuracy([p for p in probes if p.kind == kind]), data=data)]
        for kind in dict.fromkeys(probe.kind for probe in probes)
    ]
    # Few-shot accuracy and separation do not depend on the kind of the probe.
    first = {(p.label, p.against): p for p in reversed(probes)}
    once = [probe for probe in probes if probe is first[probe.label, probe.against]]
    if once:
        parts.append([draw(figures.layer_accuracy(once, "few_shot"), data=data)])
        parts.append([draw(figures.layer_accuracy(once, "separation"), data=data)])
    parts += [[draw(figures.ilca_controls(list(g.values())), data=data)] for g in groups.values()]
    parts += [_by_layer(probes)] if probes else []
    section = Section(
        NAME,
        "Probes",
        "A classifier is trained at each layer to tell triggered from clean (or near-trigger) "
        f"prompts by the residual stream at the last prompt token, {_fitted_on(probes)}. The "
        "matrices show a probe trained at one layer and tested at "
        "another: large even squares mean that layers write the difference in the same way.",
        "Any difference in the text can be read off, in an un-poisoned model too. Compare with the "
        "controls: what marks a backdoored model is often not the accuracy but how few prompts it takes "
        "and how far the classes lie from each other.",
        parts,
    )
    return [section]


def tables(study: Study, width: int, unicode: bool) -> Iterator[Table]:
    """One row per probe, at its best layer on validation."""
    rows: Rows = []
    for (kind, against), found in grouped(study).items():
        for name, probe in found.items():
            layer = best_layer(probe)
            few_shot, separation = few_shot_cell(probe), f"{float(probe.separation[layer]):.2f}"
            accuracy = rate_cell(probe.rate(layer))
            rows.append([name, kind.upper(), against, str(layer), accuracy, few_shot, separation])
    columns = "condition|probe|against|layer|accuracy|few-shot, its best layer|separation".split("|")
    if rows:
        yield Table("Probes, at the layer that is best on the validation prompts", columns, rows)


def overview(study: Study) -> dict[str, Cell]:
    """No column: accuracy alone is no sign of a backdoor."""
    return {}


def numbers(study: Study) -> dict[str, Number]:
    """Test accuracy of one kind of probe, which is enough here; each study's own part has all."""
    found: dict[str, Number] = {}
    groups = grouped(study)
    kinds = {kind for kind, _ in groups}
    shown = "svm" if "svm" in kinds else None
    for (kind, against), probes in groups.items():
        if shown in (kind, None):
            for name, probe in probes.items():
                layer = best_layer(probe)
                control = "" if name == MAIN else f", {name} (control)"
                title = f"{kind.upper()} probe against {against}{control}"
                found[title] = probe.rate(layer), f"layer {layer}"
    return found


def drawing(study: Study) -> Drawing | None:
    """Accuracy of the SVM against clean prompts where there is one, or else of the first kind."""
    groups = grouped(study)
    if not groups:
        return None
    found = groups.get(("svm", "clean")) or next(iter(groups.values()))
    probes = list(found.values())
    data = {name: p for name, p in study.named(ProbeResult).items() if any(p is q for q in probes)}
    return figures.layer_accuracy(probes), data


def summary(study: Study) -> dict[str, Any]:
    """Test accuracy of every probe by layer."""
    found = {
        f"{probe.label}-{probe.kind}-{probe.against}": [
            probe.rate(layer).to_dict() for layer in range(len(probe.n_correct))
        ]
        for probe in study.named(ProbeResult).values()
    }
    return {"probes": found} if found else {}


def _fitted_on(probes: list[ProbeResult]) -> str:
    """Which pairs fit the probes and which tested them, in words."""
    if any(len(probe.provenance.settings.get("split", ())) == 2 for probe in probes):
        return (
            "on the validation pairs (three quarters fit it, one quarter chooses the layer), and tested "
            "on the test pairs"
        )
    return "with pairs split 6:2:2, and tested on pairs that did not fit it"


def _by_layer(probes: list[ProbeResult]) -> Table:
    """One row per probe and layer."""
    rows: Rows = [
        [
            probe.label,
            probe.kind.upper(),
            probe.against,
            str(layer),
            rate_cell(probe.rate(layer)),
            f"{float(probe.auroc[layer]):.3f}",
            percent(probe.validation[layer]),
            percent(probe.few_shot[layer]),
            f"{float(probe.separation[layer]):.2f}",
        ]
        for probe in probes
        for layer in range(len(probe.n_correct))
    ]
    columns = "condition,probe,against,layer,test accuracy,AUROC,validation,few-shot,separation"
    return Table("Probe numbers by layer", columns.split(","), rows, folded=True)


PART = Part(
    name=NAME, step="probe", needs=(), for_controls=True, run=run, claims=claims, basis=basis,
    sections=sections, tables=tables, overview=overview, numbers=numbers, drawing=drawing,
    summary=summary, verdict=verdict, rechoose=unchanged,
)  # fmt: skip
