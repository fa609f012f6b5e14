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
    "AblationResult": "ablate",
    "ablate_heads": "ablate",
    "HeadAttribution": "attribute",
    "attribute_heads": "attribute",
    "BehaviourResult": "behaviour",
    "measure_behaviour": "behaviour",
    "sample_generations": "answers",
    "PairCache": "cache",
    "cache_activations": "cache",
    "Backdoor": "data",
    "PairSet": "data",
    "PromptPair": "data",
    "Trigger": "data",
    "check_data": "check",
    "compare_heads": "compare",
    "read_pairs": "reading",
    "BkdlensError": "errors",
    "decode": "generation",
    "evaluate": "generation",
    "generate": "generation",
    "Intervention": "hooks",
    "Vector": "hooks",
    "load": "loading",
    "load_info": "loading",
    "Rate": "metrics",
    "PatchResult": "patch",
    "patch_heads": "patch",
    "patched_heads": "patch",
    "ProbeResult": "probe",
    "train_probes": "probe",
    "PromptFormat": "prompts",
    "write_report": "report",
    "BackdoorVector": "steering",
    "SteeringResult": "steering",
    "steer": "steering",
    "sweep_layers": "steering",
    "explore": "explorer",
    "Study": "study",
    "StudySettings": "run",
    "load_result": "study",
    "load_study": "study",
    "run_study": "run",
    "Patch": "hooks",
    "sweep_patches": "sweep",
    "AnswerProbs": "tokens",
    "HeadPattern": "tokens",
    "answer_probs": "tokens",
    "head_pattern": "tokens",
    "Head": "types",
}
_MODULES = ("inject", "metrics", "plot", "zoo")

__all__ = [*_HOME, *_MODULES]

if TYPE_CHECKING:
    from bkdlens import inject, metrics, plot, zoo
    from bkdlens.ablate import AblationResult, ablate_heads
    from bkdlens.answers import sample_generations
    from bkdlens.attribute import HeadAttribution, attribute_heads
    from bkdlens.behaviour import BehaviourResult, measure_behaviour
    from bkdlens.cache import PairCache, cache_activations
    from bkdlens.check import check_data
    from bkdlens.compare import compare_heads
    from bkdlens.data import Backdoor, PairSet, PromptPair, Trigger
    from bkdlens.errors import BkdlensError
    from bkdlens.explorer import explore
    from bkdlens.generation import decode, evaluate, generate
    from bkdlens.hooks import Intervention, Patch, Vector
    from bkdlens.loading import load, load_info
    from bkdlens.metrics import Rate
    from bkdlens.patch import PatchResult, patch_heads, patched_heads
    from bkdlens.probe import ProbeResult, train_probes
    from bkdlens.prompts import PromptFormat
    from bkdlens.reading import read_pairs
    from bkdlens.report import write_report
    from bkdlens.run import StudySettings, run_study
    from bkdlens.steering import BackdoorVector, SteeringResult, steer, sweep_layers
    from bkdlens.study import Study, load_result, load_study
    from bkdlens.sweep import sweep_patches
    from bkdlens.tokens import AnswerProbs, HeadPattern, answer_probs, head_pattern
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
