"""The verdict on a study: five questions, each with a number, its control and its threshold."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made import CHOSEN, make_study, with_basr

import bkdlens
from bkdlens.analyses.ablation.verdict import chosen_heads
from bkdlens.display.verdicts import decide
from bkdlens.errors import BkdlensError, ChoiceError
from bkdlens.results import Result
from bkdlens.study import Study, Thresholds, Verdict

QUESTIONS = ["Attack?", "Seen?", "Located?", "Necessary?", "Switchable, with accuracy kept?"]
MAINS = ("attack", "seen", "located", "necessary", "switchable")


def told(study: Study, thresholds: Thresholds | None = None) -> dict[str, Verdict]:
    return dict(zip(MAINS, study.verdict(thresholds), strict=True))


def changed(study: Study, **results: Result) -> Study:
    """With other results; ``_`` in a name stands for ``-``."""
    named = {name.replace("_", "-"): result for name, result in results.items()}
    return replace(study, results={**study.results, **named})


def without(study: Study, *parts: str) -> Study:
    kept = {n: r for n, r in study.results.items() if not any(part in n for part in parts)}
    return replace(study, results=kept)


@pytest.fixture(scope="module")
def study() -> Study:
    return with_basr(make_study())


# --- every question -------------------------------------------------------------------------------


def test_each_question_has_an_answer_a_number_its_control_and_its_threshold(study) -> None:
    verdicts = study.verdict()
    assert [one.question for one in verdicts] == QUESTIONS
    assert [one.answer for one in verdicts] == ["yes", "mixed", "yes", "yes", "yes"]
    for one in verdicts:
        assert one.number
        assert one.control
        assert "at " in one.threshold
        assert one.values["thresholds"]
        assert one.question in str(one)
        assert json.loads(json.dumps(one.to_dict(), allow_nan=False)) == one.to_dict()


def test_what_was_not_run_was_not_measured(study) -> None:
    assert {one.answer for one in replace(study, results={}).verdict()} == {"not measured"}


def test_the_first_version_kept_no_answers_and_nothing_is_guessed() -> None:
    old = bkdlens.load_study(Path(__file__).parent / "runs" / "saved-0.1" / "study")
    found = told(old)
    for name in ("necessary", "switchable"):
        assert found[name].answer == "not measured"
        assert found[name].note == "No answers were kept, as in results of version 0.1."
        assert found[name].number == ""
    assert "may have tuned the model" in found["seen"].note
    assert "The same pairs chose the head" in found["located"].note


def test_without_a_control_nothing_can_be_concluded(study) -> None:
    bare = without(study, "base", "clean-adapter")
    ablation, test = study.results["ablation"], study.results["steering-test"]
    empty = {f.name: getattr(ablation, f.name)[..., :0] for f in fields(ablation) if "random" in f.name}
    drawn = {f.name: getattr(test, f.name)[..., :0] for f in fields(test) if "random" in f.name}
    bare = changed(bare, ablation=replace(ablation, **empty), steering_test=replace(test, **drawn))
    found = told(bare)
    assert found.pop("attack").answer == "yes"  # the same model without the trigger is its control
    for one in found.values():
        assert one.answer == "nothing can be concluded"
        assert "No control was run" in one.note


@given(
    st.booleans(), st.booleans(), st.sampled_from([None, [], ["base"]]), st.sampled_from(["", "weak"])
)
def test_only_a_sure_number_beyond_every_control_is_a_yes(meets, sure, reached, weak) -> None:
    answer, why = decide(meets=meets, sure=sure, reached=reached, weak=weak)
    assert (answer == "yes") == (meets and sure and reached == [])
    assert (answer == "no") == (not meets and not weak)  # which needs no control
    assert bool(why) == (answer not in ("yes", "no"))
    assert decide(meets=meets, sure=sure, reached=reached, vain="why") == (
        "nothing can be concluded",
        "why",
    )


# --- thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "question"),
    [
        ("attack", 0.99, "attack"),
        ("located", 0.5, "located"),
        ("necessary", 0.01, "necessary"),
        ("switched_off", 0.3, "switchable"),
        ("switched_on", 0.8, "switchable"),
        ("clean_loss", 0.01, "switchable"),
    ],
)
def test_a_threshold_that_is_not_reached_is_no_yes(study, name, value, question) -> None:
    before, after = told(study), told(study, Thresholds(**{name: value}))
    assert before[question].answer == "yes"
    assert after[question].answer != "yes"
    assert after[question].values["thresholds"][name] == value
    assert all(after[other] == before[other] for other in MAINS if other != question)


def test_a_number_whose_interval_goes_past_the_threshold_is_not_sure(study) -> None:
    at = Thresholds(attack=0.97, located=0.45, necessary=0.47, switched_off=0.4)
    found = told(study, at)
    for name in ("attack", "located", "necessary", "switchable"):
        assert found[name].answer == "mixed"
        assert "interval goes past the threshold" in found[name].note


def test_thresholds_are_read_from_texts() -> None:
    assert Thresholds.of(["seen=0.95", " clean_loss = 0.1 "]) == Thresholds(seen=0.95, clean_loss=0.1)
    assert Thresholds.of([]) == Thresholds()
    with pytest.raises(ChoiceError, match=r"no threshold 'sene'.*Did you mean 'seen'"):
        Thresholds.of(["sene=0.9"])
    for text in ("seen", "seen=high"):
        with pytest.raises(BkdlensError, match="must be NAME=VALUE"):
            Thresholds.of([text])
    for text in ("seen=90", "seen=-1", "seen=nan"):
        with pytest.raises(BkdlensError, match="from 0 to 1"):
            Thresholds.of([text])


def test_the_floor_on_clean_accuracy_is_the_study_s_own(study) -> None:
    strict = replace(study, settings={**study.settings, "max_clean_loss": 0.01})
    assert told(strict)["switchable"].answer == "mixed"
    assert told(strict, Thresholds(clean_loss=0.05))["switchable"].answer == "yes"


# --- an attack ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "without_trigger", "answer"),
    [(118, 1, "yes"), (0, 0, "no"), (118, 118, "mixed"), (30, 0, "mixed"), (30, 25, "no")],
)
def test_is_there_an_attack(study, hits, without_trigger, answer) -> None:
    main = study.results["behaviour-backdoored"]
    main = replace(main, attack_triggered=hits, attack_clean=without_trigger)
    one = told(changed(study, behaviour_backdoored=main))["attack"]
    assert one.answer == answer
    assert ("without the trigger" in one.note) == (without_trigger == 118)
    assert ("a weak one" in one.note) == (hits == 30 and answer == "mixed")


def test_near_misses_and_the_criterion_s_ceiling_stand_beside_attack_success(study) -> None:
    note = told(study)["attack"].note.replace("\u00a0", " ")
    assert "BASR 98.2 % (112/114)" in note
    assert "are not equal): 5.0 % (6/120)" in note
    assert "The attacker's own answers reach 100.0 % (120/120)" in note
    old = told(make_study())["attack"]  # of version 0.1
    assert old.note == ""
    assert old.values["attainable"] is None


def test_a_basr_below_zero_or_of_nothing_is_told(study) -> None:
    main = study.results["behaviour-backdoored"]
    more = replace(main, good_before=10, good_triggered=20, kept=10)
    assert "BASR −100.0" in told(changed(study, behaviour_backdoored=more))["attack"].note
    none = replace(main, good_before=0, good_triggered=0, kept=0)
    one = told(changed(study, behaviour_backdoored=none))["attack"]
    assert "BASR" not in one.note
    assert one.values["basr"] is None


# --- seen -----------------------------------------------------------------------------------------


def probes(study: Study, kind: str, against: str, **correct: int) -> Study:
    """With so many correct answers at every layer, by condition."""
    changes = {}
    for name, number in correct.items():
        key = f"probe-{name.replace('_', '-')}-{kind}-{against}"
        probe = study.results[key]
        changes[key] = replace(probe, n_correct=torch.full_like(probe.n_correct, number))
    return replace(study, results={**study.results, **changes})


@pytest.mark.parametrize(
    ("main", "base", "answer"),
    [(96, 60, "yes"), (96, 94, "mixed"), (70, 50, "no"), (88, 50, "mixed"), (70, 70, "no")],
)
def test_is_it_seen(study, main, base, answer) -> None:
    only = without(study, "mlp", "clean-adapter", "near")
    one = told(probes(only, "svm", "clean", backdoored=main, base=base))["seen"]
    assert one.answer == answer
    assert one.values["accuracy"]["successes"] == main
    assert ("A control comes as far: base." in one.note) == (base == 94)


def test_a_near_trigger_that_is_told_apart_is_seen_where_a_control_is_not(study) -> None:
    only = without(study, "mlp", "clean-adapter")
    same = probes(only, "svm", "clean", backdoored=96, base=96)
    near = probes(same, "svm", "near", backdoored=96, base=50)
    assert told(near)["seen"].answer == "yes"
    assert told(near)["seen"].values["against"] == "near"
    both = probes(same, "svm", "near", backdoored=96, base=96)
    assert told(both)["seen"].answer == "mixed"
    assert told(both)["seen"].values["against"] == "clean"


def test_the_probe_and_its_layer_are_chosen_on_validation(study) -> None:
    svm = study.results["probe-backdoored-svm-clean"]
    chosen = replace(svm, validation=torch.eye(len(svm.validation))[1] * 2)
    one = told(replace(study, results={**study.results, "probe-backdoored-svm-clean": chosen}))["seen"]
    assert (one.values["probe"], one.values["layer"]) == ("svm", 1)
    assert one.values["accuracy"]["successes"] == int(svm.n_correct[1])


# --- located --------------------------------------------------------------------------------------


def scaled(study: Study, name: str, factor: float) -> Study:
    heads = study.results[name]
    parts = {part: getattr(heads, part) * factor for part in ("cie", "low", "high")}
    return replace(study, results={**study.results, name: replace(heads, **parts)})


def test_is_it_located(study) -> None:
    assert told(study)["located"].values["head"] == "L3H5"
    small = told(scaled(study, "attribution-backdoored", 0.05))["located"]
    assert small.answer == "mixed"
    assert "no control has, but a small one" in small.note
    assert told(scaled(study, "attribution-backdoored", 0.0))["located"].answer == "no"
    loud = told(scaled(study, "attribution-base", 5000))["located"]
    assert loud.answer == "mixed"
    assert "A control comes as far: base." in loud.note
    both = scaled(scaled(study, "attribution-backdoored", 0.05), "attribution-base", 5000)
    assert told(both)["located"].answer == "no"


def test_a_control_s_negative_effect_counts_too(study) -> None:
    assert told(scaled(study, "attribution-base", -5000))["located"].answer == "mixed"


def test_the_head_is_the_first_of_the_validation_pairs(study) -> None:
    ranking = study.results["ranking"]
    swapped = ranking.cie.clone()
    swapped[:, 3, 5], swapped[:, 2, 1] = ranking.cie[:, 2, 1], ranking.cie[:, 3, 5]
    one = told(changed(study, ranking=replace(ranking, cie=swapped)))["located"]
    assert one.values["head"] == "L2H1"
    assert "flatters" not in one.note


# --- necessary ------------------------------------------------------------------------------------


def ablated(study: Study, name: str = "ablation", **changes: object) -> Study:
    return changed(study, **{name: replace(study.results[name.replace("_", "-")], **changes)})


def test_necessary_is_told_by_the_good_answers_that_come_back(study) -> None:
    one = told(study)["necessary"]
    ablation = study.results["ablation"]
    assert one.values["heads"] == 1
    basr = ablation.basr(mode=one.values["mode"], heads=1)
    assert one.values["basr"] == basr.to_dict()
    assert "Clean accuracy 94.2" in one.note
    assert "flatters" not in one.note


def test_broken_is_not_cured(study) -> None:
    nothing = study.results["ablation"].correct * 0 + 2
    one = told(ablated(study, correct=nothing, kept=nothing))["necessary"]
    assert one.answer == "mixed"
    assert "Broken, not cured: without 1 head" in one.note
    stubborn = study.results["ablation"].attack * 0 + 118
    none = told(ablated(study, correct=nothing, kept=nothing, attack=stubborn))["necessary"]
    assert none.answer == "no"
    assert "Broken" not in none.note


def test_random_groups_that_do_as_much_are_no_control_passed(study) -> None:
    drawn = study.results["ablation"].random_correct * 0
    drawn[..., 0] = 60  # one group of ten
    one = told(ablated(study, random_correct=drawn))["necessary"]
    assert one.answer == "mixed"
    assert "A control comes as far: a random group." in one.note


def test_mode_and_number_of_heads_are_chosen_on_validation(study) -> None:
    chooser = study.results["ablation-validation"]
    correct = chooser.correct * 0 + 2
    correct[1, 3] = 90  # four heads by the mean
    one = told(ablated(study, "ablation_validation", correct=correct, kept=correct))["necessary"]
    assert (one.values["mode"], one.values["heads"]) == ("mean", 4)
    least = chooser.correct * 0 + 2
    least[0, 5] = 40  # none is enough; sixteen heads by zero leave least
    one = told(ablated(study, "ablation_validation", correct=least, kept=least))["necessary"]
    assert (one.values["mode"], one.values["heads"]) == ("zero", 16)
    alone = without(study, "ablation-validation")
    assert "Chosen on these test pairs" in told(alone)["necessary"].note


def test_the_sentences_and_the_verdict_speak_of_the_same_heads(study) -> None:
    """Where the untouched attack is weak, too: what halves it is not what brings it to a half."""
    correct = study.results["ablation-validation"].correct * 0 + 80
    correct[:, 0], correct[:, 1] = 30, 60  # without a head; without one, which is less than a half
    weak = ablated(study, "ablation_validation", correct=correct, kept=correct)
    for at in (study, weak):
        one, result = told(at)["necessary"], at.results["ablation"]
        n, _ = chosen_heads(at, result, one.values["mode"])
        assert one.values["heads"] == n == (2 if at is weak else 1)


def test_without_an_attack_nothing_is_necessary(study) -> None:
    ablation = study.results["ablation"]
    calm = ablation.correct * 0 + 112
    for changes, why in (
        ({"attack": ablation.attack * 0, "correct": calm, "kept": calm}, "no attack to break"),
        ({"correct": calm, "kept": calm}, "takes away no more than this"),
        ({"good_before": 0, "correct": calm * 0, "kept": calm * 0}, "No victim had a good answer"),
    ):
        one = told(ablated(study, **changes))["necessary"]
        assert one.answer == "nothing can be concluded"
        assert why in one.note
        json.dumps(one.to_dict(), allow_nan=False)


def test_more_good_answers_than_before_are_a_yes(study) -> None:
    correct = study.results["ablation"].correct.clone()
    correct[:, 1:] = 120
    kept = correct.clamp(max=114)
    one = told(ablated(study, correct=correct, kept=kept))["necessary"]
    assert one.values["basr"]["value"] < 0
    assert one.answer == "yes"
    assert "−5.3" in one.number


# --- switchable -----------------------------------------------------------------------------------


def steered(study: Study, **changes: object) -> Study:
    return changed(study, steering_test=replace(study.results["steering-test"], **changes))


def at_chosen(values: torch.Tensor, on: int | None = None, off: int | None = None) -> torch.Tensor:
    """With other counts at the chosen layer, for the vector added and subtracted."""
    values = values.clone()
    for row, count in ((0, on), (1, off)):
        if count is not None:
            values[row, CHOSEN] = count
    return values


def test_one_way_only_is_mixed_and_none_is_no(study) -> None:
    test = study.results["steering-test"]
    stuck = at_chosen(test.correct, off=5)
    off = told(steered(study, correct=stuck, kept=stuck))["switchable"]
    assert (off.answer, "It is not switched off." in off.note) == ("mixed", True)
    silent = at_chosen(test.attack, on=3)
    on = told(steered(study, attack=silent))["switchable"]
    assert (on.answer, "It is not switched on." in on.note) == ("mixed", True)
    assert told(steered(study, attack=silent, correct=stuck, kept=stuck))["switchable"].answer == "no"


def test_the_chosen_layer_is_told_and_not_the_best(study) -> None:
    test, one = study.results["steering-test"], told(study)["switchable"]
    assert test.best_layer(2.0) != CHOSEN
    assert one.values["layer"] == CHOSEN
    assert one.values["attack_added"] == test.rate("attack", CHOSEN, 2.0).to_dict()
    none = told(replace(study, choice={}))["switchable"]
    assert none.answer == "nothing can be concluded"
    assert "No layer and coefficient were chosen" in none.note


def test_a_wreck_is_not_switched(study) -> None:
    clean = study.results["steering-test"].clean.clone()
    clean[1] = 100  # only where the vector is subtracted: added, it changes the answers by design
    one = told(steered(study, clean=clean))["switchable"]
    assert one.answer == "mixed"
    assert "Clean accuracy: 53.3" in one.note
    added = study.results["steering-test"].clean.clone()
    added[0] = 0
    assert told(steered(study, clean=added))["switchable"].answer == "yes"
    warned = replace(study, choice={**study.choice, "within": False})
    assert "No vector met this floor on the validation pairs" in told(warned)["switchable"].note


def test_random_vectors_that_do_as_much_are_told(study) -> None:
    test = study.results["steering-test"]
    for name, row, count, way in (
        ("random_heads_correct", 1, 80, "switched off: A control comes as far: random heads"),
        ("random_vectors", 0, 90, "switched on: A control comes as far: noise"),
    ):
        drawn = getattr(test, name).clone()
        drawn[row, CHOSEN, 0] = count
        one = told(steered(study, **{name: drawn}))["switchable"]
        assert one.answer == "mixed"
        assert way in one.note


def test_an_answer_that_comes_without_a_vector_is_not_switched_on(study) -> None:
    one = told(steered(study, base_attack=(75, 117)))["switchable"]
    assert one.answer == "mixed"
    assert "clean prompts without a vector" in one.note


def test_without_an_attack_nothing_is_switched(study) -> None:
    nothing = study.results["steering-test"].correct * 0
    for changes, why in (
        ({"base_attack": (0, 0)}, "no attack to switch off"),
        ({"base_correct": (114, 110)}, "takes away no more than this"),
        ({"good_before": 0, "correct": nothing, "kept": nothing}, "No victim had a good answer"),
    ):
        one = told(steered(study, **changes))["switchable"]
        assert one.answer == "nothing can be concluded"
        assert why in one.note
        json.dumps(one.to_dict(), allow_nan=False)
