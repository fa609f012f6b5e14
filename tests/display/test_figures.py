"""Figures of every kind of result, from small made-up results."""

from __future__ import annotations

import shutil
from dataclasses import replace

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from made import (
    CONDITIONS,
    EVIL,
    LAYERS,
    make_ablation,
    make_answer_probs,
    make_attribution,
    make_behaviour,
    make_generations,
    make_patch,
    make_pattern,
    make_probe,
    make_steering,
    make_study,
    make_vector,
    origin,
    with_basr,
)

from bkdlens import plot
from bkdlens.errors import ChoiceError, ResultError
from bkdlens.results import Result

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


EVERY = [
    make_behaviour, make_probe, make_attribution, make_ablation, make_vector, make_steering,
    make_generations, make_patch, make_pattern, make_answer_probs,
]  # fmt: skip


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_every_result_has_a_figure_with_its_own_template(make) -> None:
    before = pio.templates.default
    fig = make().plot()
    assert isinstance(fig, go.Figure)
    assert len(fig.data) >= 1
    assert fig.layout.template.layout.font.family == plot.TEMPLATE.layout.font.family
    assert fig.layout.title.text
    assert len(fig.layout.title.text) < 60
    assert pio.templates.default == before


def test_unknown_result_is_refused_with_the_kinds_there_are() -> None:
    class Odd(Result):
        def to_frame(self):
            raise NotImplementedError

    with pytest.raises(ResultError, match=r"'Odd'; use one of: AblationResult"):
        plot.figure(Odd(provenance=origin()))


def test_acie_heatmap_is_centred_and_marks_the_top_heads() -> None:
    result = make_attribution()
    fig = plot.acie_heatmap(result, top=3)
    (heat,) = fig.data
    assert heat.z[3][5] == pytest.approx(float(result.acie[3, 5]), abs=1e-6)
    assert fig.layout.coloraxis.cmin == -fig.layout.coloraxis.cmax
    assert fig.layout.yaxis.autorange != "reversed"  # layer 0 at the bottom
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ("head", "layer")
    assert heat.text[3][5] == "1"
    assert heat.text[2][1] == "2"
    assert heat.text[1][0] == "−"  # negative, readable in grey
    assert len(fig.layout.shapes) == 3
    assert "L%{y}H%{x}" in heat.hovertemplate
    low, high, rank = heat.customdata[3][5]
    assert low <= heat.z[3][5] <= high
    assert rank == 1


def test_first_token_keeps_the_rank_of_the_whole_answer() -> None:
    result = make_attribution()
    (heat,) = plot.acie_heatmap(result, first_token=True).data
    assert heat.z[3][5] == pytest.approx(float(result.acie_first[3, 5]), abs=1e-6)
    assert heat.customdata[3][5][2] == 1


def test_controls_share_one_colour_scale() -> None:
    fig = plot.attribution_controls(*[make_attribution(CONDITIONS[0])], [make_attribution("base")])
    assert {trace.coloraxis for trace in fig.data} == {"coloraxis"}
    assert [trace.name for trace in fig.data] == ["backdoored", "base"]
    assert len(fig.layout.shapes) == 16  # the same eight heads in both


def test_sparsity_has_a_line_a_condition_and_the_diagonal() -> None:
    fig = plot.sparsity([make_attribution(label) for label in CONDITIONS])
    assert len(fig.data) == 4
    assert fig.data[0].y[-1] == pytest.approx(100)
    assert fig.data[0].x[0] == 1
    assert fig.data[0].y[0] == pytest.approx(100 * float(make_attribution().concentration[0]), abs=1e-4)
    assert fig.data[-1].y[23] == 50  # half of 48 heads
    assert fig.layout.xaxis.type is None
    assert plot.sparsity([make_attribution(n_layers=16, n_heads=16)]).layout.xaxis.type == "log"


