"""A study: everything that was found out about one model and one backdoor, as a folder of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bkdlens import paper
from bkdlens.data.backdoor import Backdoor
from bkdlens.errors import ResultError
from bkdlens.results import Result, replacing
from bkdlens.types import MAX_NEW_TOKENS

R = TypeVar("R", bound=Result)
CONDITIONS = ("backdoored", "clean-adapter", "base")
MAIN = CONDITIONS[0]


@dataclass(frozen=True)
class StudySettings:
    """Everything about a study that is a choice; saved with it.

    Examples:
        >>> settings = bkdlens.StudySettings(n_attribution=48, ablation_modes=("mean",))
    """

    n_attribution: int | None = paper.N_PAIRS  # clean pairs; all for None
    attribution_method: str = "exact"  # or "atp", "screened"
    layer_outputs: bool = True  # attribute whole attention and MLP outputs too
    ablation_counts: tuple[int, ...] = paper.ABLATION_COUNTS  # heads switched off
    ablation_modes: tuple[str, ...] = ("zero", "mean")  # what they are set to
    vector_heads: int | None = None  # None: a thirty-second of all heads (as the paper), at least 4
    vector_kinds: tuple[str, ...] = ("mean", "contrast")  # of which one is chosen
    vector_site: str = "resid_pre"  # or "attn_out"
    coefficients: tuple[float, ...] = (1.0, 2.0)  # both signs of each are tried
    n_random: int = 10  # draws of each random control
    probe_kinds: tuple[str, ...] = ("mlp", "svm")  # all are trained
    max_new_tokens: int = MAX_NEW_TOKENS  # where a decoded answer is cut
    seed: int = 0  # of everything that is drawn at random


# The demo's settings: fewer pairs, so that it ends within a minute and a half on two cores.
DEMO = StudySettings(n_attribution=48, max_new_tokens=24)


@dataclass(frozen=True)
class Study:
    """Everything about one model and one backdoor.

    Attributes:
        name: a title.
        backdoor: what the trigger does, and when that counts as a success.
        results: by file name: ``behaviour-<condition>``, ``probe-<condition>-<mlp|svm>-<clean|near>``,
            ``attribution-<condition>``, ``ablation``, ``vector-<mean|contrast>``,
            ``steering-<mean|contrast>`` (on the validation pairs, without random controls),
            ``steering-test`` (the chosen kind and coefficient, on the test pairs, with them) and
            ``generations``. Conditions are ``backdoored`` and the controls ``clean-adapter`` and
            ``base``, where given.
        settings: :class:`StudySettings` as plain values, with the prompt format, the model and the
            digests of the pairs.
        choice: the vector's kind, coefficient and layer as chosen on the validation pairs.
    """

    name: str
    backdoor: Backdoor
    results: Mapping[str, Result]
    settings: Mapping[str, Any]
    choice: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, kind: type[R]) -> R | None:
        """The result of that name; None where it was not run.

        Raises:
            ResultError: if it is of another kind.
        """
        result = self.results.get(name)
        if result is None or isinstance(result, kind):
            return result
        raise ResultError(
            f"The result {name!r} is a {type(result).__name__}, not a {kind.__name__}; make it again."
        )

    def named(self, kind: type[R]) -> dict[str, R]:
        """All results of one kind by name: the suspected model's first, then those of its controls."""
        order = {condition: i for i, condition in enumerate(CONDITIONS)}
        found = [(name, r) for name, r in self.results.items() if isinstance(r, kind)]
        found.sort(key=lambda item: (order.get(getattr(item[1], "label", ""), len(order)), item[0]))
        return dict(found)

    def by_condition(self, kind: type[R]) -> dict[str, R]:
        """The results of one kind by the condition that they label, the suspected model's first."""
        return {result.label: result for result in self.named(kind).values()}  # type: ignore[attr-defined]

    def save_head(self, folder: Path) -> None:
        """Write ``study.json``: everything but the results, which are saved beside it one by one."""
        content = {
            "name": self.name,
            "backdoor": self.backdoor.to_dict(),
            "settings": self.settings,
            "choice": self.choice,
        }
        with replacing(folder / "study.json") as (head,):
            head.write_text(json.dumps(content, indent=1) + "\n")
