"""Files that version 0.1 wrote, before the package was rebuilt, load and are written as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_runs import content, differences

import bkdlens

SAVED = Path(__file__).parent / "saved-0.1"
KINDS = """
    AblationResult AnswerProbs BackdoorVector BehaviourResult Generations HeadAttribution HeadPattern
    PatchResult ProbeResult SteeringResult
"""
STEMS = sorted(p.with_suffix("") for p in SAVED.rglob("*.json") if p.name != "study.json")


def test_every_kind_is_there() -> None:
    kinds = {type(bkdlens.load_result(stem)) for stem in STEMS}
    assert {kind.__name__ for kind in kinds} == set(KINDS.split())


@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: stem.name)
def test_a_result_is_written_as_it_was(stem, tmp_path) -> None:
    """But for fields that it did not have yet: these have their default, which is null."""
    bkdlens.load_result(stem).save(tmp_path / stem.name)
    for ending in (".json", ".safetensors"):
        before, after = (content(folder / f"{stem.name}{ending}") for folder in (stem.parent, tmp_path))
        new = {name: after.pop(name) for name in after.keys() - before.keys()}
        assert all(value in (None, {"map": {}}) for value in new.values())  # nothing is made up
        assert differences(before, after) == []


@pytest.mark.slow
def test_a_study_loads(tmp_path) -> None:
    study = bkdlens.load_study(SAVED / "study")
    assert study.choice["kind"] in ("mean", "contrast")
    assert set(study.results) == {stem.name for stem in STEMS if stem.parent.name == "study"}
    study.save_head(tmp_path)
    before, after = (content(folder / "study.json") for folder in (SAVED / "study", tmp_path))
    judged_by = {name: after["backdoor"].pop(name) for name in ("success", "good", "against")}
    assert differences(before, after) == []
    assert judged_by["good"]["kind"] == "equal"  # what it was judged by, and did not say
    assert bkdlens.write_report([study], tmp_path / "r.html").exists()
