"""The page on adding an analysis, followed to the letter in a copy of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bkdlens
from bkdlens.analyses.base import Part
from bkdlens.analyses.parts import PARTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-an-analysis.md"
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```', re.DOTALL | re.MULTILINE)
ALSO = ("tests/analyses/confidence/test_confidence.py", "CHANGELOG.md", "bkdlens/cli/analyse.py")

TRY = """
from pathlib import Path
import bkdlens
from bkdlens.report.claims import findings
from bkdlens.report.compare import key_numbers
from bkdlens.report.terminal import render
from bkdlens.runs.reading import summary

model = bkdlens.load("tiny-llama", "label_modification")
parts = [bkdlens.zoo.pairs("label_modification", split, 24) for split in ("train", "validation", "test")]
controls = {"base": lambda: bkdlens.load("tiny-llama")}
study = bkdlens.run_study(model, *parts, steps=("confidence",), controls=controls, out="run")
assert set(study.results) == {"confidence-backdoored", "confidence-base"}
again = bkdlens.load_study("run")
assert again == study
text = bkdlens.write_report([again], "page.html").read_text()
assert "<h3 id=\\"s1-2\\">Confidence</h3>" in text and "confidence: not run" not in text
(finding,) = findings(again)
assert "24 pairs" in finding.claims[0] and "base model" in finding.basis.controls
assert len(list(render(again, 80))) == 1
(verdict,) = [one for one in again.verdict() if one.analysis == "confidence"]
assert verdict.question == "Surer?" and "base" in verdict.control and "Surer?" in text
assert "confidence when triggered, base" in key_numbers(again)
assert set(summary(again)["confidence"]) == {"backdoored", "base"}
found = bkdlens.measure_confidence(bkdlens.cache_activations(model, parts[0]))
assert found == study.results["confidence-backdoored"]
assert found.plot().data
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package with what the page adds, the embedded weights linked."""
    root = tmp_path_factory.mktemp("copy")
    package = Path(bkdlens.__file__).parent
    leave = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(package, root / "bkdlens", ignore=leave)
    (root / "bkdlens" / "zoo" / "weights").symlink_to(package / "zoo" / "weights")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "docs" / "reference", root / "docs" / "reference")
    (root / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_public.py", root / "tests")
    for kind, name, text in BLOCK.findall(PAGE.read_text()):
        file = root / name
        if kind == "diff":
            old, new = change(text)
            before = file.read_text()
            assert before.count(old) == 1, f"{name}: {old}"
            file.write_text(before.replace(old, new))
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    return root


def change(text: str) -> tuple[str, str]:
    """What a diff takes away or keeps, and what it keeps or adds."""
    lines = text.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
    return before, after


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "PATH": str(Path(sys.executable).parent)}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def test_it_works(copy) -> None:
    done = run(copy, sys.executable, "-c", TRY)
    assert done.returncode == 0, done.stderr


def test_the_rules_of_the_house_still_hold(copy) -> None:
    assert run(copy, "lint-imports", "--no-cache").returncode == 0
    assert run(copy, "ruff", "check", "bkdlens/analyses/confidence").returncode == 0


def test_the_new_names_are_documented(copy) -> None:
    done = run(copy, sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout


def test_the_bill_is_at_most_ten_files() -> None:
    named = {name for _, name, _ in BLOCK.findall(PAGE.read_text())}
    assert all(name in PAGE.read_text() for name in ALSO)
    assert len(named | set(ALSO)) <= 10


@pytest.mark.parametrize("piece", list(Part.__dataclass_fields__))
def test_leaving_a_piece_out_is_an_error(piece) -> None:
    pieces = {name: getattr(PARTS[0], name) for name in Part.__dataclass_fields__ if name != piece}
    with pytest.raises(TypeError, match=piece):
        Part(**pieces)
