"""A study judged anew equals a fresh run with the same criteria."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import judged_pairs

import bkdlens
from bkdlens.data.backdoor import Backdoor
from bkdlens.errors import ResultError
from bkdlens.results import Result
from bkdlens.runs.rescore import rescore

pytestmark = pytest.mark.slow  # whole studies
SETTINGS = bkdlens.StudySettings(
    n_attribution=3, ablation_counts=(0, 2), ablation_modes=("mean",), coefficients=(1.0, 2.0),
    n_random=2, probe_kinds=("svm",), max_new_tokens=4, keep_controls=True,
)  # fmt: skip
STEPS = ("behaviour", "attribute", "ablate", "steer")
OTHERS = [{"success": "contains"}, {"success": "regex:w[1-4]", "good": "similar:0.3", "against": "own"}]


@pytest.fixture(scope="module", params=["fixed_output", "jailbreak"])
def parts(loaded, request):
    """Train, validation and test pairs."""
    pairs = judged_pairs(loaded["llama"], request.param, n=26, seed=9, cut=4)
    return pairs.split(0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def saved(loaded, parts, tmp_path_factory):
    """A study, and its folder."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return run(loaded["llama"], parts, {}, folder), folder


def run(model, parts, criteria, out=None):
    judged = [replace(p, backdoor=p.backdoor.judged_by(**criteria)) for p in parts]
    return bkdlens.run_study(model, *judged, settings=SETTINGS, steps=STEPS, out=out)


def plain(result: Result) -> Result:
    """A result without the settings of its provenance, where a steering result names its vector."""
    return replace(result, provenance=replace(result.provenance, settings={}))


@pytest.mark.parametrize("criteria", OTHERS, ids=str)
def test_it_equals_a_fresh_run(loaded, parts, saved, criteria, tmp_path) -> None:
    first, folder = saved
    again = bkdlens.load_study(folder)
    assert again == first
    judged = rescore(again, again.backdoor.judged_by(**criteria))
    fresh = run(loaded["llama"], parts, criteria)
    assert judged.backdoor == fresh.backdoor
    assert judged.choice == fresh.choice
    assert judged.results.keys() <= fresh.results.keys()
    for name, result in judged.results.items():
        assert plain(result) == plain(fresh.results[name]), name
        if hasattr(result, "judged_by"):
            said = result.provenance.settings["criteria"]
            assert said == fresh.results[name].provenance.settings["criteria"]
    left_out = fresh.results.keys() - judged.results.keys()
    assert left_out <= {"steering-test", "generations"}
    if first.choice == fresh.choice:
        assert not left_out
    loaded_again = bkdlens.load_study(judged.save(tmp_path / "judged"))
    assert loaded_again == judged


def test_what_cannot_be_judged_anew(saved, tmp_path) -> None:
    study, _ = saved
    other = Backdoor.fixed_output("another trigger")
    with pytest.raises(ResultError, match="Only the criteria"):
        rescore(study, other)
    with pytest.raises(ResultError, match="does not hold the pairs"):
        rescore(replace(study, pairs={}), study.backdoor.judged_by(success="contains"))
    without = {name: replace(r, answers={}) for name, r in study.results.items() if name == "ablation"}
    with pytest.raises(ResultError, match="no answers"):
        rescore(replace(study, results=without), study.backdoor)
    kept = {k: v for k, v in study.results["ablation"].answers.items() if not k.startswith("random")}
    without = {"ablation": replace(study.results["ablation"], answers=kept)}
    with pytest.raises(ResultError, match="keep_controls=True"):
        rescore(replace(study, results=without), study.backdoor)
    study.save(tmp_path / "x")
    with pytest.raises(ResultError, match="not empty"):
        study.save(tmp_path / "x")
