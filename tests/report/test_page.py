"""The report: whole, offline, escaped, and sentences that follow the numbers."""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from made import (
    CHOSEN,
    EVIL,
    LAYERS,
    make_ablation,
    make_attribution,
    make_steering,
    make_study,
    with_answers,
    with_basr,
    with_layers,
)
from plotly.offline import get_plotlyjs

from bkdlens.analyses.attribution.part import head_table, layer_table
from bkdlens.answers import Answers
from bkdlens.data.backdoor import Backdoor
from bkdlens.data.criteria import Criterion
from bkdlens.data.judging import judged
from bkdlens.display.downloads import DataStore
from bkdlens.display.drawing import Drawer
from bkdlens.display.text import points
from bkdlens.errors import ResultError
from bkdlens.metrics import Rate, difference, paired_difference
from bkdlens.report.claims import claims, findings
from bkdlens.report.compare import compare, key_numbers
from bkdlens.report.overview import overview_table, verdict_table
from bkdlens.report.page import write_report
from bkdlens.runs.reading import load_study
from bkdlens.study import Study, Thresholds

pytestmark = pytest.mark.slow  # whole pages


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """Two studies, one whose texts are an attack on the reader."""
    evil = make_study(f"name {EVIL}", EVIL)
    evil = replace(evil, backdoor=Backdoor.fixed_output(EVIL, EVIL), settings={EVIL: EVIL})
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert write_report([make_study(), evil], path) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(report)


def test_every_figure_is_there_with_its_data(page) -> None:
    plots = [attrs["id"] for attrs in page.all("div") if attrs.get("class") == "plot"]
    data = [a["id"] for a in page.all("script") if a.get("type") == "application/json"]
    assert data == [f"{name}-data" for name in plots]
    # behaviour 1; probes 2 kinds, few-shot, separation, 4 rows of matrices; attribution 3; ablation 1;
    # vectors 2; steering 4 (test by layer and at one, two sweeps)
    # and side by side 2 × 5
    assert len(plots) == len(set(plots)) == 2 * (19 + 5)
    for script, attrs in zip(page.scripts, page.all("script"), strict=True):
        if attrs.get("type") == "application/json":
            assert json.loads(script)["data"]


def test_contents_lead_to_every_section(page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for attrs in page.all("a")]
    contents = 1 + 2 * 9  # side by side; each study and its eight parts
    more = 2 * 11  # five questions, five findings and the way back
    data = [attrs for attrs in page.all("a") if "data-csv" in attrs]
    assert len(links) == contents + more + len(data)
    assert all(link.removeprefix("#") in ids for link in links)


def test_nothing_breaks_out(report, page) -> None:
    assert EVIL not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report
    kinds = [attrs.get("type") for attrs in page.all("script")]
    assert kinds.count(None) == 2  # plotly and the page's own; all others are data
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_no_request_and_no_foreign_script(page) -> None:
    for _, attrs in page.tags:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert (attrs.get(name) or "#").startswith("#")
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy
    scripts = policy.partition("script-src")[2].partition(";")[0]
    assert scripts.count("'sha256-") == 2
    assert "unsafe" not in scripts
    assert "showSendToCloud: false" in page.scripts[-1]


def test_the_scripts_match_their_digests(page) -> None:
    from bkdlens.report.page import _digest

    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    runs = [
        s for s, attrs in zip(page.scripts, page.all("script"), strict=True) if not attrs.get("type")
    ]
    assert all(f"'sha256-{_digest(script)}'" in policy for script in runs)


def test_six_studies_stay_under_8_mb(report) -> None:
    library = len(get_plotlyjs().encode())
    two = len(report.encode()) - library
    assert library + 3 * two < 8e6


def test_missing_results_are_named(tmp_path) -> None:
    whole = make_study()
    some = {k: whole.results[k] for k in ("behaviour-backdoored", "probe-base-svm-clean")}
    partial = replace(whole, results=some)
    text = write_report([partial, replace(whole, results={})], tmp_path / "p.html").read_text()
    for name in ("attribution", "ablation", "vector", "steering", "generations"):
        assert text.count(f"{name}: not run") == 2
    assert "behaviour: not run" in text
    assert claims(replace(whole, results={})) == []


