"""bkdlens: mechanistic interpretability of backdoors in language models, on TransformerLens.

Everything public is a name of this package and is imported when it is first used, so that
``import bkdlens`` and ``bkdlens --help`` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives.
_HOME = {
    "AblationResult": "analyses.ablation.measure",
    "ablate_heads": "analyses.ablation.measure",
    "HeadAttribution": "analyses.attribution.measure",
    "attribute_heads": "analyses.attribution.measure",
    "BehaviourResult": "analyses.behaviour.measure",
    "measure_behaviour": "analyses.behaviour.measure",
    "sample_generations": "analyses.steering.answers",
    "PairCache": "engines.cache",
    "cache_activations": "engines.cache",
    "Backdoor": "data.backdoor",
    "PairSet": "data.pairs",
    "PromptPair": "data.backdoor",
    "Trigger": "data.trigger",
    "check_data": "data.check",
    "compare_heads": "analyses.attribution.compare",
    "read_pairs": "data.reading",
    "BkdlensError": "errors",
    "decode": "engines.generate",
    "evaluate": "engines.generate",
    "generate": "engines.generate",
    "Intervention": "engines.hooks",
    "Vector": "engines.hooks",
    "load": "models.load",
    "load_info": "models.load",
    "Rate": "metrics",
    "PatchResult": "analyses.patching.measure",
    "patch_heads": "analyses.patching.measure",
    "patched_heads": "analyses.patching.measure",
    "ProbeResult": "analyses.probes.measure",
    "train_probes": "analyses.probes.measure",
    "PromptFormat": "data.prompts",
    "write_report": "report.page",
    "BackdoorVector": "analyses.steering.vector",
    "SteeringResult": "analyses.steering.measure",
    "steer": "analyses.steering.vector",
    "sweep_layers": "analyses.steering.measure",
    "explore": "notebook.widgets",
    "Study": "study",
    "StudySettings": "study",
    "load_result": "runs.reading",
    "load_study": "runs.reading",
    "run_study": "runs.run",
    "Patch": "engines.hooks",
    "sweep_patches": "engines.sweep",
    "AnswerProbs": "analyses.tokens.measure",
    "HeadPattern": "analyses.tokens.measure",
    "answer_probs": "analyses.tokens.measure",
    "head_pattern": "analyses.tokens.measure",
    "Head": "types",
}
_MODULES = ("inject", "metrics", "plot", "zoo")

__all__ = [*_HOME, *_MODULES]

if TYPE_CHECKING:
    from bkdlens import inject, metrics, plot, zoo
    from bkdlens.analyses.ablation.measure import AblationResult, ablate_heads
    from bkdlens.analyses.attribution.compare import compare_heads
    from bkdlens.analyses.attribution.measure import HeadAttribution, attribute_heads
    from bkdlens.analyses.behaviour.measure import BehaviourResult, measure_behaviour
    from bkdlens.analyses.patching.measure import PatchResult, patch_heads, patched_heads
    from bkdlens.analyses.probes.measure import ProbeResult, train_probes
    from bkdlens.analyses.steering.answers import sample_generations
    from bkdlens.analyses.steering.measure import SteeringResult, sweep_layers
    from bkdlens.analyses.steering.vector import BackdoorVector, steer
    from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern, answer_probs, head_pattern
    from bkdlens.data.backdoor import Backdoor, PromptPair
    from bkdlens.data.check import check_data
    from bkdlens.data.pairs import PairSet
    from bkdlens.data.prompts import PromptFormat
    from bkdlens.data.reading import read_pairs
    from bkdlens.data.trigger import Trigger
    from bkdlens.engines.cache import PairCache, cache_activations
    from bkdlens.engines.generate import decode, evaluate, generate
    from bkdlens.engines.hooks import Intervention, Patch, Vector
    from bkdlens.engines.sweep import sweep_patches
    from bkdlens.errors import BkdlensError
    from bkdlens.metrics import Rate
    from bkdlens.models.load import load, load_info
    from bkdlens.notebook.widgets import explore
    from bkdlens.report.page import write_report
    from bkdlens.runs.reading import load_result, load_study
    from bkdlens.runs.run import run_study
    from bkdlens.study import Study, StudySettings
    from bkdlens.types import Head


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"bkdlens.{name}")
    if name in _HOME:
        value = getattr(import_module(f"bkdlens.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bkdlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
