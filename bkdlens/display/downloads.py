"""The numbers behind the report's figures as csv texts, each held once a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bkdlens.analyses.ablation.measure import AblationResult
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.probes.measure import ProbeResult
from bkdlens.analyses.steering.measure import SteeringResult
from bkdlens.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DataLink:
    """A link to one csv text of the page: the file's name, and the element that holds the text."""

    name: str
    id: str


class DataStore:
    """The csv texts of one study; equal ones are held once."""

    def __init__(self, anchor: str) -> None:
        self.anchor = anchor
        self.texts: dict[tuple[str, str], str] = {}  # (file name, text) to id

    def add(self, results: Mapping[str, Result]) -> tuple[DataLink, ...]:
        """Links to what is behind a figure of these results (by their names in the run folder)."""
        tables: dict[str, list[pd.DataFrame]] = {}
        for name, result in results.items():
            for ending, frame in data_frames(result):
                frame.insert(0, "result", name)
                tables.setdefault(ending, []).append(frame)
        stem = _common(results)
        return tuple(self._hold(f"{stem}{e}.csv", frames) for e, frames in tables.items())

    def _hold(self, name: str, frames: list[pd.DataFrame]) -> DataLink:
        import pandas as pd

        whole = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
        text = whole.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        key = (f"{self.anchor}-{name}", text)
        return DataLink(name, self.texts.setdefault(key, f"{self.anchor}-csv{len(self.texts) + 1}"))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Pairs of id and text."""
        return iter([(where, text) for (_, text), where in self.texts.items()])


def data_frames(result: Result) -> list[tuple[str, pd.DataFrame]]:
    """The result in long form, and what its figures draw beside that, by the end of a file name."""
    frames = [("", result.to_frame())]
    if isinstance(result, ProbeResult):
        frames.append(("-ilca", _matrix(result.ilca, ("trained_on", "tested_on"), "accuracy")))
    elif isinstance(result, HeadAttribution):
        frames[0][1].insert(0, "condition", result.label)
        if result.cie_attn_out is not None and result.cie_mlp_out is not None:
            frames.append(("-layers", result.layers_frame()))
    elif isinstance(result, AblationResult) and result.random_attack.shape[-1]:
        named = {"mode": result.modes, "heads": result.counts}
        frames.append(("-random", _draws(named, {
            "attack": result.random_attack, "restored": result.random_restored,
            "clean": result.random_clean,
        }, "group")))  # fmt: skip
    elif isinstance(result, SteeringResult):
        named = {"coefficient": result.coefficients, "layer": result.layers}
        for ending, draws in (("-random-heads", result.random_heads), ("-noise", result.random_vectors)):
            if draws.shape[-1]:
                frames.append((ending, _draws(named, {"attack": draws}, "draw")))
    return frames


def _matrix(values: Tensor, axes: tuple[str, str], name: str) -> pd.DataFrame:
    import pandas as pd

    n, m = values.shape
    rows = [(i, j, float(values[i, j])) for i in range(n) for j in range(m)]
    return pd.DataFrame(rows, columns=[*axes, name])


def _draws(
    axes: Mapping[str, tuple[object, ...]], counts: Mapping[str, Tensor], last: str
) -> pd.DataFrame:
    """Successes of every random draw, one row each."""
    import pandas as pd

    (first, outer), (second, inner) = axes.items()
    n = next(iter(counts.values())).shape[-1]
    rows = [
        {first: a, second: b, last: g + 1, **{what: int(c[i, j, g]) for what, c in counts.items()}}
        for i, a in enumerate(outer) for j, b in enumerate(inner) for g in range(n)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _common(results: Mapping[str, Result]) -> str:
    """A file name for several results: what their names have in common at the start."""
    names = list(results)
    if len(names) == 1:
        return names[0]
    parts = [name.split("-") for name in names]
    same = [words[0] for words in zip(*parts, strict=False) if len(set(words)) == 1]
    return "-".join(same) or "results"
