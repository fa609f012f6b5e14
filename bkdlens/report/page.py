"""One offline html file of one or more studies: claims, figures with their controls, and numbers.

Every sentence and cell is computed from the results. Texts of models and data files are escaped, the
page allows no request to anywhere, and only its own two scripts may run (by their digests).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bkdlens.analyses.parts import PARTS
from bkdlens.display.downloads import DataStore
from bkdlens.display.drawing import Drawer
from bkdlens.display.text import plain_json
from bkdlens.engines.inputs import checked
from bkdlens.report.claims import findings
from bkdlens.report.compare import Comparison, compare
from bkdlens.report.overview import headline_table, overview_table, provenance_table, verdict_table
from bkdlens.results import replacing
from bkdlens.study import Study, Thresholds


@checked
def write_report(
    studies: Sequence[Study],
    path: str | Path,
    *,
    title: str = "Backdoor study",
    thresholds: Thresholds | None = None,
) -> Path:
    """Write one html file that needs nothing else: no network, no other file.

    Args:
        studies: whole or partial ones; what a study lacks is named as not run.
        path: the file to write, whole or not at all.
        title: the page's heading.
        thresholds: how much is enough for a *yes* in the verdict; the defaults of :class:`Thresholds`.

    Returns:
        The path written.

    Raises:
        ResultError: if the file cannot be written.

    Examples:
        >>> parts = train.split(0.5, 0.25, 0.25)
        >>> study = bkdlens.run_study(model, *parts, steps=("behaviour",))
        >>> page = bkdlens.write_report([study], "report.html")
    """
    target = Path(path)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source, draw = (
        files(__package__).joinpath(name).read_text("utf-8") for name in ("page.html.jinja", "page.js")
    )
    library = get_plotlyjs().replace("\r\n", "\n").replace("</script", "<\\/script")
    text = environment.from_string(source).render(
        title=title,
        studies=[_page(study, f"s{i}", thresholds) for i, study in enumerate(studies, start=1)],
        overview=[verdict_table(studies, thresholds), overview_table(studies)]
        if len(studies) > 2
        else [],
        comparison=_beside(studies, thresholds),
        versions=sorted(_versions(studies)),
        library=Markup(library),
        draw=Markup(draw),
        digests=[_digest(library), _digest(draw)],
    )
    with replacing(target) as (whole,):
        whole.write_text(text, encoding="utf-8", newline="\n")
    return target


def _page(study: Study, anchor: str, thresholds: Thresholds | None) -> dict[str, Any]:
    store = DataStore(anchor)
    draw = Drawer(anchor, store)
    sections = [section for part in PARTS for section in part.sections(study, draw)]
    anchors = {section.name: f"{anchor}-{i}" for i, section in enumerate(sections, start=1)}
    chosen = {"chosen on the validation pairs": study.choice} if study.choice else {}
    settings = {**study.settings, **chosen}
    return {
        "anchor": anchor,
        "name": study.name,
        "criteria": study.backdoor.criteria,
        "facts": _facts(study),
        "verdict": [(anchors.get(one.analysis), one) for one in study.verdict(thresholds)],
        "headline": headline_table(study),
        "findings": [(anchors[finding.part], finding) for finding in findings(study)],
        "sections": [(anchors[section.name], section) for section in sections],
        "data": list(store),
        "settings": [(key, plain_json(value)) for key, value in settings.items()],
        "provenance": provenance_table(study),
    }


def _beside(
    studies: Sequence[Study], thresholds: Thresholds | None
) -> tuple[Comparison, list[tuple[str, str]]] | None:
    """Two studies side by side, and the csv texts behind their figures."""
    if len(studies) != 2:
        return None
    store = DataStore("ab")
    return compare(studies[0], studies[1], Drawer("ab", store), thresholds), list(store)


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
    made = [result.provenance for study in studies for result in study.results.values()]
    return {f"{name} {version}" for p in made for name, version in p.versions.items()}


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
