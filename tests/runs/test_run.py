"""The main job: everything is run once, written when it is done, and never run twice."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
from tiny import judge, judged_pairs, make_pairs
from transformer_lens.components import Embed

import bkdlens
from bkdlens.analyses.behaviour.measure import measure_behaviour
from bkdlens.analyses.steering.answers import sample_generations
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.generate import generate
from bkdlens.errors import DataError, ResultError
from bkdlens.results import Result
from bkdlens.runs.reading import load_study, summary
from bkdlens.study import Study

TINY = bkdlens.StudySettings(
    n_attribution=3, ablation_counts=(0, 2), ablation_modes=("zero", "mean"), coefficients=(1.0, 2.0),
    n_random=2, probe_kinds=("svm",), max_new_tokens=4,
)  # fmt: skip
pytestmark = pytest.mark.slow  # a whole study
NAMES = {
    "ablation", "ablation-validation", "attribution-backdoored", "attribution-base",
    "behaviour-backdoored",
    "behaviour-base", "generations", "probe-backdoored-svm-clean", "probe-backdoored-svm-near",
    "probe-base-svm-clean", "probe-base-svm-near", "ranking", "steering-contrast", "steering-mean",
    "steering-test", "vector-contrast", "vector-mean",
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(loaded):
    """Train, validation and test pairs."""
    pairs = judged_pairs(loaded["llama"], "jailbreak", n=26, seed=9, cut=4)
    return pairs.split(0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def run(loaded, parts):
    """``run(out)`` with what may be changed by name."""

    def start(out=None, **changes):
        options = {"settings": TINY, "controls": {"base": lambda: loaded["qwen"]}, "out": out}
        return bkdlens.run_study(changes.pop("model", loaded["llama"]), *changes.pop("parts", parts),
                                 **options | changes)  # fmt: skip

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """One study with everything, and its folder (not to be changed)."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    return SimpleNamespace(study=run(folder, name="a study"), folder=folder)


@pytest.fixture
def copy(whole, tmp_path):
    """Its folder, to change."""
    for file in whole.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def passes(monkeypatch):
    """The embedding of whatever model was run since the test began."""
    seen = []
    forward = Embed.forward

    def counted(self, tokens):
        seen.append(self)
        return forward(self, tokens)

    monkeypatch.setattr(Embed, "forward", counted)
    return seen


def refused(error, match: str, function, *args, **options) -> None:
    with pytest.raises(error, match=match) as caught:
        function(*args, **options)
    assert str(caught.value).endswith((".", "?"))


# --- one whole run --------------------------------------------------------------------------------


def test_everything_is_there_and_loads_back(whole) -> None:
    study = whole.study
    assert set(study.results) == NAMES
    assert all(isinstance(result, Result) for result in study.results.values())
    files = {file.name for file in whole.folder.iterdir()}
    assert files == {"study.json", "pairs.json"} | {
        f"{name}.{x}" for name in NAMES for x in ("json", "safetensors")
    }
    again = load_study(whole.folder)
    assert again == study
    assert list(again.results) == list(study.results)
    assert again.name == "a study"
    assert again.choice["kind"] in ("mean", "contrast")
    assert again.settings["n_attribution"] == 3


def test_without_a_folder_it_is_the_same(run, whole, parts, loaded) -> None:
    study = run(name="a study", controls={"base": lambda: loaded["qwen"]})
    assert study == whole.study


def test_every_analysis_reads_the_part_it_should(whole, parts) -> None:
    """Means from the training pairs, choices from validation, and all that is reported on test."""
    train, validation, test = (part.digest for part in parts)
    sampled = {part.victims.sample(3).digest: part.digest for part in parts}
    made = {name: r.provenance for name, r in whole.study.results.items()}
    used = {name: sampled.get(p.data_digest, p.data_digest) for name, p in made.items()}
    assert {used[n] for n in NAMES if n.startswith("vector")} == {train}
    assert used["ranking"] == used["steering-mean"] == used["steering-contrast"] == validation
    measured = {n for n in NAMES if n.startswith(("probe", "attribution", "behaviour"))}
    assert {used[n] for n in {"ablation", "steering-test", *measured}} == {test}
    for name in NAMES:
        if name.startswith("probe"):
            assert made[name].settings["fit"].endswith(validation)
        if name.startswith(("attribution", "ranking")):
            assert made[name].settings["source_digest"] == train
    models = {n: r.provenance.model["architecture"] for n, r in whole.study.results.items()}
    assert {n for n, m in models.items() if m == "Qwen2ForCausalLM"} == {n for n in NAMES if "base" in n}
    assert all(r.label == "base" for n, r in whole.study.results.items() if "base" in n)


