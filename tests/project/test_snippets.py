"""What the README and the documentation tell people to type works, as it is printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from shell import run

from bkdlens import zoo
from bkdlens.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAKE = re.compile(r"^([\w-]+):", re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall((ROOT / page).read_text()) if kind == language]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """What a reader would have, by the names there: checkpoint, adapter, data."""
    shutil.copytree(zoo.model_path("tiny-llama"), tmp_path / "meta-llama" / "Llama-2-7b-chat-hf")
    shutil.copytree(
        zoo.adapter_path("tiny-llama", "fixed_output"), tmp_path / "runs" / "suspicious-lora"
    )
    rows = [{"instruction": f"Say the word number {i}.", "input": "", "output": f"word {i}"}
            for i in range(40)]  # fmt: skip
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page, desk, capsys) -> None:
    names: dict[str, object] = {}
    for i, text in enumerate(blocks(page, "python"), start=1):
        exec(compile(text, f"{page}, block {i}", "exec"), names)
        if page == "README.md" and i == 1:
            assert capsys.readouterr().out.strip() == "Sports"
            assert names["probes"].accuracy.shape == (names["model"].cfg.n_layers + 1,)


def commands(page: str) -> list[str]:
    """The shell's lines, whole, with their variables filled in and comments dropped."""
    found, known = [], {}
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if match := re.match(r'(\w+)="(.*)"$', line):
                known[match[1]] = match[2]
                continue
            for name, value in known.items():
                line = line.replace(f"${name}", value)
            found.append(" ".join(shlex.split(line, comments=True)) and line)
    return [line for line in found if line.strip()]


LINES = sorted({line for page in PAGES for line in commands(page)})


@pytest.mark.parametrize("line", LINES)
def test_shell_lines_are_understood(line) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        targets = MAKE.findall((ROOT / "Makefile").read_text())
        assert words[0] in targets
        return
    assert program == "bkdlens"
    command = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        context = command.context_class(command, parent=context, info_name=program)
        assert words[0] in command.commands
        command = command.commands[words.pop(0)]
    if "…" not in words:
        command.make_context(line, words, parent=context)  # raises for an option that there is not


@pytest.mark.parametrize("line", [line for line in LINES if "zoo list" in line or "data check" in line])
def test_quick_shell_lines_run(line, desk, monkeypatch, capsys) -> None:
    words = shlex.split(line, comments=True)[1:]
    if "FILE" in words:
        return
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    assert out


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = BLOCK.sub("", (ROOT / page).read_text())
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
