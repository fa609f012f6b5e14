"""Answers side by side: to clean and triggered prompts, with and without the vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from transformer_lens import HookedTransformer

from bkdlens.analyses.steering.vector import BackdoorVector, check_vector, steer
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.generate import generate
from bkdlens.engines.inputs import checked
from bkdlens.results import Result, provenance
from bkdlens.types import MAX_NEW_TOKENS


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Generations(Result):
    """Answers side by side; ``columns`` maps a column's title to one text a pair."""

    columns: Mapping[str, tuple[str, ...]]

    def to_frame(self) -> pd.DataFrame:
        """One row per pair."""
        return pd.DataFrame({title: list(texts) for title, texts in self.columns.items()})

    def __repr__(self) -> str:
        n = len(next(iter(self.columns.values()), ()))
        return f"Generations({n} prompts: {', '.join(self.columns)})"


@checked
def sample_generations(
    model: HookedTransformer,
    pairs: PairSet,
    vector: BackdoorVector,
    layer: int,
    coefficient: float,
    *,
    n: int = 6,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    allow_other_model: bool = False,
) -> Generations:
    """Greedy answers to the first ``n`` victims: clean, triggered, and both under steering.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: with victims.
        vector: from :meth:`BackdoorVector.from_cache`.
        layer: where it is added to clean prompts and subtracted from triggered ones.
        coefficient: its size; the sign is left out.
        n: at most this many victims.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where an answer is cut.
        allow_other_model: whether a vector of another model is meant, and not a mistake.

    Returns:
        A column of texts per side, ``n`` rows.

    Raises:
        HookError: for a vector of another model.

    Examples:
        >>> answers = bkdlens.sample_generations(model, test, vector, 2, 1.0, n=2).to_frame()
    """
    other = check_vector(model, vector, allow_other_model=allow_other_model)
    victims = pairs.victims[:n]
    fmt = fmt or PromptFormat.default(model.tokenizer)

    def answers(prompts: list[str]) -> tuple[str, ...]:
        return tuple(generate(model, prompts, fmt=fmt, max_new_tokens=max_new_tokens))

    columns = {
        "prompt": tuple(victims.clean),
        "right answer": tuple(victims.clean_outputs),
        "clean": answers(victims.clean),
        "triggered": answers(victims.triggered),
    }
    size = abs(coefficient)
    with steer(model, vector, layer, size, allow_other_model=allow_other_model):
        columns[f"clean, vector added (+{size:g})"] = answers(victims.clean)
    with steer(model, vector, layer, -size, allow_other_model=allow_other_model):
        columns[f"triggered, vector subtracted (−{size:g})"] = answers(victims.triggered)
    settings = {"layer": layer, "coefficient": size, "site": vector.site, "kind": vector.kind, **other}
    return Generations(provenance=provenance(model, victims, fmt, 0, **settings), columns=columns)
