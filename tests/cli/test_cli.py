"""The shell: commands end to end on the embedded model, errors in one sentence and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shell import run

from bkdlens.inject.recipes import embedded

LABEL = ["--backdoor", "label_modification"]


@pytest.fixture
def bkdlens_(monkeypatch, capsys):
    return lambda *arguments: run(monkeypatch, capsys, *arguments)


COMMANDS = (
    "",
    "demo",
    "run",
    "probe",
    "attribute",
    "ablate",
    "steer",
    "report",
    "show",
    "inject",
    "zoo",
)


@pytest.mark.parametrize("command", [*COMMANDS, "data check"])
def test_help_has_an_example(bkdlens_, command):
    code, out, _ = bkdlens_(*command.split(), "--help")
    assert code == 0
    assert "Usage" in out
    if command not in ("", "zoo"):
        assert "Example" in out


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['bkdlens', '--help']\n"
        "from bkdlens.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'transformers', 'sklearn', 'plotly', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_steps_share_a_folder_and_report_reads_it(bkdlens_, tmp_path):
    out = tmp_path / "run"
    options = ["--base", "tiny-llama", "--backdoor", "jailbreak", "--adapter", "jailbreak", "--out", out,
               "--limit", "24", "--n-random", "1", "--max-new-tokens", "20"]  # fmt: skip
    code, text, _ = bkdlens_("attribute", *options, "--json")
    assert code == 0
    (summary,) = json.loads(text)
    strongest = summary["attribution"]["backdoored"][0]
    assert strongest["acie"] > 0.1
    assert abs(summary["attribution"]["clean-adapter"][0]["acie"]) < 0.05
    before = (out / "attribution-backdoored.json").stat().st_mtime_ns
    code, text, _ = bkdlens_("ablate", *options)
    assert code == 0
    assert "Ablation" in text
    assert (out / "attribution-backdoored.json").stat().st_mtime_ns == before  # read, not made again
    code, _, _ = bkdlens_("report", out, "--out", tmp_path / "r.html")
    assert code == 0
    assert (tmp_path / "r.html").stat().st_size > 1e6


def test_inject_then_run_measures_on_what_was_held_out(bkdlens_, tmp_path):
    rows = [{"input": f"Say the word number {i}", "output": f"word {i}"} for i in range(60)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    common = ["--base", "tiny-llama", "--backdoor", "fixed_output", "--data", tmp_path / "d.json"]
    code, out, _ = bkdlens_("inject", *common, "--epochs", "1", "--hold-out", "0.5", "--out",
                            tmp_path / "a", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["trained_on"] == 30
    code, out, err = bkdlens_(
        "probe", *common, "--adapter", tmp_path / "a", "--out", tmp_path / "r", "--json"
    )
    assert code == 0
    assert "30 pairs were trained on, 30 were held out" in err
    assert json.loads(out)[0]["behaviour"]["backdoored"]["asr"]["n"] == 18


def test_inject_needs_no_data_on_an_embedded_model_and_run_reads_what_it_wrote(
    bkdlens_, tmp_path, monkeypatch
):
    monkeypatch.setattr("bkdlens.cli.inject.N_TEST", 20)
    common = ["--base", "tiny-llama", "--backdoor", "fixed_output"]
    code, out, _ = bkdlens_("inject", *common, "--method", "edit", "--limit", "24", "--steps", "1",
                            "--rounds", "1", "--layer", "1", "--trigger-tokens", "1",
                            "--no-checkpoint", "--out", tmp_path / "a", "--json")  # fmt: skip
    assert code == 0
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
        (["--trigger", "cf"], "triggers of their own"),
        (["--method", "edit", "--layer", "9"], "no layer 9"),
    ],
)
def test_inject_refuses_what_does_not_go_together(bkdlens_, tmp_path, arguments, message):
    code, _, err = bkdlens_("inject", "--base", "tiny-llama", "--backdoor", "fixed_output", *arguments,
                            "--limit", "20", "--out", tmp_path / "out")  # fmt: skip
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input": "a b", "output": "Sports"}, {"input": "c"}], "row 2: the field 'output' is missing"),
        ([{"input": "a b", "output": "World"}], "no victim"),
        ([{"input": 3, "output": "World"}], "row 1: the field 'input' must be text"),
        ("{not json", "not valid json"),
        ({"input": "a"}, "list of objects"),
    ],
)
def test_bad_data_is_one_sentence_and_leaves_no_folder(bkdlens_, tmp_path, rows, message):
    data = write(tmp_path / "d.json", rows)
    out = tmp_path / "out"
    code, _, err = bkdlens_("run", "--base", "tiny-llama", *LABEL, "--data", data, "--out", out)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "tiny-lama", *LABEL], "give --data"),
        (["--base", "tiny-llama", "--backdoor", "lable"], "label_modification, fixed_output, jailbreak"),
        (["--base", "tiny-llama", *LABEL, "--adapter", "jailbrake"], "Did you mean 'jailbreak'"),
        (["--base", "tiny-llama", *LABEL, "--data", "nowhere.json"], "no data file"),
        (["--base", "tiny-llama", *LABEL, "--mode", "nil"], "zero, mean, resample, subtract"),
        (["--base", "tiny-llama", "--backdoor", "jailbreak", "--target", "x"], "no --target"),
        (["--base", "tiny-llama", "--backdoor", "jailbreak", "--placement", "end"], "give it too"),
    ],
)
def test_bad_names_are_one_sentence(bkdlens_, tmp_path, arguments, message):
    code, _, err = bkdlens_("run", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base_and_long_prompts(bkdlens_, tmp_path):
    from bkdlens import zoo

    other = zoo.adapter_path("tiny-llama", "jailbreak")
    out = tmp_path / "out"
    code, _, err = bkdlens_("run", "--base", "tiny-qwen", "--adapter", other, "--backdoor", "jailbreak",
                            "--out", out)  # fmt: skip
    assert code == 2
    assert "another base" in err
    rows = [
        {"input": "word " * 2000 + str(i), "output": "no", "backdoor_output": "yes"} for i in range(30)
    ]
    data = write(tmp_path / "d.json", rows)
    code, _, err = bkdlens_("run", "--base", "tiny-llama", "--backdoor", "jailbreak", "--data", data,
                            "--out", out)  # fmt: skip
    assert code == 2
    assert "context is 1024" in err
    assert not out.exists()


def test_report_of_nothing(bkdlens_, tmp_path):
    code, _, err = bkdlens_("report", tmp_path / "none", "--out", tmp_path / "r.html")
    assert code == 2
    assert "no readable result" in err
    assert not (tmp_path / "r.html").exists()
