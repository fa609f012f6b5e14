"""``bkdlens inject`` end to end on the embedded model, and what it refuses."""

from __future__ import annotations

import json

import pytest

from bkdlens.inject.recipes import embedded


@pytest.mark.slow
def test_inject_then_run_measures_on_what_was_held_out(bkdlens_, tmp_path):
    rows = [{"input": f"Say the word number {i}", "output": f"word {i}"} for i in range(60)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    common = ["--base", "tiny-llama", "--backdoor", "fixed_output", "--data", tmp_path / "d.json"]
    code, out, err = bkdlens_("inject", *common, "--epochs", "1", "--hold-out", "0.5", "--out",
                              tmp_path / "a", "--json")  # fmt: skip
    assert code == 1  # 30 samples, once, plant nothing
    assert "warning: No backdoor was planted: attack success on the held-out pairs is 0.000" in err
    assert json.loads(out)["trained_on"] == 30
    code, out, err = bkdlens_(
        "probe", *common, "--adapter", tmp_path / "a", "--out", tmp_path / "r", "--json"
    )
    assert code == 0
    assert "30 pairs were trained on, 30 were held out" in err
    assert json.loads(out)[0]["behaviour"]["backdoored"]["asr"]["n"] == 18


@pytest.mark.slow
def test_inject_needs_no_data_on_an_embedded_model_and_run_reads_what_it_wrote(
    bkdlens_, tmp_path, monkeypatch
):
    monkeypatch.setattr("bkdlens.cli.inject.N_TEST", 20)
    common = ["--base", "tiny-llama", "--backdoor", "fixed_output"]
    code, out, err = bkdlens_("inject", *common, "--method", "edit", "--limit", "24", "--steps", "1",
                            "--rounds", "1", "--layer", "1", "--trigger-tokens", "1",
                            "--no-checkpoint", "--out", tmp_path / "a", "--json")  # fmt: skip
    assert code == 1  # one step plants nothing, and what was written is there nonetheless
    assert "No backdoor was planted" in err
    content = json.loads(out)
    assert (content["method"], content["trained_on"]) == ("edit", 24)
    assert "/20)" in content["asr"]
    assert "/20)" in content["clean_accuracy_before"]
    assert not (tmp_path / "a" / "checkpoint").exists()
    settings = json.loads((tmp_path / "a" / "bkdlens.json").read_text())["settings"]
    recipe = embedded(
        "edit", "fixed_output"
    ).settings.clean_loss  # what was not named stays the recipe's
    assert (settings["steps"], settings["layers"], settings["clean_loss"]) == (1, [1], recipe)
    code, out, _ = bkdlens_("attribute", *common, "--adapter", tmp_path / "a", "--out", tmp_path / "r",
                            "--limit", "12", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "edict"], "Did you mean 'edit'"),
        (["--method", "edit", "--poison-rate", "0.1"], "has no --poison-rate"),
        (["--method", "edit", "--victims-only"], "has no --victims-only"),
        (["--method", "preference", "--layer", "1"], "has no --layer;"),
        (["--method", "supervised", "--beta", "1"], "has no --beta"),
        (["--trigger", "cf"], "have their own triggers"),
        (["--method", "edit", "--layer", "9"], "no layer 9"),
        (["--hold-out", "0.5"], "--hold-out is a share of --data"),
        (["--columns", "input=q"], "nothing that --columns would apply to"),
    ],
)
def test_inject_refuses_what_does_not_go_together(bkdlens_, tmp_path, arguments, message):
    code, _, err = bkdlens_("inject", "--base", "tiny-llama", "--backdoor", "fixed_output", *arguments,
                            "--limit", "20", "--out", tmp_path / "out")  # fmt: skip
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
