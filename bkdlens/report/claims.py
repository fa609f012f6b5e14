"""Sentences about a study, each computed from its results, and what they rest on."""

from __future__ import annotations

from bkdlens.analyses.parts import PARTS
from bkdlens.display.tables import Finding
from bkdlens.study import Study


def claims(study: Study) -> list[str]:
    """What the study's results say, in plain sentences with their counts and controls."""
    return [text for part in PARTS for text in part.claims(study)]


def findings(study: Study) -> list[Finding]:
    """The claims by analysis, each with its settings, counts and controls."""
    told = [(part, tuple(part.claims(study))) for part in PARTS]
    return [Finding(part.name, texts, part.basis(study)) for part, texts in told if texts]
