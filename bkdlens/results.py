"""What every result shares: it prints, compares, becomes a DataFrame, plots, saves and loads.

A result is a frozen dataclass of tensors and plain values. It is saved as a readable json file with
the tensors beside it in a safetensors file, carries where it came from, and loads back equal.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import singledispatch
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bkdlens.answers import Answers
from bkdlens.errors import HeadError, ResultError, unknown
from bkdlens.types import Head

if TYPE_CHECKING:
    import plotly.graph_objects as go

R = TypeVar("R", bound="Result")
PACKAGES = ("bkdlens", "torch", "transformers", "transformer-lens", "peft", "scikit-learn")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def replacing(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Paths beside ``targets`` to write to; they replace the targets once all of them are whole.

    Raises:
        ResultError: if one cannot be written, as on a full disk; the targets are then as they were.
    """
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            written = tuple(Path(scratch) / target.name for target in targets)
            yield written
            for file, target in zip(written, targets, strict=True):
                os.replace(file, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ResultError(
            f"{targets[-1]} cannot be written ({reason}); free some space or name another folder, what "
            "was there is as it was."
        ) from error


@dataclass(frozen=True)
class Provenance:
    """Where a result came from."""

    model: Mapping[str, Any] = field(default_factory=dict)  # names, digests, dtype, parity
    data: str = ""  # where the pairs came from, in words
    data_digest: str = ""  # sha256 over the pairs' texts
    n_pairs: int = 0  # how many were measured
    prompt_format: Mapping[str, Any] = field(default_factory=dict)  # how a prompt was rendered
    seed: int = 0  # of everything that was drawn at random
    settings: Mapping[str, Any] = field(default_factory=dict)  # the analysis' own
    versions: Mapping[str, str] = field(default_factory=versions)  # of packages


def provenance(model: Any, pairs: Any, fmt: Any, seed: int, **settings: Any) -> Provenance:
    """The provenance of a result on ``model`` (a HookedTransformer) and ``pairs`` (a PairSet)."""
    info = getattr(model, "bkdlens_info", None)
    return Provenance(
        model=asdict(info) if is_dataclass(info) and not isinstance(info, type) else {},
        data=pairs.source,
        data_digest=pairs.digest,
        n_pairs=len(pairs),
        prompt_format=asdict(fmt),
        seed=seed,
        settings=settings,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """The base of all results; subclasses are frozen dataclasses that add their axes and numbers.

    A subclass registers itself under its name, which is what a saved file is read back by.
    """

    kinds: ClassVar[dict[str, type[Result]]] = {}
    saved_as: ClassVar[Mapping[str, str]] = {}  # names in files, where a field has another one
    provenance: Provenance

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Result.kinds[cls.__name__] = cls

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The result in long form, one row per cell."""

    def frames(self) -> dict[str, pd.DataFrame]:
        """Everything that figures draw, in long form, by what is added to the result's file name."""
        return {"": self.to_frame()}

    def plot(self) -> go.Figure:
        """The result's figure; :mod:`bkdlens.plot` has more."""
        return figure(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | Path) -> Path:
        """Write ``path``.json and ``path``.safetensors, each whole or not at all.

        Raises:
            ResultError: if they cannot be written, as on a full disk; earlier files stay whole.
        """
        stem = Path(path)
        tensors: dict[str, torch.Tensor] = {}
        content = {"type": type(self).__name__}
        names = {f.name: self.saved_as.get(f.name, f.name) for f in fields(self)}
        content |= {named: _encode(getattr(self, name), named, tensors) for name, named in names.items()}
        targets = (stem.with_name(stem.name + ending) for ending in (".safetensors", ".json"))
        with replacing(*targets) as (weights, head):
            save_file(tensors, weights)
            head.write_text(json.dumps(content, indent=1) + "\n")
        return stem

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what :meth:`save` wrote; a field that an earlier version lacked has its default.

        Raises:
            ResultError: if a file is missing or damaged, or holds another kind of result.
        """
        stem = Path(path)
        content = read_json(stem)
        if content.get("type") != cls.__name__:
            raise ResultError(f"{stem.name}.json holds a {content.get('type')}, not a {cls.__name__}.")
        try:
            tensors = load_file(stem.with_name(stem.name + ".safetensors"))
            names = {f.name: cls.saved_as.get(f.name, f.name) for f in fields(cls)}
            absent = {f.name for f in fields(cls) if _default(f) is not MISSING} - content.keys()
            names = {name: named for name, named in names.items() if name not in absent}
            return cls(**{name: _decode(content[named], tensors) for name, named in names.items()})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, HeadError) as error:
            raise ResultError(f"The saved result {stem} is damaged ({error}); make it again.") from None


@singledispatch
def figure(result: Result) -> go.Figure:
    """The figure of any result, found by its type.

    The module ``figures`` beside a result's own registers how it is drawn. It is imported here, when a
    figure is first asked for, so that measuring needs no plotly.

    Args:
        result: of any analysis.

    Returns:
        The one that ``result.plot()`` gives.

    Raises:
        ResultError: for a kind of result that has no figure.

    Examples:
        >>> fig = bkdlens.plot.figure(heads)
    """
    figures = f"{type(result).__module__.rpartition('.')[0]}.figures"
    if figures.startswith("bkdlens.analyses.") and figures not in sys.modules:
        import_module(figures)
        return figure(result)
    kinds = sorted(kind.__name__ for kind in figure.registry if kind is not object)
    raise ResultError(unknown("figure for a result of kind", type(result).__name__, kinds))


def read_json(stem: Path) -> dict[str, Any]:
    """The readable part of a saved result."""
    try:
        content = json.loads(stem.with_name(stem.name + ".json").read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ResultError(f"There is no readable result at {stem}.json ({error}).") from None
    return content


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name, "shape": list(value.shape)}
    if isinstance(value, Provenance):
        return {"provenance": asdict(value)}
    if isinstance(value, Head):
        return {"head": str(value)}
    if isinstance(value, Answers):
        parts = {part: getattr(value, part) for part in ("index", "success", "good")}
        told = {part: _encode(tensor, f"{name}.{part}", tensors) for part, tensor in parts.items()}
        return {"answers": list(value.texts), **told}
    if isinstance(value, tuple | list):
        return [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {"map": {str(k): _encode(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    return value


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v, tensors) for v in value)
    if isinstance(value, dict):
        if "tensor" in value:
            tensor = tensors[value["tensor"]]
            if list(tensor.shape) != value["shape"]:
                raise ValueError(f"{value['tensor']} has the shape {list(tensor.shape)}")
            return tensor
        if "provenance" in value:
            return Provenance(**value["provenance"])
        if "head" in value:
            return Head.parse(value["head"])
        if "answers" in value:
            index = _decode(value["index"], tensors)
            if not all(isinstance(text, str) for text in value["answers"]):
                raise ValueError("an answer is no text")
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(value["answers"]):
                raise ValueError("an answer's number is out of range")
            marks = [_decode(value.get(part), tensors) for part in ("success", "good")]
            if any(mark is not None and mark.shape != index.shape for mark in marks):
                raise ValueError("an answer's outcome is missing")
            return Answers(tuple(value["answers"]), index, *marks)
        return {k: _decode(v, tensors) for k, v in value["map"].items()}
    return value


def _default(of: Field[Any]) -> Any:
    """The value of a field that is not given; ``MISSING`` where it must be."""
    return of.default if of.default_factory is MISSING else of.default_factory()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(
            a.double().cpu(), b.double().cpu(), rtol=0, atol=0, equal_nan=True
        )
    if isinstance(a, Provenance) and isinstance(b, Provenance):
        return json.dumps(asdict(a), sort_keys=True) == json.dumps(asdict(b), sort_keys=True)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)