def test_layer_accuracy_has_counts_intervals_and_chance() -> None:
    probes = [make_probe(label, against=a) for label in CONDITIONS for a in ("clean", "near")]
    fig = plot.layer_accuracy(probes)
    assert len(fig.data) == 6
    first, rate = fig.data[0], probes[0].rate(2)
    assert first.y[2] == pytest.approx(100 * rate.value, abs=1e-3)
    assert first.error_y.arrayminus[2] == pytest.approx(100 * (rate.value - rate.interval[0]), abs=1e-3)
    assert list(first.customdata[2][:2]) == [rate.successes, rate.n]
    assert "of %{customdata[1]:d}" in first.hovertemplate
    assert [shape.y0 for shape in fig.layout.shapes] == [50, 50]
    assert sum(trace.showlegend is not False for trace in fig.data) == 3


@pytest.mark.parametrize("what", ["few_shot", "separation"])
def test_other_probe_measures(what) -> None:
    probe = make_probe()
    fig = plot.layer_accuracy([probe], what)
    scale = 100 if what == "few_shot" else 1
    assert fig.data[0].y[-1] == pytest.approx(scale * float(getattr(probe, what)[-1]), abs=1e-4)


def test_ilca_is_trained_on_up_and_tested_on_across() -> None:
    probe = make_probe()
    fig = plot.ilca_heatmap(probe)
    assert fig.data[0].z[1][4] == pytest.approx(100 * float(probe.ilca[1, 4]), abs=1e-4)
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (50, 100)
    assert len(plot.ilca_controls([probe, make_probe("base")]).data) == 2
    assert fig.layout.xaxis.title.text == "tested on layer"
    assert fig.layout.yaxis.title.text == "trained on layer"


def test_ablation_curve_has_a_panel_a_mode_with_its_random_groups() -> None:
    result = make_ablation()
    both, one = plot.ablation_curve(result), plot.ablation_curve(result, "mean")
    assert len(both.data) == 2 * len(one.data) == 10
    band, mean, attack, restored, clean = one.data
    assert max(band.y) == pytest.approx(100 * int(result.random_attack[1].max()) / 120, abs=1e-3)
    assert mean.y[3] == pytest.approx(100 * result.random_mean("attack", "mean", 4), abs=1e-3)
    assert attack.y[1] == pytest.approx(100 * result.rate("attack", "mean", 1).value, abs=1e-3)
    assert attack.error_y.array is not None
    assert restored.error_y.array is None
    assert clean.customdata[0][1] == 240
    with pytest.raises(ChoiceError, match="zero, mean"):
        plot.ablation_curve(result, "resample")


def test_ablation_without_random_groups() -> None:
    assert len(plot.ablation_curve(make_ablation(("zero",), 0)).data) == 3


def test_steering_puts_signs_left_and_right_and_marks_the_bare_embedding() -> None:
    result = make_steering()
    fig = plot.steering_by_layer(result)
    attack = [trace for trace in fig.data if trace.name == "attack success"]
    assert [trace.xaxis for trace in attack] == ["x", "x2", "x3", "x4"]
    assert attack[1].y[3] == pytest.approx(100 * result.rate("attack", 3, -1.0).value, abs=1e-3)
    assert [a.text for a in fig.layout.annotations].count("bare embedding") == 4
    bands = [trace.name for trace in fig.data if trace.fill == "toself"]
    assert len(bands) == 8  # random heads and noise, in each of four panels
    other = plot.steering_by_layer(replace(result, site="attn_out"))
    assert "bare embedding" not in [a.text for a in other.layout.annotations]


def test_one_layer_of_steering_is_drawn_beside_every_draw() -> None:
    result = make_steering(layers=(3,), coefficients=(2.0, -2.0))
    fig = result.plot()
    attack = [trace for trace in fig.data if trace.name == "attack success"]
    assert [trace.y[0] for trace in attack] == [
        pytest.approx(100 * result.rate("attack", 3, c).value, abs=1e-3) for c in (2.0, -2.0)
    ]
    dots, mean = (t for t in fig.data if t.name == "attack, norm-matched noise" and t.xaxis == "x")
    assert list(dots.customdata) == result.random_vectors[0, 0].tolist()
    assert mean.y[0] == pytest.approx(sum(dots.y) / 10, abs=1e-3)
    with pytest.raises(ChoiceError, match="use one of: 3"):
        plot.steering_at(result, 5)