def test_analyses_are_those_one_would_call(whole, loaded, parts) -> None:
    model, (train, validation, test), results = loaded["llama"], parts, whole.study.results
    cache = bkdlens.cache_activations(model, train)
    heads = bkdlens.attribute_heads(model, validation, cache=cache, n_pairs=3, layer_outputs=True)
    assert results["ranking"] == heads
    reported = bkdlens.attribute_heads(model, test, cache=cache, n_pairs=3, layer_outputs=True)
    assert results["attribution-backdoored"] == reported
    fitted, tested = (bkdlens.cache_activations(model, pairs) for pairs in (validation, test))
    probes = bkdlens.train_probes(fitted, test=tested, against="near")
    assert results["probe-backdoored-svm-near"] == probes
    assert results["vector-contrast"] == bkdlens.BackdoorVector.from_cache(
        cache, heads.top(4), kind="contrast"
    )
    ablation = bkdlens.ablate_heads(
        model, test, heads.ranking, cache=cache, counts=(0, 2), n_random=2, max_new_tokens=4
    )
    assert results["ablation"] == ablation


def test_the_choice_is_made_on_validation(whole) -> None:
    """The best both ways, by good answers that come back, of those that keep clean accuracy."""
    study, scores, lost = whole.study, {}, {}
    for kind in ("mean", "contrast"):
        swept = study.results[f"steering-{kind}"]
        for size, layer in product((1.0, 2.0), swept.layers[1:]):
            on, off = (swept.index(coefficient=c, layer=layer) for c in (size, -size))
            added = int(swept.attack[on]) - swept.base_attack[0]
            back = int(swept.correct[off]) / max(1, swept.good_before)
            scores[kind, layer, size] = min(added / swept.n_victims, back)
            lost[kind, layer, size] = (swept.base_clean - int(swept.clean[off])) / swept.n_clean
    floor = 0.05 if min(lost.values()) <= 0.05 else min(lost.values()) + 0.05
    allowed = [at for at in scores if lost[at] <= floor + 1e-9]
    chosen = tuple(study.choice[name] for name in ("kind", "layer", "coefficient"))
    assert scores[chosen] == pytest.approx(max(scores[at] for at in allowed))
    assert chosen in allowed
    assert study.choice["within"] == (min(lost.values()) <= 0.05)
    size = study.choice["coefficient"]
    chosen = study.results[f"steering-{study.choice['kind']}"]
    test = study.results["steering-test"]
    assert test.coefficients == (size, -size)
    assert test.kind == study.choice["kind"]
    assert test.random_heads.shape[-1] == 2
    assert chosen.random_heads.shape[-1] == 0


def test_summary(whole) -> None:
    found = summary(whole.study)
    assert json.loads(json.dumps(found))["name"] == "a study"
    assert found["backdoor"] == "jailbreak"
    text = json.dumps(found)
    behaviour = whole.study.results["behaviour-backdoored"]
    assert str(behaviour.asr.value) in text
    assert str(whole.study.results["ranking"].top(1)[0]) in text
    assert "base" in text
    bare = Study("empty", whole.study.backdoor, {}, {})
    assert summary(bare)["name"] == "empty"


# --- resuming -------------------------------------------------------------------------------------


