"""The list of analyses that make up a study, in the order in which they run and are shown.

Whatever runs, shows or compares studies loops over this list and knows no analysis by name. The last
two analyses have no part in a study; they are named so that their saved results load.
"""

from __future__ import annotations

from bkdlens.analyses.ablation.part import PART as ABLATION
from bkdlens.analyses.attribution.part import PART as ATTRIBUTION
from bkdlens.analyses.base import Part
from bkdlens.analyses.behaviour.part import PART as BEHAVIOUR
from bkdlens.analyses.patching import measure as _patching  # noqa: F401
from bkdlens.analyses.probes.part import PART as PROBES
from bkdlens.analyses.steering.part import PART as STEERING
from bkdlens.analyses.tokens import measure as _tokens  # noqa: F401
from bkdlens.study import Study

PARTS: tuple[Part, ...] = (BEHAVIOUR, PROBES, ATTRIBUTION, ABLATION, STEERING)
Study.judges.update({part.name: part.verdict for part in PARTS})
