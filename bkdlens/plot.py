"""Results to plotly figures: nothing is shown here, and no global template is read or changed.

Rates are drawn in per cent with their 95 % intervals and carry their counts in the hover text.
Conditions and quantities differ by dash and marker as well as by colour, for print in grey.
The figures are made in the ``plot_*`` modules; all of them can be called from here.
"""

from __future__ import annotations

import plotly.graph_objects as go

from bkdlens.ablate import AblationResult
from bkdlens.answers import Generations
from bkdlens.attribute import HeadAttribution
from bkdlens.behaviour import BehaviourResult
from bkdlens.errors import ResultError, unknown
from bkdlens.patch import PatchResult
from bkdlens.plot_ablation import ablation_curve
from bkdlens.plot_behaviour import behaviour, generations
from bkdlens.plot_heads import acie_heatmap, attribution_controls, patch, sparsity
from bkdlens.plot_maps import steering_map
from bkdlens.plot_probes import ilca_controls, ilca_heatmap, layer_accuracy
from bkdlens.plot_steering import steering_at, steering_by_layer, vector
from bkdlens.plot_style import TEMPLATE
from bkdlens.plot_tokens import answer_strips, attention
from bkdlens.probe import ProbeResult
from bkdlens.results import Result
from bkdlens.steering import BackdoorVector, SteeringResult
from bkdlens.tokens import AnswerProbs, HeadPattern

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
