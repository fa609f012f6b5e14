"""Backdoor probes: can the trigger be read off the hidden state, layer by layer?

Source: Backdoor Attribution, Section 3. A classifier is trained to tell triggered from clean prompts
by the residual stream at the last prompt token; trained at one layer and tested at all it gives the
inter-layer matrix (ILCA). A high accuracy alone says little - any difference in the text can be read,
in an un-poisoned model too - so each result is one condition and belongs beside its controls.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from bkdlens.engines.cache import PairCache
from bkdlens.errors import DataError
from bkdlens.metrics import Rate
from bkdlens.paper import PROBE_SPLIT
from bkdlens.progress import track
from bkdlens.results import Result, provenance
from bkdlens.types import ProbeKind, check_choice


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ProbeResult(Result):
    """One probe kind on one model, triggered prompts against clean or near ones.

    The layer axis is Hugging Face's ``hidden_states``: 0 is the bare embedding of the last token
    (the same in every chat prompt), ``l`` is after ``l`` blocks.

    Attributes:
        label: names the model in figures.
        kind: ``"mlp"`` or ``"svm"``.
        against: what the triggered prompts are told from, ``"clean"`` or ``"near"``.
        n_test: test prompts, half of them triggered.
        n_correct: test prompts that are classified correctly.
        auroc: area under the ROC curve on the test prompts, 0 to 1.
        validation: accuracy on the validation prompts, 0 to 1.
        few_shot: accuracy from a few prompts per class, 0 to 1, mean over draws.
        separation: distance of the class means over the within-class spread.
        ilca: accuracy of a probe of one layer at another, 0 to 1.
    """

    label: str
    kind: str
    against: str
    n_test: int
    n_correct: Int[Tensor, " layer"]
    auroc: Float[Tensor, " layer"]
    validation: Float[Tensor, " layer"]
    few_shot: Float[Tensor, " layer"]
    separation: Float[Tensor, " layer"]
    ilca: Float[Tensor, "trained_on tested_on"]

    @property
    def accuracy(self) -> Float[Tensor, " layer"]:
        """Fraction of the test prompts that are classified correctly."""
        return self.n_correct / self.n_test

    def rate(self, layer: int) -> Rate:
        """The accuracy at one layer, 0 to 1, with its count and interval."""
        return Rate(int(self.n_correct[layer]), self.n_test)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer; accuracies are 0 to 1."""
        return pd.DataFrame(
            [
                {
                    "condition": self.label,
                    "against": self.against,
                    "probe": self.kind,
                    "layer": layer,
                    "accuracy": float(self.accuracy[layer]),
                    "low": self.rate(layer).interval[0],
                    "high": self.rate(layer).interval[1],
                    "n": self.n_test,
                    "auroc": float(self.auroc[layer]),
                    "few_shot": float(self.few_shot[layer]),
                    "separation": float(self.separation[layer]),
                }
                for layer in range(len(self.n_correct))
            ]
        )

    def frames(self) -> dict[str, pd.DataFrame]:
        """The result in long form, and the inter-layer matrix with one row per cell."""
        rows = enumerate(self.ilca.tolist())
        cells = [(trained, tested, x) for trained, row in rows for tested, x in enumerate(row)]
        matrix = pd.DataFrame(cells, columns=["trained_on", "tested_on", "accuracy"])
        return {**super().frames(), "-ilca": matrix}

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:.2f}" for value in self.accuracy.tolist())
        return (
            f"ProbeResult({self.label}, {self.kind}, triggered against {self.against}, "
            f"accuracy by layer: {shown}; n={self.n_test})"
        )


