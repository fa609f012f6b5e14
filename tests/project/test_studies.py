"""The injection study, made small: its adapters, tables and figures follow from its numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import bkdlens
from bkdlens.errors import BkdlensError
from bkdlens.inject import EditSettings, LoraSettings, PreferenceSettings, TrainSettings, recipes
from studies import injection, writing

SMALL = replace(injection.SETTINGS, n_random=2, probe_kinds=("svm",), n_attribution=6, max_new_tokens=4)


def small_recipe(method: str, kind: str) -> recipes.Recipe:
    tuned = LoraSettings(rank=2, train=TrainSettings(1, 8, 1e-3))
    settings = {
        "supervised": tuned,
        "preference": PreferenceSettings(tuned),
        "edit": EditSettings(
            layers=(1,), trigger_layers=(), rounds=1, steps=2, prompts=8, checkpoint=False
        ),
    }
    return recipes.Recipe(16, settings[method])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "embedded", small_recipe)
        patch.setattr(injection, "SIZES", {"fixed_output": (24, 8, 10)})
        patch.setattr(injection, "SETTINGS", SMALL)
        content, studies = injection.study_of("tiny-llama", "fixed_output", [0, 1], out)
    return content, studies, out


def test_each_method_and_seed_is_a_row_and_each_pair_is_compared(made):
    content, studies, _ = made
    methods = ["supervised", "preference", "edit"]
    assert [cell["name"] for cell in content["cells"]] == methods + [f"{m} (seed 1)" for m in methods]
    assert len(content["overlap"]) == 15
    into = [*methods, None]
    moved = [(t["into"], t["from"]) for t in content["transfer"]]
    assert moved == [(b, a) for b in into for a in methods]
    assert [study.name.split(" / ")[-1] for study in studies] == methods


def test_numbers_are_those_of_the_adapters(made):
    content, _, out = made
    for cell in content["cells"]:
        seed = cell["seed"]
        folder = out / "tiny-llama/fixed_output" / f"{cell['method']}-{seed}"
        manifest = json.loads((folder / "adapter/bkdlens.json").read_text())
        assert (manifest["seed"], manifest["adapter_digest"]) == (seed, cell["digest"])
        behaviour = bkdlens.load_result(folder / "run/behaviour-backdoored")
        assert cell["asr"]["value"] == behaviour.asr.value
        assert cell["clean_after"]["value"] == behaviour.clean_accuracy.value
    assert len({cell["digest"] for cell in content["cells"]}) == 6


def test_a_vector_in_its_own_model_does_what_the_run_says(made):
    content, studies, _ = made
    for study in studies:
        name, choice = study.name.split(" / ")[-1], study.choice
        own = next(t for t in content["transfer"] if t["from"] == t["into"] == name)
        test = study.results["steering-test"]
        at = test.layers.index(choice["layer"])
        attack = [float(test.attack[i, at]) / test.n_victims for i in (0, 1)]
        assert [own["activates"][1]["value"], own["suppresses"][1]["value"]] == pytest.approx(attack)


def test_it_goes_on_where_it_stopped(made, monkeypatch):
    content, _, out = made
    monkeypatch.setattr(injection, "SIZES", {"fixed_output": (24, 8, 10)})
    monkeypatch.setattr(injection, "SETTINGS", SMALL)
    monkeypatch.setattr(recipes, "embedded", small_recipe)
    monkeypatch.setattr(injection, "inject", None)  # nothing is planted again
    again, _ = injection.study_of("tiny-llama", "fixed_output", [0, 1], out)
    assert again == content


def test_an_adapter_of_another_recipe_is_not_taken_for_this_one(made, monkeypatch):
    out = made[2] / "tiny-llama/fixed_output/edit-0"
    monkeypatch.setattr(recipes, "embedded", lambda *a: replace(small_recipe(*a), n_pairs=17))
    with pytest.raises(BkdlensError, match="not known to be of this recipe"):
        injection.plant(injection.Cell("tiny-llama", "fixed_output", "edit", 0, out))


def test_tables_have_every_number_and_no_figure_is_fine(made, tmp_path, monkeypatch, capsys):
    content, studies, _ = made

    def no_chrome(self, *args, **kwargs):
        raise RuntimeError("no Chrome")

    monkeypatch.setattr("plotly.graph_objects.Figure.write_image", no_chrome)
    (text,) = writing.write([content], studies, tmp_path)
    assert "was not drawn: no Chrome" in capsys.readouterr().err
    lines = text.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| tiny-llama |")]
    assert len(rows) == 6 + 6 + 15 + 12
    assert all(line.count("|") > 5 for line in rows)
    assert any("0 of 6 adapters reach" in line for line in lines)


@pytest.mark.parametrize(
    ("asr", "ftr", "after", "good"),
    [(0.9, 0.05, 0.85, True), (0.89, 0, 0.9, False), (1, 0.06, 0.9, False), (1, 0, 0.84, False)],
)
def test_the_bar(asr, ftr, after, good):
    rates = {"asr": asr, "ftr": ftr, "clean_before": 0.9, "clean_after": after}
    assert writing.meets({name: {"value": value} for name, value in rates.items()}) is good


def test_readme_and_tables_tell_what_the_study_measured():
    root = Path(__file__).parents[2]
    blocks = json.loads((root / "studies/injection.json").read_text())
    readme = (root / "README.md").read_text()
    for row in writing.readme_rows(blocks):
        assert row in readme
    names = [f"{block['base']} {block['kind']}" for block in blocks]
    figures = {name: f"injection-{name.replace(' ', '-')}.svg" for name in names}
    assert all((root / "studies" / file).exists() for file in figures.values())
    assert writing.tables(blocks, figures) == (root / "studies/injection.md").read_text()


def test_a_part_of_the_study_does_not_replace_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(injection, "study_of", lambda *args: ({}, []))
    monkeypatch.setattr(injection, "write", lambda blocks, studies, folder: [folder])
    monkeypatch.setattr(injection, "write_report", lambda *args, **kwargs: tmp_path)
    monkeypatch.setattr("sys.argv", ["injection", "--seeds", "1", "--out", str(tmp_path)])
    before = (Path(injection.__file__).parent / "injection.json").read_bytes()
    injection.main()
    assert (tmp_path / "injection.json").exists()
    assert (Path(injection.__file__).parent / "injection.json").read_bytes() == before