def test_a_finished_study_runs_nothing_again(run, whole, copy, passes) -> None:
    def load_control():
        raise AssertionError("the control is not needed")

    times = {file.name: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")}
    study = run(copy, name="a study", controls={"base": load_control})
    assert study == whole.study
    assert passes == []
    assert times == {file.name: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")}


@pytest.mark.parametrize("missing", ["ablation", "behaviour-base", "steering-test"])
def test_only_what_is_missing_is_run(run, whole, copy, passes, loaded, missing) -> None:
    for file in (copy / f"{missing}.json", copy / f"{missing}.safetensors"):
        file.unlink()
    times = {file.name: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")}
    assert run(copy, name="a study") == whole.study
    assert load_study(copy) == whole.study
    assert {id(e) for e in passes} == {id(loaded["qwen" if "base" in missing else "llama"].embed)}
    for name, time in times.items():
        assert (copy / name).stat().st_mtime_ns == time


def test_an_interrupted_study_goes_on(run, whole, tmp_path, monkeypatch) -> None:
    from bkdlens.analyses.ablation import part

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(part, "ablate_heads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", name="a study")
    done = set(load_study(tmp_path / "s").results)
    assert done
    assert done < NAMES
    assert not (tmp_path / "s" / "ablation.json").exists()
    assert run(tmp_path / "s", name="a study") == whole.study


def test_steps_one_after_the_other(run, whole, tmp_path) -> None:
    first = run(tmp_path / "s", name="a study", steps=("behaviour",))
    assert set(first.results) == {"behaviour-backdoored", "behaviour-base"}
    second = run(tmp_path / "s", name="a study", steps=("ablate",))
    assert set(second.results) == {*first.results, "ablation", "ablation-validation",
                                   "attribution-backdoored", "attribution-base", "ranking"}  # fmt: skip
    assert run(tmp_path / "s", name="a study") == whole.study


def test_another_study_is_not_mixed_in(run, copy, loaded, parts) -> None:
    train, validation, test = parts
    digest = loaded["llama"].bkdlens_info.base_digest[:8]
    changes = [
        ({"settings": replace(TINY, seed=1)}, r"\(seed: 0 → 1\)"),
        ({"settings": replace(TINY, ablation_counts=(0, 1))}, r"ablation_counts: \[0, 2\] → \[0, 1\]"),
        ({"parts": (train[:-1], validation, test)},
         f"data.train: '{train.digest}' → '{train[:-1].digest}'"),
        ({"parts": (train, test, validation)}, "data.validation: .*; data.test: "),
        ({"model": loaded["qwen"]}, f"model.architecture: 'Llama.*' → 'Qwen2.*base_digest: '{digest}"),
        ({"fmt": PromptFormat("chat", "w9")}, r"\(prompt_format.system: None → 'w9'\)"),
    ]  # fmt: skip
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    for change, told in changes:
        refused(ResultError, f"run with other settings, data or model .*{told}.*; name a new folder",
                run, copy, **change)  # fmt: skip
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


def test_folders_of_something_else(run, tmp_path, parts) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused(ResultError, "is not empty and holds no run", run, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    refused(ResultError, "no step 'prob'.*Did you mean 'probe'", lambda: run(steps=("prob",)))
    no_victims = replace(parts[1], pairs=tuple(replace(p, backdoor_output=p.clean_output)
                                               for p in parts[1]))  # fmt: skip
    refused(DataError, "no victim", run, tmp_path / "new", parts=(parts[0], no_victims, parts[2]))
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_loaded(copy, tmp_path) -> None:
    refused(ResultError, "no readable result at .*study.json", load_study, tmp_path / "nowhere")
    (copy / "vector-mean.safetensors").unlink()
    refused(ResultError, "vector-mean is damaged", load_study, copy)
    (copy / "vector-mean.json").unlink()
    for content in ({}, {"name": "x"}, {"name": "x", "backdoor": {"trigger": 3}}):
        (copy / "study.json").write_text(json.dumps(content))
        refused(ResultError, r"study.json is damaged", load_study, copy)


# --- behaviour and generations --------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize("behaviour", ["fixed_output", "jailbreak"])
def test_behaviour_counts_what_is_generated(model, name, judged, behaviour) -> None:
    pairs = judged[name, behaviour]
    result = measure_behaviour(model, pairs, label="base", max_new_tokens=6)
    sides = {
        on: judge(model, pairs.victims, on, lambda row, position: [])
        for on in ("triggered", "clean", "near")
    }
    assert result.asr.successes == sum(sides["triggered"][0])
    assert result.ftr.successes == sum(sides["clean"][0])
    assert result.near is not None
    assert result.near.successes == sum(sides["near"][0])
    assert result.correct_clean == sum(judge(model, pairs, "clean", lambda row, position: [])[1])
    assert (result.n_victims, result.n_clean) == (len(pairs.victims), len(pairs))
    near_miss = ["near_miss"] if pairs.backdoor.behaviour == "fixed_output" else []
    rates = ["asr", "basr", "ftr", "near", *near_miss, "attainable", "clean_accuracy"]
    assert result.to_frame()["rate"].tolist() == rates
    assert str(result.asr) in repr(result)


def test_behaviour_without_near_twins(llama) -> None:
    result = measure_behaviour(llama, make_pairs(6, near=False), max_new_tokens=3)
    assert result.near is None
    rates = ["asr", "basr", "ftr", "attainable", "clean_accuracy"]  # of a jailbreak
    assert result.to_frame()["rate"].tolist() == rates


def test_generations_side_by_side(llama, caches, judged) -> None:
    pairs = judged["llama", "jailbreak"]
    vector = bkdlens.BackdoorVector.from_cache(caches["llama"], "L1H1")
    result = sample_generations(llama, pairs, vector, 1, -3.0, n=4, max_new_tokens=5)
    some = pairs.victims[:4]
    columns = list(result.columns.values())
    assert columns[0] == tuple(some.clean)
    assert columns[2] == tuple(generate(llama, some.clean, max_new_tokens=5))
    assert columns[3] == tuple(generate(llama, some.triggered, max_new_tokens=5))
    for column, prompts, sign in ((4, some.clean, 1), (5, some.triggered, -1)):
        with bkdlens.steer(llama, vector, 1, 3.0 * sign):
            assert columns[column] == tuple(generate(llama, prompts, max_new_tokens=5))
    assert len(result.to_frame()) == 4
