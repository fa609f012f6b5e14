"""Results to plotly figures: nothing is shown here, and no global template is read or changed.

Rates are drawn in per cent with their 95 % intervals and carry their counts in the hover text.
Conditions and quantities differ by dash and marker as well as by colour, for print in grey.
The figures are made beside the analyses; all of them can be called from here.
"""

from __future__ import annotations

from bkdlens.analyses.ablation.figures import ablation_curve
from bkdlens.analyses.attribution.figures import acie_heatmap, attribution_controls, sparsity
from bkdlens.analyses.behaviour.figures import behaviour
from bkdlens.analyses.patching.figures import patch
from bkdlens.analyses.probes.figures import ilca_controls, ilca_heatmap, layer_accuracy
from bkdlens.analyses.steering.figures import generations, steering_at, steering_by_layer, vector
from bkdlens.analyses.steering.map import steering_map
from bkdlens.analyses.tokens.figures import answer_strips, attention
from bkdlens.display.style import TEMPLATE
from bkdlens.results import figure

__all__ = [
    "TEMPLATE",
    "ablation_curve",
    "acie_heatmap",
    "answer_strips",
    "attention",
    "attribution_controls",
    "behaviour",
    "figure",
    "generations",
    "ilca_controls",
    "ilca_heatmap",
    "layer_accuracy",
    "patch",
    "sparsity",
    "steering_at",
    "steering_by_layer",
    "steering_map",
    "vector",
]