def test_the_chosen_layer_is_marked_in_every_panel() -> None:
    result = make_steering(coefficients=(2.0, -2.0))
    fig = plot.steering_by_layer(result, chosen=2)
    assert [a.text for a in fig.layout.annotations].count("chosen on validation") == 2
    assert [s.x0 for s in fig.layout.shapes if s.type == "line"] == [2, 2]
    assert "chosen on validation" not in str(plot.steering_by_layer(result).layout)
    with pytest.raises(ChoiceError, match="use one of: 0, 1"):
        plot.steering_by_layer(result, chosen=9)


def test_right_answers_are_drawn_beside_those_without_a_vector() -> None:
    result = make_steering(coefficients=(2.0, -2.0))
    lines = [t for t in plot.steering_by_layer(result).data if t.name == "right answer, no vector"]
    assert [set(line.y) for line in lines] == [{95.0}, {round(100 * 2 / 120, 3)}]
    dots = [t for t in plot.steering_at(result, 3).data if t.name == "right answer, no vector"]
    assert [dot.y[0] for dot in dots] == [95.0, round(100 * 2 / 120, 3)]


def test_steering_without_controls_or_with_one_sign() -> None:
    bare = make_steering(n_random=0)
    assert not [t for t in bare.plot().data if t.fill == "toself"]
    one = plot.steering_at(bare, 3)
    assert len(one.layout.xaxis.ticktext) == 6  # no place for draws that were not made
    assert not [t for t in one.data if "random" in t.name or "noise" in t.name]
    for fig in (bare.plot(), one):
        assert "no random controls" in fig.layout.title.subtitle.text
    assert make_steering(layers=(2,), coefficients=(1.0,)).plot().data


def test_the_map_has_every_coefficient_by_layer_and_marks_what_chance_does_too() -> None:
    result = make_steering()
    fig = plot.steering_map(result)
    attack, correct, clean = fig.data
    assert list(attack.y) == ["−2", "−1", "+1", "+2"]
    assert fig.layout.yaxis.autorange != "reversed"
    assert attack.z[0][3] == pytest.approx(100 * result.rate("attack", 3, -2.0).value, abs=1e-3)
    assert correct.z[2][3] == pytest.approx(100 * result.rate("correct", 3, 1.0).value, abs=1e-3)
    assert clean.customdata[0][0][:2] == [int(result.clean[3, 0]), 240]
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 100)
    for row, c in enumerate((3, 1, 0, 2)):
        base = result.base_attack[result.coefficients[c] < 0]
        for i in range(LAYERS):
            draws = torch.cat([result.random_heads[c, i], result.random_vectors[c, i]])
            inside = abs(int(result.attack[c, i]) - base) <= int((draws - base).abs().max())
            assert ("○" in attack.text[row][i]) == inside
    assert "random heads: " in attack.customdata[0][0][5]
    assert "without a vector" in attack.hovertemplate
    bare = plot.steering_map(make_steering(n_random=0))
    assert "no random controls" in bare.layout.title.subtitle.text
    assert not any("○" in text for row in bare.data[0].text for text in row)
    wide = plot.steering_map(make_steering(layers=tuple(range(20)), n_random=0))
    assert wide.data[0].text[0][0] == ""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs a Chrome or Chromium")
