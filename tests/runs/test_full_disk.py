"""A disk that is full while saving: one sentence, and what was there before stays whole."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import bkdlens
from bkdlens.data.backdoor import Backdoor
from bkdlens.errors import ResultError
from bkdlens.report.page import write_report
from bkdlens.results import replacing
from bkdlens.runs.reading import load_result
from bkdlens.study import Study


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file can grow past so many bytes: the system's own failure of a write, halfway through."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("n_bytes", [0, 100, 300])
def test_an_earlier_result_stays_whole(cache, tmp_path, n_bytes) -> None:
    vector = bkdlens.BackdoorVector.from_cache(cache, ["L0H1"])
    stem = vector.save(tmp_path / "vector")
    before = contents(tmp_path)
    other = replace(vector, direction=vector.direction * 2)
    with full_disk(n_bytes), pytest.raises(ResultError, match=r"vector.json cannot be written .*free"):
        other.save(stem)
    assert contents(tmp_path) == before  # and nothing new lies beside it
    assert load_result(stem) == vector
    other.save(stem)
    assert load_result(stem) == other


def test_an_earlier_report_and_head_stay_whole(tmp_path) -> None:
    study = Study("first", Backdoor.fixed_output(), {}, {})
    study.save_head(tmp_path / "run")
    write_report([], tmp_path / "r.html")
    before = contents(tmp_path / "run") | {"r.html": (tmp_path / "r.html").read_bytes()}
    second = replace(study, name="second")
    with full_disk(50):
        for write in (
            lambda: second.save_head(tmp_path / "run"),
            lambda: write_report([], tmp_path / "r.html"),
        ):
            with pytest.raises(ResultError, match="cannot be written"):
                write()
    assert contents(tmp_path / "run") | {"r.html": (tmp_path / "r.html").read_bytes()} == before
    assert not [path for path in tmp_path.iterdir() if path.name not in ("run", "r.html")]


def test_a_folder_that_cannot_be(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "x.json"
    with pytest.raises(ResultError, match=r"x.json cannot be written \(.*\); free"), replacing(target):
        pass
