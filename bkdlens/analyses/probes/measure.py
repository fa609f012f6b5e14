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
from bkdlens.engines.inputs import checked
from bkdlens.errors import DataError
from bkdlens.metrics import ClusteredRate, Rate
from bkdlens.paper import PROBE_SPLIT
from bkdlens.progress import track
from bkdlens.results import Result, provenance
from bkdlens.types import ProbeKind, check_choice

FIT_SHARE = 0.75  # of the pairs that are not the test, as in the paper's 6:2:2


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ProbeResult(Result):
    """One probe kind on one model, triggered prompts against clean or near ones.

    The layer axis is Hugging Face's ``hidden_states``: 0 is the bare embedding of the last token
    (the same in every chat prompt), ``l`` is after ``l`` blocks.

    A prompt and its twin are no independent trials, so intervals are by pair
    (:class:`bkdlens.metrics.ClusteredRate`).

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
        pair_correct: of each test pair, how many of the two prompts are classified correctly; None in
            files of version 0.1.
        few_shot_correct: test prompts that each few-shot draw classifies correctly; None in the same.
        few_shot_validation: few-shot accuracy on the validation prompts; None in the same.
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
    pair_correct: Int[Tensor, "layer pair"] | None = None
    few_shot_correct: Int[Tensor, "layer draw"] | None = None
    few_shot_validation: Float[Tensor, " layer"] | None = None

    @property
    def accuracy(self) -> Float[Tensor, " layer"]:
        """Fraction of the test prompts that are classified correctly."""
        return self.n_correct / self.n_test

    def rate(self, layer: int) -> Rate:
        """The accuracy at one layer, 0 to 1, with its count and interval (by pair, where known)."""
        correct = int(self.n_correct[layer])
        if self.pair_correct is None:
            return Rate(correct, self.n_test)
        return ClusteredRate(correct, self.n_test, int((self.pair_correct[layer] == 1).sum()))

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


@checked
def train_probes(
    cache: PairCache,
    *,
    test: PairCache | None = None,
    kind: ProbeKind = "svm",
    against: Literal["clean", "near"] = "clean",
    shots: int = 5,
    n_draws: int = 10,
    label: str = "backdoored",
    seed: int = 0,
    progress: bool = False,
) -> ProbeResult:
    """Train one probe per layer and test it at every layer, on pairs that it was not fitted on.

    Args:
        cache: from :func:`bkdlens.cache_activations`; nothing is run again. Its pairs are split 6:2:2
            into those that fit the probes, those that choose a layer, and those that test.
        test: activations of other pairs, of the same model. They are the test then, all of them, and
            the cache's own pairs are split 3:1 into fit and choice.
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
        DataError: for fewer than 10 pairs (4 beside other test pairs), near prompts that the pairs lack,
            or a test that shares a prompt with the cache or is of another model.
        ChoiceError: for an unknown kind of probe.

    Examples:
        >>> probes = bkdlens.train_probes(cache, n_draws=1)
        >>> accuracy = probes.accuracy[-1]
        >>> held_out = bkdlens.cache_activations(model, test)
        >>> probes = bkdlens.train_probes(cache, test=held_out, n_draws=1)
    """
    check_choice("probe", kind, ProbeKind)
    fit, validation, tested = _split(cache, test, seed)
    states = [cache.resid(which).float().cpu() for which in ("triggered", against)]
    test_states = [(test or cache).resid(which).float().cpu() for which in ("triggered", against)]
    n_layers = states[0].shape[1]

    def data(rows: list[int], layer: int, sides: list[Tensor] = states) -> tuple[np.ndarray, np.ndarray]:
        x = torch.cat([side[rows, layer] for side in sides]).numpy()
        return x, np.repeat([1, 0], len(rows))

    ilca = torch.zeros(n_layers, n_layers)
    rng = np.random.default_rng(seed)
    draws = [rng.choice(fit, min(shots, len(fit)), replace=False).tolist() for _ in range(n_draws)]
    layers = []
    for layer in track(range(n_layers), f"{kind} probes", progress):
        probe = _fit(_pipeline(kind, seed), *data(fit, layer))
        x, y = data(tested, layer, test_states)
        held_out = data(validation, layer)
        predicted = [probe.predict(data(tested, other, test_states)[0]) for other in range(n_layers)]
        ilca[layer] = torch.tensor([float((p == y).mean()) for p in predicted])
        right = predicted[layer] == y
        few = [_fit(_pipeline("svm", seed), *data(draw, layer)) for draw in draws]
        few_right = [int((probe.predict(x) == y).sum()) for probe in few]
        measured = {
            "n_correct": int(right.sum()),
            "auroc": float(roc_auc_score(y, _score(probe, x))),
            "validation": float(probe.score(*held_out)),
            "few_shot": float(np.mean(few_right)) / len(y),
            "separation": _separation(*(side[fit, layer] for side in states)),
            "pair_correct": right.reshape(2, -1).sum(0).tolist(),
            "few_shot_correct": few_right,
            "few_shot_validation": float(np.mean([probe.score(*held_out) for probe in few])),
        }
        layers.append(measured)
    pairs = cache.pairs if test is None else test.pairs
    settings = {
        "kind": kind,
        "against": against,
        "shots": shots,
        "split": PROBE_SPLIT if test is None else (FIT_SHARE, 1 - FIT_SHARE),
        "fit": f"{len(fit)} pairs of the data {cache.pairs.digest}",
        "layer_chosen": f"{len(validation)} other pairs of the data {cache.pairs.digest}",
        "tested": f"{len(tested)} {'other ' if test is None else ''}pairs of the data {pairs.digest}",
    }
    return ProbeResult(
        provenance=provenance(
            cache.model, pairs, cache.fmt, seed, **settings, position="last prompt token"
        ),
        label=label,
        kind=kind,
        against=against,
        n_test=2 * len(tested),
        **{name: torch.tensor([layer[name] for layer in layers]) for name in layers[0]},
        ilca=ilca,
    )


def _split(cache: PairCache, test: PairCache | None, seed: int) -> tuple[list[int], ...]:
    """The rows that fit the probes and choose a layer, of ``cache``, and those that test them.

    Raises:
        DataError: for too few pairs, or a test that is none.
    """
    least = 10 if test is None else 4
    if len(cache.pairs) < least:
        raise DataError(f"Probes need at least {least} pairs; got {len(cache.pairs)}.")
    index = {id(pair): i for i, pair in enumerate(cache.pairs)}
    if test is None:
        parts = cache.pairs.split(*PROBE_SPLIT, seed=seed)
    else:
        if test.model is not cache.model:
            raise DataError("The test cache is of another model than the cache; give one of the same.")
        if shared := set(cache.pairs.clean) & set(test.pairs.clean):
            raise DataError(
                f"{len(shared)} of the test prompts also fit the probes; test on pairs that do not."
            )
        parts = cache.pairs.split(FIT_SHARE, seed=seed)
    rows = [[index[id(pair)] for pair in part] for part in parts]
    return (*rows, *([] if test is None else [list(range(len(test.pairs)))]))


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
