"""Analyses end to end on the embedded model; errors are one sentence, exit code 2 and no folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LABEL = ["--backdoor", "label_modification"]


@pytest.mark.slow
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
    assert "Necessary?" in text
    assert "Ablation by" not in text  # the sentences are in the report
    assert (out / "attribution-backdoored.json").stat().st_mtime_ns == before  # read, not made again
    code, _, _ = bkdlens_("report", out, "--out", tmp_path / "r.html")
    assert code == 0
    assert (tmp_path / "r.html").stat().st_size > 1e6


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
        (["--base", "tiny-llama", *LABEL, "--trigger-after", "x"], "give it too"),
        (["--base", "tiny-llama", *LABEL, "--labels", "a,b"], "nothing that --labels would apply to"),
        (["--base", "tiny-llama", *LABEL, "--control-adapter", "clean"], "name its --adapter"),
        (["--base", "tiny-llama", *LABEL, "--device", "gpu"], "no device 'gpu'"),
    ],
)
def test_bad_names_are_one_sentence(bkdlens_, tmp_path, arguments, message):
    code, _, err = bkdlens_("run", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
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


def test_commands_take_steps_that_there_are():
    from bkdlens.cli.analyse import ANALYSES
    from bkdlens.runs.run import STEPS

    assert all(set(steps) <= set(STEPS) for _, steps in ANALYSES.values())


def test_controls_can_be_kept_for_other_criteria() -> None:
    """Which is what the library's sentence tells whoever wants to judge a run anew."""
    from bkdlens.cli.analyse import MeasureOptions

    assert MeasureOptions(keep_controls=True).settings(0).keep_controls
    assert not MeasureOptions().settings(0).keep_controls
