"""A study in the terminal: every number of the report, at any width, with and without colour."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import fields, replace

import pytest
import torch
from made import make_study, save, with_basr, with_layers
from rich.console import Console
from shell import run

from bkdlens.analyses.attribution.terminal import heatmap
from bkdlens.cli.show import THRESHOLD_HELP
from bkdlens.display.text import plain
from bkdlens.report.terminal import render, verdict
from bkdlens.study import Study, Thresholds


def printed(study: Study, width: int = 120, unicode: bool = True, **options) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, **options)
    for part in render(study, width, unicode=unicode):
        console.print(part)
    return out.getvalue().replace("\u00a0", " ")


def test_tables_hold_the_numbers() -> None:
    text = printed(make_study(), 160)
    for number in ("98.3 %", "94.1–99.5 % · 118/120", "L3H5", "+2", "random heads"):
        assert number in text
    assert "Steering with the contrast vector on the test pairs, layer 2" in text
    assert "Top 8 heads, with 95 % interval" in text
    assert "Whole layer outputs" not in text
    kept = {"attribution-backdoored": with_layers(make_study().results["attribution-backdoored"], 5)}
    text = printed(replace(make_study(), results=kept), 160)
    assert "Whole layer outputs" in text
    assert "≈" in text


@pytest.mark.many
@pytest.mark.parametrize("width", [24, 40, 80, 200])
@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_nothing_is_wider_than_the_terminal(width, colour) -> None:
    text = printed(make_study(), width, color_system=None, no_color=colour is None)
    assert max(map(len, text.splitlines())) <= width
    assert "98.3 %" in text
    assert "\x1b" not in text


def test_the_heatmap_is_read_without_colour() -> None:
    main = make_study().results["attribution-backdoored"]
    out = io.StringIO()
    Console(file=out, width=80).print(heatmap(main, 80))
    lines = out.getvalue().splitlines()
    rows = {line.split()[0]: line for line in lines[1:7]}
    assert list(rows) == ["5", "4", "3", "2", "1", "0"]  # layers upwards, as in the figure

    def cell(layer: int, head: int) -> str:
        return rows[str(layer)].ljust(40)[2 + 2 * head : 4 + 2 * head]

    assert cell(3, 5) == " █"
    assert cell(2, 1) == " ▒"
    assert cell(1, 0) == "−░"
    assert cell(0, 4).strip() == ""
    assert "█ ≥" in lines[-2]
    assert "− negative" in out.getvalue()
    ascii_ = io.StringIO()
    Console(file=ascii_, width=80).print(heatmap(main, 80, unicode=False))
    assert ascii_.getvalue().isascii()
    coloured = io.StringIO()
    Console(file=coloured, width=80, force_terminal=True, color_system="256").print(heatmap(main, 80))
    assert "\x1b[38;5;" in coloured.getvalue()


def test_many_heads_are_cut_into_blocks() -> None:
    main = make_study().results["attribution-backdoored"]
    wide = replace(
        main, cie=main.cie.repeat(1, 1, 8), cie_first=main.cie_first.repeat(1, 1, 8),
        exact=torch.ones(6, 64, dtype=torch.bool),
        low=main.low.repeat(1, 8), high=main.high.repeat(1, 8),
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=50).print(heatmap(wide, 50))
    assert out.getvalue().count("  head\n") == 4
    assert out.getvalue().count("█") >= 8


def test_show_reads_a_folder(monkeypatch, capsys, tmp_path) -> None:
    save(make_study(), tmp_path / "run")
    code, out, _ = run(monkeypatch, capsys, "show", tmp_path / "run")
    assert code == 0
    assert "Behaviour on held-out prompts" in out
    assert out.index("Located?") < out.index("Behaviour on held-out prompts")
    claim = "The strongest head on the validation pairs, L3H5, has ACIE +0.4"
    assert claim not in " ".join(out.split())
    code, out, _ = run(monkeypatch, capsys, "show", tmp_path / "run", "--claims")
    assert claim in " ".join(out.split())
    code, out, _ = run(monkeypatch, capsys, "show", tmp_path / "run", "--json")
    (summary,) = json.loads(out)
    assert summary["attribution"]["backdoored"][0]["head"] == "L3H5"
    assert [one["question"] for one in summary["verdict"]][1:3] == ["Seen?", "Located?"]
    assert summary["verdict"][2]["values"]["acie"]["n"] == 48
    code, _, err = run(monkeypatch, capsys, "show", tmp_path / "nowhere")
    assert code == 2
    assert "no readable result" in err


@pytest.mark.many
@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_the_verdict_fits_any_terminal(width) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(verdict(with_basr(make_study()), width))
    assert max(map(len, out.getvalue().splitlines())) <= width
    text = "".join(out.getvalue().split())
    for word in ("Attack?", "mixed", "118/120", "Controls:"):
        assert word in text


def test_thresholds_are_given_in_the_shell(monkeypatch, capsys, tmp_path) -> None:
    save(make_study(), tmp_path / "run")
    arguments = ("show", tmp_path / "run", "--json")

    def located(*options: str) -> str:
        code, out, _ = run(monkeypatch, capsys, *arguments, *options)
        assert code == 0
        return json.loads(out)[0]["verdict"][2]["answer"]

    assert located() == "yes"
    assert located("--threshold", "seen=0.5", "--threshold", "located=0.9") == "mixed"
    code, _, err = run(monkeypatch, capsys, *arguments, "--threshold", "lokated=0.9")
    assert code == 2
    assert "Did you mean 'located'?" in err
    assert all(f.name in THRESHOLD_HELP for f in fields(Thresholds))


@pytest.mark.slow
def test_report_prints_the_verdict_and_the_path_and_no_claims(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("bkdlens.report.page.get_plotlyjs", lambda: "/* plotly */")
    study = make_study()
    kept = {name: result for name, result in study.results.items() if name.startswith("attribution")}
    save(replace(study, results=kept), tmp_path / "run")
    page = tmp_path / "r.html"
    code, out, err = run(monkeypatch, capsys, "report", tmp_path / "run", "--out", page)
    assert code == 0
    assert "Switchable," in out
    assert "The strongest head" not in out
    assert str(page) in err
    assert len(out.splitlines()) < 50
    code, _, err = run(monkeypatch, capsys, "report", tmp_path / "run", "--threshold", "seen=95")
    assert code == 2
    assert "from 0 to 1" in err


def test_without_unicode_it_is_spelled(monkeypatch, tmp_path) -> None:
    from bkdlens.cli.show import show

    save(make_study(), tmp_path / "run")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show([tmp_path / "run"], claims=True)
    sys.stdout.flush()
    text = raw.getvalue().decode()
    assert "98.3 %" in text
    assert "Attack?" in text
    assert "?" not in text.partition("Behaviour")[2].partition("The strongest")[0]


def test_escapes_are_shown_and_not_sent(monkeypatch, capsys, tmp_path) -> None:
    assert plain("a\x1b[31mb\x07") == "a\\x1b[31mb\\x07"
    save(make_study("bad\x1b]0;title\x07 [red]name[/red]"), tmp_path / "run")
    _, out, _ = run(monkeypatch, capsys, "show", tmp_path / "run")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]name[/red]" in out
