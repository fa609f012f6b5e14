"""Results to plotly figures: nothing is shown here, and no global template is read or changed.

Rates are drawn in per cent with their 95 % intervals and carry their counts in the hover text.
Conditions and quantities differ by dash and marker as well as by colour, for print in grey.
The figures are made in the ``plot_*`` modules; all of them can be called from here.
"""

from __future__ import annotations

import plotly.graph_objects as go

from bkdlens.analyses.ablation.figures import ablation_curve
from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.figures import acie_heatmap, attribution_controls, patch, sparsity
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.figures import behaviour, generations
from bkdlens.analyses.behaviour.measure import BehaviourResult
from bkdlens.analyses.patching.measure import PatchResult
from bkdlens.analyses.probes.figures import ilca_controls, ilca_heatmap, layer_accuracy
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.answers import Generations
from bkdlens.analyses.steering.figures import steering_at, steering_by_layer, vector
from bkdlens.analyses.steering.map import steering_map
from bkdlens.analyses.steering.measure import BackdoorVector, SteeringResult
from bkdlens.analyses.tokens.figures import answer_strips, attention
from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern
from bkdlens.display.style import TEMPLATE
from bkdlens.errors import ResultError, unknown
from bkdlens.results import Result

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


def figure(result: Result) -> go.Figure:
    """The figure of any result; the other functions here put several results into one figure.

    Raises:
        ResultError: for a kind of result that has no figure.
    """
    if isinstance(result, HeadAttribution):
        return acie_heatmap(result)
    if isinstance(result, ProbeResult):
        return layer_accuracy([result])
    if isinstance(result, AblationResult):
        return ablation_curve(result)
    if isinstance(result, SteeringResult):
        one = len(result.layers) == 1
        return steering_at(result) if one else steering_by_layer(result)
    if isinstance(result, BackdoorVector):
        return vector(result)
    if isinstance(result, BehaviourResult):
        return behaviour([result])
    if isinstance(result, Generations):
        return generations(result)
    if isinstance(result, PatchResult):
        return patch(result)
    if isinstance(result, HeadPattern):
        return attention(result)
    if isinstance(result, AnswerProbs):
        return answer_strips(result)
    kinds = (HeadAttribution, ProbeResult, AblationResult, SteeringResult, BackdoorVector,
             BehaviourResult, Generations, PatchResult, HeadPattern, AnswerProbs)  # fmt: skip
    raise ResultError(
        unknown("figure for a result of kind", type(result).__name__, [k.__name__ for k in kinds])
    )