def train_probes(
    cache: PairCache,
    *,
    kind: ProbeKind = "svm",
    against: Literal["clean", "near"] = "clean",
    shots: int = 5,
    n_draws: int = 10,
    label: str = "backdoored",
    seed: int = 0,
    progress: bool = False,
) -> ProbeResult:
    """Train one probe per layer on the cache's pairs, split 6:2:2 by pair, and test it at every layer.

    Args:
        cache: from :func:`bkdlens.cache_activations`; nothing is run again.
        kind: ``"mlp"`` (100 hidden units) or ``"svm"`` (RBF, C=1), both on standardised features.
        against: what the triggered prompts are told from.
        shots: prompts per class for the few-shot accuracy (an SVM; mean over ``n_draws`` draws).
        n_draws: how many draws of the shots.
        label: names the model in figures.
        seed: of the split, the probes and the draws.
        progress: whether to show a progress bar.

    Returns:
        Test accuracy per layer and ``[trained_on tested_on]``, 0 to 1, and what puts it in proportion.

    Raises:
        DataError: for fewer than 10 pairs, or near prompts that the pairs lack.
        ChoiceError: for an unknown kind of probe.

    Examples:
        >>> probes = bkdlens.train_probes(cache, n_draws=1)
        >>> accuracy = probes.accuracy[-1]
    """
    check_choice("probe", kind, ProbeKind)
    if len(cache.pairs) < 10:
        raise DataError(f"Probes need at least 10 pairs; got {len(cache.pairs)}.")
    positive = cache.resid("triggered").float().cpu()
    negative = cache.resid(against).float().cpu()
    index = {id(pair): i for i, pair in enumerate(cache.pairs)}
    train, validation, test = (
        [index[id(pair)] for pair in part] for part in cache.pairs.split(*PROBE_SPLIT, seed=seed)
    )
    n_layers = positive.shape[1]

    def data(rows: list[int], layer: int) -> tuple[np.ndarray, np.ndarray]:
        x = torch.cat([positive[rows, layer], negative[rows, layer]]).numpy()
        return x, np.repeat([1, 0], len(rows))

    ilca = torch.zeros(n_layers, n_layers)
    rng = np.random.default_rng(seed)
    draws = [rng.choice(train, min(shots, len(train)), replace=False) for _ in range(n_draws)]
    layers = []
    for layer in track(range(n_layers), f"{kind} probes", progress):
        probe = _fit(_pipeline(kind, seed), *data(train, layer))
        x, y = data(test, layer)
        predicted = [probe.predict(data(test, other)[0]) for other in range(n_layers)]
        ilca[layer] = torch.tensor([float((p == y).mean()) for p in predicted])
        shot = [_fit(_pipeline("svm", seed), *data(d.tolist(), layer)).score(x, y) for d in draws]
        measured = {
            "n_correct": int((predicted[layer] == y).sum()),
            "auroc": float(roc_auc_score(y, _score(probe, x))),
            "validation": float(probe.score(*data(validation, layer))),
            "few_shot": float(np.mean(shot)),
            "separation": _separation(positive[train, layer], negative[train, layer]),
        }
        layers.append(measured)
    settings = {"kind": kind, "against": against, "shots": shots, "split": PROBE_SPLIT}
    return ProbeResult(
        provenance=provenance(
            cache.model, cache.pairs, cache.fmt, seed, **settings, position="last prompt token"
        ),
        label=label,
        kind=kind,
        against=against,
        n_test=2 * len(test),
        **{name: torch.tensor([layer[name] for layer in layers]) for name in layers[0]},
        ilca=ilca,
    )


def _pipeline(kind: str, seed: int) -> Any:
    if kind == "svm":
        return make_pipeline(StandardScaler(), SVC(kernel="rbf", C=1.0))
    mlp = MLPClassifier(hidden_layer_sizes=(100,), max_iter=200, random_state=seed)
    return make_pipeline(StandardScaler(), mlp)


def _fit(probe: Any, x: np.ndarray, y: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(x, y)


def _score(probe: Any, x: np.ndarray) -> np.ndarray:
    if hasattr(probe, "decision_function"):
        return probe.decision_function(x)
    return probe.predict_proba(x)[:, 1]


def _separation(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Distance of the class means over the root mean square distance to the own mean."""
    spread = torch.cat([a - a.mean(0), b - b.mean(0)]).pow(2).sum(-1).mean().sqrt()
    distance = (a.mean(0) - b.mean(0)).norm()
    return float(distance / spread.clamp(min=1e-9)) if distance > 0 else 0.0
