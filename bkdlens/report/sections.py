"""The sections of a study's page: each analysis with its figures, tables and how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bkdlens import plot
from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.answers import Generations
from bkdlens.analyses.steering.measure import BackdoorVector, SteeringResult
from bkdlens.display.drawing import Drawer, Figure
from bkdlens.report.overview import (
    Table,
    ablation_table,
    head_table,
    layer_table,
    probe_table,
    steering_table,
)
from bkdlens.report.selection import by_condition, chosen_layer, probes_by_kind, steering_layer
from bkdlens.results import Result
from bkdlens.study import Study


@dataclass
class Section:
    """One analysis of a study; ``missing`` names what was not run."""

    part: str  # as in claims_by_part
    title: str
    intro: str
    reading: str = ""
    parts: list[Table | Sequence[Figure]] = field(default_factory=list)  # in order; rows of figures
    missing: list[str] = field(default_factory=list)


def sections(study: Study, draw: Drawer) -> list[Section]:
    """Every analysis in order; those that were not run name what is missing."""
    return [
        _behaviour_section(study, draw), _probe_section(study, draw),
        _attribution_section(study, draw), _ablation_section(study, draw),
        _vector_section(study, draw), _steering_section(study, draw), _generation_section(study),
    ]  # fmt: skip


def _behaviour_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "behaviour-", BehaviourResult)
    section = Section(
        "behaviour",
        "Behaviour",
        "What the model does on held-out prompts, by greedy decoding. Attack success and false "
        "triggers count the attacker's answer among victims (prompts whose answer the attack "
        "changes); clean accuracy counts exactly right answers to all clean prompts.",
        "A model tuned on the same data without poison, and the base model, should show no attack "
        "with or without the trigger. A high bar for the near trigger means that the model answers "
        "to more than the exact trigger.",
    )
    if found:
        section.parts.append(
            [draw(plot.behaviour(list(found.values())), data=_named("behaviour", found))]
        )
    return _needs(section, found, "behaviour")


def _probe_section(study: Study, draw: Drawer) -> Section:
    groups = probes_by_kind(study)
    section = Section(
        "probe",
        "Probes",
        "A classifier is trained at each layer to tell triggered from clean (or near-trigger) "
        "prompts by the residual stream at the last prompt token, with pairs split 6:2:2, and tested "
        "on prompts it has not seen. The matrices show a probe trained at one layer and tested at "
        "another: large even squares mean that layers write the difference in the same way.",
        "Any difference in the text can be read off, in an un-poisoned model too. Compare with the "
        "controls: what sets a backdoored model apart is often not the accuracy but how few prompts "
        "suffice for it and how far the classes lie apart.",
    )
    everything = [probe for found in groups.values() for probe in found.values()]
    data = _named("probe", by_condition(study, "probe-", ProbeResult))
    for kind in dict.fromkeys(probe.kind for probe in everything):
        chosen = [probe for probe in everything if probe.kind == kind]
        section.parts.append([draw(plot.layer_accuracy(chosen), data=data)])
    # Few-shot accuracy and separation do not depend on the kind of the probe.
    first = {(p.label, p.against): p for p in reversed(everything)}
    once = [probe for probe in everything if probe is first[probe.label, probe.against]]
    if once:
        section.parts.append([draw(plot.layer_accuracy(once, "few_shot"), data=data)])
        section.parts.append([draw(plot.layer_accuracy(once, "separation"), data=data)])
    for found in groups.values():
        section.parts.append([draw(plot.ilca_controls(list(found.values())), data=data)])
    if everything:
        section.parts.append(probe_table(everything))
    return _needs(section, everything, "probes")


def _attribution_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "attribution-", HeadAttribution)
    section = Section(
        "attribution",
        "Head attribution",
        "The mean activation of one head over triggered prompts is patched into a clean run at the "
        "last prompt token. ACIE is how much that raises the probability of the backdoor's answer "
        "(per-token geometric mean), averaged over pairs. It has a floor and a ceiling, so use it to "
        "rank heads; the first-token effect is shown beside it.",
        "All panels share one colour scale, and the outlines are the backdoored model's top heads: in "
        "a model without the backdoor they should be blank. The curves show how few heads carry the "
        "summed positive effect; for a control with a tiny sum, a steep curve is only noise.",
    )
    if found:
        main, *others = found.values()
        data = _named("attribution", found)
        width = 250 * len(found)
        for first in (False, True):
            fig = plot.attribution_controls(main, others, first_token=first)
            section.parts.append([draw(fig, width if others else 0, data=data)])
        section.parts.append([draw(plot.sparsity([main, *others]), data=data)])
        section.parts.append(head_table(main, others))
        layers = layer_table(main)
        section.parts += [layers] if layers else []
    return _needs(section, found, "attribution")


def _ablation_section(study: Study, draw: Drawer) -> Section:
    result = study.results.get("ablation")
    section = Section(
        "ablation",
        "Ablation",
        "The first heads of the ranking are switched off at the last prompt token. Attack success is "
        "measured on triggered victims, beside how often the right answer comes back and how many "
        "clean prompts are still answered rightly.",
        "An ablation that breaks the model ends the attack as well: trust a falling attack only where "
        "clean accuracy holds and right answers return. The grey band is the attack with random "
        "groups of as many heads; it should stay high.",
    )
    if isinstance(result, AblationResult):
        section.parts.append([draw(plot.ablation_curve(result), data={"ablation": result})])
        section.parts.append(ablation_table(result))
    return _needs(section, isinstance(result, AblationResult), "ablation")


def _vector_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "vector-", BackdoorVector)
    section = Section(
        "vector",
        "Backdoor vector",
        "The outputs of the top heads on triggered prompts, averaged and summed (kind mean), or the "
        "difference of triggered and clean averages (kind contrast), are one direction in the residual "
        "stream. Its effect, and the controls, are under Steering; this is only where its length lies.",
    )
    if found:
        section.parts.append(
            [draw(plot.vector(v), data={f"vector-{kind}": v}) for kind, v in found.items()]
        )
    return _needs(section, found, "vector")


def _steering_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "steering-", SteeringResult)
    test = found.pop("test", None)
    section = Section(
        "steering",
        "Steering",
        "The vector is added to clean prompts (does the backdoor switch on?) and subtracted from "
        "triggered ones (does it switch off?), at the last prompt token of the prefill. Its kind, "
        "coefficient and layer are chosen by sweeps on the validation pairs, without random controls; "
        "then every layer is measured on the test pairs with them.",
        "Grey: vectors made of random heads. Purple: random vectors of the same norm. An effect counts "
        "only beyond both and with clean accuracy intact. At layer 0, resid_pre is the bare "
        "embedding: subtraction there destroys the input, also with random vectors.",
    )
    if test is not None:
        data = {"steering-test": test}
        layer, marked = steering_layer(study, test), chosen_layer(study, test)
        if len(test.layers) > 1:
            by_layer = plot.steering_by_layer(test, chosen=marked)
            section.parts.append([draw(by_layer, on=", test pairs", data=data)])
        section.parts.append([draw(plot.steering_at(test, layer), 820, ", test pairs", data)])
        title = "On the test pairs"
        section.parts.append(steering_table(f"{title}, layer {layer}", test, [layer], folded=False))
        if len(test.layers) > 1:
            section.parts.append(steering_table(f"{title}, all layers", test, test.layers, folded=True))
    if found:
        section.parts.append(
            [
                draw(plot.steering_by_layer(swept, panel_height=190), 480, ", validation pairs",
                     {f"steering-{kind}": swept})
                for kind, swept in found.items()
            ]
        )  # fmt: skip
    for name, swept in found.items():
        title = f"Sweep of the {name} vector on the validation pairs"
        section.parts.append(steering_table(title, swept, swept.layers, folded=True))
    section.missing += ["steering-test"] if test is None and found else []
    return _needs(section, found or test, "steering")


def _generation_section(study: Study) -> Section:
    result = study.results.get("generations")
    section = Section(
        "generations",
        "Answers side by side",
        "Greedy answers to the first victims of the test pairs, without and with the vector.",
    )
    if isinstance(result, Generations):
        rows = list(zip(*result.columns.values(), strict=True))
        section.parts.append(Table("", tuple(result.columns), rows, texts=True))
    return _needs(section, isinstance(result, Generations), "generations")


def _needs(section: Section, found: object, name: str) -> Section:
    if not found:
        section.missing = [name]
    return section


def _named(prefix: str, found: Mapping[str, Result]) -> dict[str, Result]:
    return {f"{prefix}-{name}": result for name, result in found.items()}
