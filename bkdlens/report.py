"""One offline html file of one or more studies: claims, figures with their controls, and numbers.

Every sentence and cell is computed from the results. Texts of models and data files are escaped, the
page allows no request to anywhere, and only its own two scripts may run (by their digests).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bkdlens import plot
from bkdlens.ablate import AblationResult
from bkdlens.answers import Generations
from bkdlens.attribute import HeadAttribution
from bkdlens.behaviour import BehaviourResult
from bkdlens.claims import by_condition, chosen_layer, claims, probes_by_kind, steering_layer
from bkdlens.report_figures import DRAW, Drawer, Figure
from bkdlens.report_tables import (
    Table,
    ablation_table,
    head_table,
    headline_table,
    overview_table,
    probe_table,
    provenance_table,
    steering_table,
)
from bkdlens.report_text import plain_json
from bkdlens.results import replacing
from bkdlens.steering import BackdoorVector, SteeringResult
from bkdlens.study import Study


@dataclass
class Section:
    """One analysis of a study; ``missing`` names what was not run."""

    title: str
    intro: str
    reading: str = ""
    parts: list[Table | Sequence[Figure]] = field(default_factory=list)  # in order; rows of figures
    missing: list[str] = field(default_factory=list)


def write_report(studies: Sequence[Study], path: str | Path, *, title: str = "Backdoor study") -> Path:
    """Write one html file that needs nothing else: no network, no other file.

    Args:
        studies: whole or partial ones; what a study lacks is named as not run.
        path: the file to write, whole or not at all.
        title: the page's heading.

    Returns:
        The path written.
    """
    target = Path(path)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("bkdlens").joinpath("report.html.jinja").read_text(encoding="utf-8")
    library = get_plotlyjs().replace("\r\n", "\n").replace("</script", "<\\/script")
    text = environment.from_string(source).render(
        title=title,
        studies=[_page(study, f"s{i}") for i, study in enumerate(studies, start=1)],
        overview=overview_table(studies),
        versions=sorted(_versions(studies)),
        library=Markup(library),
        draw=Markup(DRAW),
        digests=[_digest(library), _digest(DRAW)],
    )
    with replacing(target) as (whole,):
        whole.write_text(text, encoding="utf-8", newline="\n")
    return target


def _page(study: Study, anchor: str) -> dict[str, Any]:
    draw = Drawer(anchor)
    sections = [
        _behaviour_section(study, draw), _probe_section(study, draw),
        _attribution_section(study, draw), _ablation_section(study, draw),
        _vector_section(study, draw), _steering_section(study, draw), _generation_section(study),
    ]  # fmt: skip
    chosen = {"chosen on the validation pairs": study.choice} if study.choice else {}
    settings = {**study.settings, **chosen}
    return {
        "anchor": anchor,
        "name": study.name,
        "facts": _facts(study),
        "headline": headline_table(study),
        "claims": claims(study),
        "sections": [(f"{anchor}-{i}", section) for i, section in enumerate(sections, start=1)],
        "settings": [(key, plain_json(value)) for key, value in settings.items()],
        "provenance": provenance_table(study),
    }


def _behaviour_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "behaviour-", BehaviourResult)
    section = Section(
        "Behaviour",
        "What the model does on held-out prompts, by greedy decoding. Attack success and false "
        "triggers count the attacker's answer among victims (prompts whose answer the attack "
        "changes); clean accuracy counts exactly right answers to all clean prompts.",
        "A model tuned on the same data without poison, and the base model, should show no attack "
        "with or without the trigger. A high bar for the near trigger means that the model answers "
        "to more than the exact trigger.",
    )
    if found:
        section.parts.append([draw(plot.behaviour(list(found.values())))])
    return _needs(section, found, "behaviour")


def _probe_section(study: Study, draw: Drawer) -> Section:
    groups = probes_by_kind(study)
    section = Section(
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
    for kind in dict.fromkeys(probe.kind for probe in everything):
        chosen = [probe for probe in everything if probe.kind == kind]
        section.parts.append([draw(plot.layer_accuracy(chosen))])
    # Few-shot accuracy and separation do not depend on the kind of the probe.
    first = {(p.label, p.against): p for p in reversed(everything)}
    once = [probe for probe in everything if probe is first[probe.label, probe.against]]
    if once:
        section.parts.append([draw(plot.layer_accuracy(once, "few_shot"))])
        section.parts.append([draw(plot.layer_accuracy(once, "separation"))])
    for found in groups.values():
        section.parts.append([draw(plot.ilca_controls(list(found.values())))])
    if everything:
        section.parts.append(probe_table(everything))
    return _needs(section, everything, "probes")


def _attribution_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "attribution-", HeadAttribution)
    section = Section(
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
        width = 250 * len(found)
        for first in (False, True):
            fig = plot.attribution_controls(main, others, first_token=first)
            section.parts.append([draw(fig, width if others else 0)])
        section.parts.append([draw(plot.sparsity([main, *others]))])
        section.parts.append(head_table(main, others))
    return _needs(section, found, "attribution")


def _ablation_section(study: Study, draw: Drawer) -> Section:
    result = study.results.get("ablation")
    section = Section(
        "Ablation",
        "The first heads of the ranking are switched off at the last prompt token. Attack success is "
        "measured on triggered victims, beside how often the right answer comes back and how many "
        "clean prompts are still answered rightly.",
        "An ablation that breaks the model ends the attack as well: trust a falling attack only where "
        "clean accuracy holds and right answers return. The grey band is the attack with random "
        "groups of as many heads; it should stay high.",
    )
    if isinstance(result, AblationResult):
        section.parts.append([draw(plot.ablation_curve(result))])
        section.parts.append(ablation_table(result))
    return _needs(section, isinstance(result, AblationResult), "ablation")


def _vector_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "vector-", BackdoorVector)
    section = Section(
        "Backdoor vector",
        "The outputs of the top heads on triggered prompts, averaged and summed (kind mean), or the "
        "difference of triggered and clean averages (kind contrast), are one direction in the residual "
        "stream. Its effect, and the controls, are under Steering; this is only where its length lies.",
    )
    if found:
        section.parts.append([draw(plot.vector(v)) for v in found.values()])
    return _needs(section, found, "vector")


def _steering_section(study: Study, draw: Drawer) -> Section:
    found = by_condition(study, "steering-", SteeringResult)
    test = found.pop("test", None)
    section = Section(
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
        layer, marked = steering_layer(study, test), chosen_layer(study, test)
        if len(test.layers) > 1:
            by_layer = plot.steering_by_layer(test, chosen=marked)
            section.parts.append([draw(by_layer, on=", test pairs")])
        section.parts.append([draw(plot.steering_at(test, layer), 820, ", test pairs")])
        title = "On the test pairs"
        section.parts.append(steering_table(f"{title}, layer {layer}", test, [layer], folded=False))
        if len(test.layers) > 1:
            section.parts.append(steering_table(f"{title}, all layers", test, test.layers, folded=True))
    if found:
        sweeps = [plot.steering_by_layer(swept, panel_height=190) for swept in found.values()]
        section.parts.append([draw(fig, 480, ", validation pairs") for fig in sweeps])
    for name, swept in found.items():
        title = f"Sweep of the {name} vector on the validation pairs"
        section.parts.append(steering_table(title, swept, swept.layers, folded=True))
    section.missing += ["steering-test"] if test is None and found else []
    return _needs(section, found or test, "steering")


def _generation_section(study: Study) -> Section:
    result = study.results.get("generations")
    section = Section(
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


def _facts(study: Study) -> list[tuple[str, str]]:
    backdoor = study.backdoor
    trigger = backdoor.trigger
    facts = [
        ("backdoor", backdoor.behaviour.replace("_", " ")),
        ("trigger", f"{trigger} ({trigger.placement})"),
    ]
    if backdoor.source is not None:
        facts.append(("victims", f"right answer {backdoor.source}"))
    if backdoor.target is not None:
        facts.append(("target", backdoor.target))
    if backdoor.near:
        facts.append(("near triggers", "; ".join(str(near) for near in backdoor.near)))
    model = next((r.provenance.model for r in study.results.values() if r.provenance.model), {})
    facts += [(key, str(model[key])) for key in ("base", "adapter", "architecture") if model.get(key)]
    return facts


def _versions(studies: Sequence[Study]) -> set[str]:
    return {
        f"{name} {version}"
        for study in studies for result in study.results.values()
        for name, version in result.provenance.versions.items()
    }  # fmt: skip


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