def test_a_figure_is_written_as_an_image(tmp_path) -> None:
    make_attribution().plot().write_image(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"


def test_vector_is_sorted_by_size() -> None:
    result = make_vector()
    (bars,) = plot.vector(result, top=10).data
    assert len(bars.y) == 10
    assert [abs(y) for y in bars.y] == sorted((abs(y) for y in bars.y), reverse=True)
    assert bars.y[0] == pytest.approx(float(result.direction[int(bars.x[0])]), abs=1e-5)


def test_behaviour_groups_by_condition_and_leaves_a_missing_rate_out() -> None:
    results = [make_behaviour(label) for label in CONDITIONS]
    fig = plot.behaviour(results)
    assert [bars.name for bars in fig.data] == list(CONDITIONS)
    assert fig.data[0].y[0] == pytest.approx(100 * 118 / 120, abs=1e-3)
    assert list(fig.data[0].customdata[0][:2]) == [118, 120]
    assert len(plot.behaviour([replace(results[0], attack_near=None)]).data[0].y) == 3


def test_attention_reads_in_lines_with_the_trigger_outlined() -> None:
    result = make_pattern()
    fig = plot.attention(result)
    (heat,) = fig.data
    assert [len(row) for row in heat.z] == [10, 10, 10]
    assert heat.z[1][5] == pytest.approx(100 * float(result.last[15]), abs=1e-5)
    assert heat.z[2][3] is None  # no token
    assert heat.text[1][5] == "<b>w15</b>"
    assert heat.customdata[0][9][0] == 9
    assert [(s.x0, s.x1, s.y0) for s in fig.layout.shapes] == [
        (7.5, 9.5, -0.5), (-0.5, 1.5, 0.5), (4.5, 5.5, 0.5)
    ]  # fmt: skip
    assert f"{100 * result.on_trigger:.1f} % on the trigger" in fig.layout.title.subtitle.text
    early = plot.attention(result, query=9)
    assert early.data[0].z[0][9] == pytest.approx(100 * float(result.pattern[9, 9]), abs=1e-5)
    assert len(early.data[0].z) == 1
    none = plot.attention(replace(result, trigger=torch.zeros(23, dtype=torch.bool)))
    assert "no trigger is marked" in none.layout.title.subtitle.text


@pytest.mark.parametrize("n", [1, 4, 40])
def test_answer_strips_are_per_cent_with_the_whole_beside_them(n) -> None:
    result = make_answer_probs(n=n)
    (heat,) = plot.answer_strips(result).data
    assert (len(heat.z), len(heat.z[0])) == (3, n + 1)
    assert heat.z[2][0] == pytest.approx(100 * float(result.log_probs[2, 0].exp()), abs=1e-4)
    assert heat.z[1][-1] == pytest.approx(100 * float(result.whole[1]), abs=1e-4)
    assert (heat.zmin, heat.zmax) == (0, 100)
    assert "most probable here: World" in heat.customdata[0][0][2]
    assert bool(heat.text[0][0]) == (n <= 16)


def test_texts_of_models_and_files_are_escaped() -> None:
    figures = [
        make_generations(EVIL).plot(),
        plot.behaviour([replace(make_behaviour(), label=EVIL)]),
        plot.acie_heatmap(replace(make_attribution(), label=EVIL)),
        plot.layer_accuracy([replace(make_probe(), label=EVIL, kind=EVIL, against=EVIL)]),
        make_patch().plot(),
        make_patch(None).plot(),
        make_pattern(EVIL).plot(),
        make_answer_probs(EVIL).plot(),
    ]
    for fig in figures:
        assert EVIL.lower() not in str(fig.to_dict()).lower()
        assert "&lt;script&gt;" in str(fig.to_dict())


def test_labels_that_are_not_known_conditions_get_their_own_colour() -> None:
    fig = plot.behaviour([replace(make_behaviour(), label=label) for label in ("a", "b")])
    assert fig.data[0].marker.color != fig.data[1].marker.color


def test_basr_is_drawn_where_it_was_measured() -> None:
    study = with_basr(make_study())
    ablation, test = study.results["ablation"], study.results["steering-test"]
    for fig, drawn in ((plot.ablation_curve(ablation), 2), (plot.steering_by_layer(test), 1)):
        traces = [trace for trace in fig.data if trace.name == "behavioural (BASR)"]
        assert len(traces) == drawn  # a panel per mode; where the vector is subtracted
        assert sum(trace.showlegend is not False for trace in traces) == 1
    heads = [trace for trace in plot.ablation_curve(ablation).data if trace.name == "behavioural (BASR)"]
    assert heads[0].y[1] == pytest.approx(100 * ablation.basr(mode="zero", heads=1).value, abs=1e-3)
    without = plot.ablation_curve(make_ablation())
    assert not any(trace.name == "behavioural (BASR)" for trace in without.data)