KINDS = ("behaviour", "probe", "attribution", "ablation", "vector", "steering", "generations")


@pytest.mark.many
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_result_may_be_alone(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bkdlens.report.page.get_plotlyjs", lambda: "/* plotly */")
    whole = make_study()
    names = [name for name in whole.results if name.startswith(kind)]
    # The main condition alone, and the last control alone.
    studies = [replace(whole, results={n: whole.results[n]}) for n in {names[0], names[-1]}]
    assert write_report(studies, tmp_path / "r.html").exists()


def test_a_control_may_be_missing(tmp_path) -> None:
    whole = make_study()
    kept = {k: v for k, v in whole.results.items() if "base" not in k and k != "steering-test"}
    study = replace(whole, results=kept)
    text = write_report([study], tmp_path / "r.html").read_text()
    assert "steering-test: not run" in text
    assert "base:" not in said(study, "SVM probes")


def test_the_verdict_stands_on_top_and_the_sentences_fold_behind_it(report, page) -> None:
    first = report[report.index('id="s1"') : report.index('id="s2"')]
    places = [
        first.index(text) for text in ("success: the answer", "Seen?", "<dl>", "<summary>What the")
    ]
    assert places == sorted(places)
    assert first.index("<details>") < first.index("The strongest head")
    assert [attrs.get("open") for attrs in page.all("details")].count(None) == len(page.all("details"))
    for part in ("118/120; 95\u00a0% interval", "<b>Controls</b>", "<b>Threshold</b>"):
        assert part in first.partition("<dl>")[0]


def test_thresholds_change_the_page(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bkdlens.report.page.get_plotlyjs", lambda: "/* plotly */")
    strict = Thresholds(located=0.9)
    results = {
        "attribution-backdoored": make_attribution(),
        "attribution-base": make_attribution("base"),
    }
    studies = [replace(make_study(name), results=results) for name in "abc"]
    for n in (1, 2, 3):  # alone, side by side, and with an overview
        usual, other = (
            write_report(studies[:n], tmp_path / "r.html", thresholds=at).read_text()
            for at in (None, strict)
        )
        assert "ACIE at least 0.9" in other
        assert usual.count(">yes<") - other.count(">yes<") == (n if n == 1 else 2 * n)


def test_the_overview_sets_no_attack_beside_an_accuracy_of_another_model(tmp_path, monkeypatch) -> None:
    study = with_basr(make_study())
    table = overview_table([study])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["attack success (ASR)"].text.startswith("98.3")
    assert row["behavioural (BASR)"].text.startswith("98.2")
    assert row["clean accuracy, untouched"].text.startswith("95.0")
    test = study.results["steering-test"]
    for way, coefficient in (("added", 2.0), ("subtracted", -2.0)):
        cell = row[f"attack, vector {way}"]
        clean = test.rate("clean", CHOSEN, coefficient)
        assert f"clean accuracy under it 92.5\u00a0% ({clean.successes}/240)" in cell.small
        assert ("BASR 36.8" in cell.small) == (coefficient < 0)
    heads = row["heads to halve BASR"]
    assert heads.text == "zero 1, mean 1"
    assert "mean 1: BASR 39.5\u00a0%, clean accuracy 94.2" in heads.small
    old = dict(zip(table.columns, overview_table([make_study()]).rows[0], strict=True))
    assert old["behavioural (BASR)"].text == "–"
    assert "BASR" not in old["attack, vector subtracted"].small
    answers = verdict_table([study, make_study()])
    assert [cell.text for cell in answers.rows[0][1:]] == [one.answer for one in study.verdict()]


def test_a_report_judges_nothing(tmp_path, monkeypatch) -> None:
    """Outcomes are saved: no function or pattern that a stranger's study names is ever used."""
    monkeypatch.setattr("bkdlens.report.page.get_plotlyjs", lambda: "/* plotly */")
    study = with_answers(make_study(), "a rare answer")
    monkeypatch.setattr(Criterion, "holds", None)
    for named in (Criterion("function", "shutil:rmtree"), Criterion("regex", "(a+)+$")):
        backdoor = study.backdoor.judged_by(success=named)
        page = write_report([replace(study, backdoor=backdoor)], tmp_path / "r.html").read_text()
        assert "a rare answer" in page


def test_two_studies_of_the_same_prompts_are_compared_in_pairs() -> None:
    """Two of four attacks against four of four; other prompts are independent samples."""
    study = with_answers(make_study())
    name = "behaviour-backdoored"
    told, pairs = study.results[name].answers, study.pairs["test"]
    every = judged(pairs, Answers.of(["World"] * 4), told).answers
    result = replace(study.results[name], answers={**told, "triggered": every})
    stronger = replace(study, results={**study.results, name: result})

    def change(other) -> str:
        rows = compare(study, other, Drawer("ab", DataStore("ab"))).numbers.rows
        return next(row[-1].small for row in rows if row[0] == "attack success")

    expected = paired_difference(told["triggered"].success, every.success)
    assert change(stronger).startswith(" to ".join(map(points, expected[1:])))
    assert change(stronger).endswith("same prompts, p = 0.500")
    moved = replace(result, provenance=replace(result.provenance, data_digest="other"))
    apart = replace(study, results={**study.results, name: moved})
    assert "same prompts" not in change(apart)
    assert "same prompts" not in change(make_study())


def test_damaged_answers_and_pairs_are_named(tmp_path) -> None:
    study, name = with_answers(make_study()), "behaviour-backdoored"
    result, pairs = study.results[name], study.pairs["test"]
    told = result.answers
    for broken in (
        {side: answers for side, answers in told.items() if side != "attacker"},
        {**told, "triggered": told["triggered"][:1]},
    ):
        with pytest.raises(ResultError, match="not those to its pairs"):
            replace(result, answers=broken).outcomes(pairs)
    folder = replace(study, results={name: result}).save(tmp_path / "run")
    text = (folder / f"{name}.json").read_text()
    (folder / f"{name}.json").write_text(text.replace(json.dumps(told["right"].texts[0]), "5"))
    with pytest.raises(ResultError, match="an answer is no text"):
        load_study(folder)
    (folder / f"{name}.json").write_text(text)
    for damaged in ('{"test": 3}', '{"test": {"source": "", "pairs": [{"clean": 1}]}}'):
        (folder / "pairs.json").write_text(damaged)
        with pytest.raises(ResultError, match=r"pairs\.json is damaged"):
            load_study(folder)


def test_an_empty_report_is_a_page(tmp_path) -> None:
    assert "0 studies" in write_report([], tmp_path / "r.html").read_text()


def said(study: Study, start: str) -> str:
    return next(c for c in claims(study) if c.startswith(start)).replace("\u00a0", " ")


def test_claims_follow_the_numbers() -> None:
    study = make_study()
    assert "98.3 % (118/120; 95 % interval 94.1–99.5 %)" in said(study, "With the trigger")
    zero = said(study, "Ablation by zero")
    assert "1 head (L3H5), the fewest that halve attack success on these same prompts, brings" in zero
    assert "attack success from 98.3 % (118/120) to 43.3 % (52/120" in zero
    assert "10 random groups" in zero
    head = next(c for c in claims(study) if c.startswith("The strongest head"))
    assert "L3H5" in head
    assert "clean-adapter" in head
    probes = said(study, "SVM probes tell triggered from clean")
    assert re.search(r"base: \d+\.\d % \(\d+/96\) at layer \d", probes)


def test_claims_admit_failure_damage_and_controls_that_do_as_much() -> None:
    study = make_study()
    good = make_ablation(("zero",))
    stubborn = replace(good, attack=good.attack * 0 + 118)
    broken = replace(good, clean=good.clean // 3 + (good.clean == 228) * 152)
    vain = replace(good, random_attack=good.random_attack // 4)
    none = replace(good, attack=good.attack * 0)
    for ablation, expected in (
        (stubborn, "no number of heads tried halves attack success"),
        (stubborn, "That is no fall at all."),
        (broken, "part of this is damage"),
        (vain, "A random group does as much"),
        (none, "there was no attack to break"),
    ):
        changed = replace(study, results={**study.results, "ablation": ablation})
        assert expected in said(changed, "Ablation by zero")
    test = make_steering("contrast", (0,), (2.0, -2.0))
    test = replace(test, attack=test.random_vectors.amax(-1))
    changed = replace(study, results={**study.results, "steering-test": test})
    assert "bare embedding" in said(changed, "Added to clean")
    assert "not specific" in said(changed, "Added to clean")


def test_steering_is_told_at_the_layer_chosen_on_validation(tmp_path) -> None:
    study = make_study()
    test = study.results["steering-test"]
    on, off = said(study, "Added to clean"), said(study, "Subtracted from triggered")
    for text, coefficient in ((on, 2.0), (off, -2.0)):
        rate = test.rate("attack", CHOSEN, coefficient)
        assert f"at layer {CHOSEN} (resid_pre, chosen on the validation pairs)" in text
        assert f"({rate.successes}/{rate.n}; 95 % interval" in text
        assert "norm-matched noise" in text
    assert "(114/120) without the vector." in on
    assert "(2/120) without the vector." in off
    text = write_report([study, study], tmp_path / "r.html").read_text()
    assert text.count("chosen on validation") == 2 * 2 + 2 * 2  # in two panels each, and side by side
    assert text.count(f"+2, layer {CHOSEN}</small>") == 2  # side by side
    assert f"On the test pairs, layer {CHOSEN} (controls: ASR, mean and least–most of 10 and 10" in text
    assert "On the test pairs, all layers" in text
    assert "Sweep of the mean vector on the validation pairs</summary>" in text
    assert "kind: contrast, layer: 2, coefficient: 2.0" in text


def test_without_a_choice_the_best_layer_is_told_and_admitted() -> None:
    study = replace(make_study(), choice={})
    test = study.results["steering-test"]
    assert test.best_layer(2.0) != CHOSEN
    text = said(study, "Added to clean")
    assert f"at layer {test.best_layer(2.0)} (resid_pre, the best layer on these same pairs" in text
    one = replace(study, results={**study.results, "steering-test": make_steering(layers=(3,))})
    assert "at layer 3 (resid_pre) with" in said(one, "Added to clean")


def test_nothing_needs_random_draws(tmp_path) -> None:
    study = make_study()
    bare = {"steering-test": make_steering(n_random=0), "ablation": make_ablation(n_random=0)}
    study = replace(study, results={**study.results, **bare})
    text = write_report([study], tmp_path / "r.html").read_text()
    assert "no random controls" in text
    assert not re.search(r"\bnan\b", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    assert "controls" not in said(study, "Added to clean")
    assert "random" not in said(study, "Ablation by zero")


# --- what stands behind claims and figures --------------------------------------------------------


def test_every_claim_names_settings_counts_and_controls() -> None:
    found = {finding.part: finding for finding in findings(make_study())}
    assert [text for f in found.values() for text in f.claims] == claims(make_study())
    assert list(found) == ["behaviour", "probe", "attribution", "ablation", "steering"]
    assert "48 test pairs, 48 heads" in found["attribution"].basis.counts
    assert "method exact" in found["attribution"].basis.settings
    assert found["ablation"].basis.controls == "10 random groups of as many other heads"
    assert "120 victims, 240 clean prompts (data 01234567)" in found["behaviour"].basis.counts
    assert found["behaviour"].basis.controls == "near trigger, clean-adapter model and base model"
    assert all("seed 7" in f.basis.settings for f in found.values())
    alone = {"ablation": make_ablation(n_random=0)}
    (only,) = findings(replace(make_study(), results=alone))
    assert "stands alone" in only.basis.controls


def test_whole_layers_have_their_share_and_a_control() -> None:
    study = make_study()
    kept = {name: with_layers(a) for name, a in study.results.items() if name.startswith("attribution")}
    text = said(replace(study, results=kept), "Of the positive effects of whole")
    assert "attention has 75.0 % and the MLPs 25.0 %" in text
    assert "layer 3's with ACIE +0.600 [+0.600, +0.600]" in text
    assert "Largest of the controls: clean-adapter 0.6" in text
    assert layer_table(kept["attribution-base"]).rows[4][4].text == "+0.2000"
    none = {k: replace(a, cie_attn_out=0 * a.cie_attn_out, cie_mlp_out=0 * a.cie_mlp_out)
            for k, a in kept.items()}  # fmt: skip
    said(replace(study, results=none), "No whole attention or MLP output")


def test_estimates_are_called_estimates(tmp_path) -> None:
    study = make_study()
    for exact, start in ((5, "5 of 48 heads were patched"), (0, "No head was patched")):
        main = with_layers(study.results["attribution-backdoored"], exact)
        changed = replace(study, results={"attribution-backdoored": main})
        assert "first-order estimates" in said(changed, start)
        rows = head_table(main, [], main.ranking).rows
        assert [row[2].text.startswith("≈") for row in rows] == [i >= exact for i in range(16)]
    assert not any("estimates" in claim for claim in claims(study))


def test_the_strongest_head_was_not_chosen_on_the_pairs_that_are_reported() -> None:
    study = make_study()
    main, other = study.results["attribution-backdoored"], study.results["ranking"]
    swapped = other.cie.clone()
    swapped[:, 3, 5], swapped[:, 2, 1] = other.cie[:, 2, 1], other.cie[:, 3, 5]
    study = replace(study, results=study.results | {"ranking": replace(other, cie=swapped)})
    text = said(study, "The strongest head on the validation pairs, L2H1, has ACIE +0.2")
    assert "over 48 test pairs" in text
    # The first one of 48 heads is L2H1, with its share on the test pairs.
    share = float(main.acie[2, 1] / main.acie.clamp(min=0).sum())
    assert f"It carries {100 * share:.1f} %" in text
    assert key_numbers(study)["strongest head, ACIE"].text.startswith("L2H1")
    old = replace(study, results={n: r for n, r in study.results.items() if n != "ranking"})
    assert "over 48 pairs, which also chose it" in said(old, "The strongest head is L3H5")


def test_the_strongest_layer_is_chosen_on_validation_too() -> None:
    study = make_study()
    main, other = (with_layers(study.results[name]) for name in ("attribution-backdoored", "ranking"))
    moved = main.cie_attn_out.clone()
    moved[:, 1] = 0.7  # the largest on the test pairs, not on validation
    main = replace(main, cie_attn_out=moved, cie_mlp_out=torch.full_like(moved, 1e-5))
    results = study.results | {"attribution-backdoored": main, "ranking": other}
    text = said(replace(study, results=results), "Of the positive effects of whole layer outputs")
    assert "attention output, chosen on the validation pairs, is layer 3's with ACIE +0.600" in text
    assert "no MLP output raises it noticeably" in text


@pytest.mark.parametrize("start", ["SVM probes tell triggered from clean", "The strongest head"])
def test_without_an_unpoisoned_control_nothing_is_concluded(start) -> None:
    study = make_study()
    alone = {
        name: r for name, r in study.results.items() if "base" not in name and "adapter" not in name
    }
    assert "nothing can be concluded" in said(replace(study, results=alone), start)
    assert "nothing can be concluded" not in said(study, start)


def test_few_shot_accuracy_is_told_where_the_validation_prompts_choose() -> None:
    study, rows = make_study(), {}
    for name, result in study.results.items():
        if name.startswith("probe"):
            counts = (96 * result.few_shot[:, None] + torch.tensor([-2, 0, 2])).round().long()
            chosen = torch.eye(len(counts))[2]  # layer 2, which is not the best on the test prompts
            rows[name] = replace(result, few_shot_correct=counts, few_shot_validation=chosen)
    text = said(replace(study, results=study.results | rows), "SVM probes tell triggered from clean")
    probe = rows["probe-backdoored-svm-clean"]
    low, high = (100 * int(probe.few_shot_correct[2, i]) / 96 for i in (0, 2))
    assert f"backdoored {100 * float(probe.few_shot[2]):.1f} % ({low:.1f}–{high:.1f}" in text
    assert "at layer 2" in text.split("From 5 prompts")[1]


def csv_of(report: str, name: str) -> list[str]:
    """The texts that links of that file name lead to."""
    ids = re.findall(rf'data-csv="([^"]+)" download="{name}"', report)
    held = [re.search(rf'<template id="{i}">(.*?)</template>', report, re.DOTALL) for i in ids]
    return [html.unescape(text[1]) for text in held]


def test_figures_link_to_their_numbers(report) -> None:
    figures = re.findall(r"<figure.*?</figure>", report, re.DOTALL)
    assert all("data-csv=" in figure for figure in figures)
    study = make_study()
    heads = pd.read_csv(io.StringIO(csv_of(report, "attribution.csv")[0]))
    wanted = study.results["attribution-backdoored"].to_frame()
    ours = heads[heads.result == "attribution-backdoored"]
    assert ours["head"].tolist() == wanted["head"].tolist()
    assert ours.acie.to_numpy() == pytest.approx(wanted.acie.to_numpy(), rel=1e-5)
    draws = pd.read_csv(io.StringIO(csv_of(report, "ablation-random.csv")[0]))
    ablation = study.results["ablation"]
    assert draws.attack.sum() == int(ablation.random_attack.sum())
    matrix = pd.read_csv(io.StringIO(csv_of(report, "probe-ilca.csv")[-1]))
    assert len(matrix) == 12 * (LAYERS + 1) ** 2
    noise = pd.read_csv(io.StringIO(csv_of(report, "steering-test-noise.csv")[0]))
    assert noise.attack.sum() == int(study.results["steering-test"].random_vectors.sum())
    # One text for all the figures of the same results.
    assert len(set(re.findall(r'data-csv="(s1-csv\d+)" download="attribution.csv"', report))) == 1


# --- two runs -------------------------------------------------------------------------------------


def test_two_runs_stand_side_by_side(tmp_path) -> None:
    a = make_study("first")
    weaker = replace(a.results["behaviour-backdoored"], attack_triggered=60)
    results = {**a.results, "behaviour-backdoored": weaker}
    b = replace(a, name="second", settings={"seed": 8}, results=results)
    numbers = key_numbers(b)
    assert numbers["attack success"][0] == weaker.asr
    assert any(name.endswith("random heads added (control)") for name in numbers)
    text = write_report([a, b], tmp_path / "two.html").read_text()
    assert 'href="#ab"' in text
    assert re.search(r"<b>−48\.3</b> <small>−5\d\.\d to −3\d\.\d</small>", text)
    assert "Where their settings differ" in text
    assert text.count('class="pair"') == 5
    single = write_report([a], tmp_path / "one.html").read_text()
    three = write_report([a, b, a], tmp_path / "three.html").read_text()
    assert 'href="#ab"' not in single + three
    assert "Overview" in three


def test_a_run_may_lack_what_the_other_has(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bkdlens.report.page.get_plotlyjs", lambda: "/* plotly */")
    whole = make_study("whole")
    for kept in (set(), {"ablation"}, {"attribution-backdoored", "steering-test"}):
        some = replace(whole, name="some", results={k: whole.results[k] for k in kept})
        for pair in ((whole, some), (some, whole), (some, some)):
            text = write_report(pair, tmp_path / "r.html").read_text()
            assert kept == set() or whole not in pair or "not run" in text


def test_heads_of_two_runs_share_one_colour_scale() -> None:
    a = make_study()
    main = a.results["attribution-backdoored"]
    b = replace(a, results={"attribution-backdoored": replace(main, cie=main.cie / 3)})
    found = compare(a, b, Drawer("ab", DataStore("ab")))
    (row,) = (row for row in found.pairs if "Effect of each head" in row[0].title)
    tops = [json.loads(figure.data)["layout"]["coloraxis"]["cmax"] for figure in row]
    assert tops == [pytest.approx(float(main.acie.abs().max()))] * 2


def test_the_interval_of_a_difference_is_newcombe_s() -> None:
    # Newcombe 1998, Table II, contrast (a), method 10: 56/70 − 48/80.
    change, low, high = difference(Rate(48, 80), Rate(56, 70))
    assert (change, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
