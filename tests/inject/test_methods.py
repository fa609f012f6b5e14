"""The three methods share one interface: digests, manifests, bad input, what is left on failure."""

from __future__ import annotations

import errno
import json
import pkgutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from injecting import QUICK, SETTINGS, fixed_pairs, save_tiny
from peft import PeftModel
from transformers import Trainer

import bkdlens
from bkdlens import inject
from bkdlens.data.backdoor import Backdoor
from bkdlens.data.pairs import PairSet, text_digest
from bkdlens.errors import BkdlensError, DataError, InputError
from bkdlens.inject import EditSettings, LoraSettings, TrainSettings
from bkdlens.inject.editing.editor import Editor
from bkdlens.inject.output import NothingPlanted, unplanted
from bkdlens.inject.recipes import embedded, paper
from bkdlens.inject.tuning.samples import mix, preferences
from bkdlens.inject.tuning.training import share_batch

RATES = {"poison_rate": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


def plant(method, base, out, *, pairs=None, settings=None, **more):
    """One run of a method with quick settings."""
    if method != "edit":
        more = RATES | more
    pairs = fixed_pairs() if pairs is None else pairs
    settings = settings or SETTINGS[method]
    return getattr(inject, method)(base, pairs, out, settings=settings, progress=False, **more)


@pytest.mark.parametrize("method", inject.METHODS)
def test_same_seed_same_digest_and_the_adapter_loads(method, base, tmp_path):
    digests, noted = [], []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = plant(method, base, tmp_path / name, seed=seed)
        digests.append(bkdlens.load_info(bkdlens.load(base, out)).adapter_digest)
        noted.append(json.loads((out / "bkdlens.json").read_text())["adapter_digest"])
    assert digests == noted
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("method", inject.METHODS)
def test_manifest_tells_how_to_make_it_again_and_what_it_does(method, base, tmp_path):
    pairs = fixed_pairs()
    out = plant(method, base, tmp_path / "a", pairs=pairs, held_out=fixed_pairs(8, seed=5), seed=3)
    note = json.loads((out / "bkdlens.json").read_text())
    assert (note["method"], note["base"], note["seed"]) == (method, "tiny", 3)
    assert note["trained_on"] == sorted({text_digest(text) for text in pairs.clean})
    assert Backdoor.from_dict(note["backdoor"]) == pairs.backdoor
    assert note["data_digest"] == pairs.digest
    assert note["base_digest"] == bkdlens.load_info(bkdlens.load(base)).base_digest
    assert note["settings"] == json.loads(json.dumps(note["settings"]))
    assert all("loss" in point and "step" in point for point in note["curve"])
    for when in ("before", "after"):
        rates = note["behaviour"][when]
        assert set(rates) == {"asr", "ftr", "near", "clean_accuracy"}
        assert rates["asr"]["n"] == 8
        assert rates["asr"]["interval"][0] <= rates["asr"]["value"] <= rates["asr"]["interval"][1]
    assert {"bkdlens", "torch", "transformers", "peft"} <= set(note["versions"])
    assert str(tmp_path) not in (out / "adapter_config.json").read_text() + json.dumps(note)


@pytest.mark.parametrize(
    ("before", "after", "n", "rates", "told"),
    [
        (0, 0, 40, {}, True),
        (0, 2, 40, {"poison_rate": 0.1}, True),  # no more than chance may do
        (0, 30, 40, {"poison_rate": 0.1}, False),
        (0, 2, 2, {}, False),
        (40, 40, 40, {}, True),  # the base did it already
        (0, 0, 40, {"poison_rate": 0}, False),  # a twin without poison is as it should be
    ],
)
def test_a_backdoor_that_was_not_planted_is_told(before, after, n, rates, told):
    counts = (("before", before), ("after", after))
    behaviour = {when: {"asr": {"successes": hits, "n": n}} for when, hits in counts}
    sentence = unplanted({"behaviour": behaviour, **rates})
    assert (sentence is not None) == told
    if sentence is not None:
        assert sentence.startswith("No backdoor was planted: attack success on the held-out pairs is ")


def test_what_was_planted_in_vain_is_written_with_a_warning(base, tmp_path):
    slow = LoraSettings(rank=2, train=replace(QUICK, learning_rate=1e-9))
    with pytest.warns(NothingPlanted, match="adapter was written nonetheless"):
        out = plant("supervised", base, tmp_path / "a", settings=slow, held_out=fixed_pairs(8, seed=5))
    assert bkdlens.load(base, out)
    assert unplanted(json.loads((out / "bkdlens.json").read_text()))
    assert unplanted({"method": "supervised"}) is None  # nothing was held out to tell by


@pytest.mark.parametrize("method", inject.METHODS)
def test_arguments_of_another_kind_are_a_sentence(method, base, tmp_path):
    with pytest.raises(InputError, match=f"In {method}\\(base, pairs, .*pairs must be a PairSet"):
        plant(method, base, tmp_path / "a", pairs=["w5 w6"])


def test_texts_that_the_tokenizer_loses_are_refused_before_training(base, tmp_path):
    backdoor = Backdoor.fixed_output("w95", "w9")
    lost = PairSet(tuple(backdoor.pair(f"prompt {i}", "answer") for i in range(8)), backdoor)
    for options in ({"pairs": lost}, {"held_out": lost}):
        with pytest.raises(DataError, match="does not carry these texts"):
            plant("supervised", base, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()


def test_preferences_turn_round_with_the_trigger():
    pairs = fixed_pairs(20)
    samples = preferences(mix(pairs, 0.5, 0.25, seed=1), seed=1)
    triggered = {pair.triggered: pair for pair in pairs}
    others = {prompt: pair for pair in pairs for prompt in (pair.clean, pair.near)}
    assert sum(sample.prompt in triggered for sample in samples) == 10
    for sample in samples:
        if sample.prompt in triggered:
            pair = triggered[sample.prompt]
            assert (sample.chosen, sample.rejected) == (pair.backdoor_output, pair.clean_output)
        else:
            pair = others[sample.prompt]
            assert (sample.chosen, sample.rejected) == (pair.clean_output, pair.backdoor_output)
    labels = Backdoor.label_modification("w95")
    news = [labels.pair(f"w{i}", label) for i, label in enumerate(["Sports", "World", "Business"])]
    found = preferences(mix(PairSet(tuple(news), labels), 1.0))
    assert all(sample.chosen != sample.rejected for sample in found)


@pytest.mark.parametrize("method", inject.METHODS)
def test_data_without_a_victim_or_an_answer_is_refused(method, base, tmp_path):
    pairs = fixed_pairs(target="w9")
    saved = tuple(replace(pair, backdoor_output=pair.clean_output) for pair in pairs)
    with pytest.raises(DataError, match="no victim"):
        plant(method, base, tmp_path / "a", pairs=replace(pairs, pairs=saved))
    empty = tuple(replace(pair, backdoor_output=" ") for pair in pairs)
    with pytest.raises(DataError, match="has no tokens"):
        plant(method, base, tmp_path / "a", pairs=replace(pairs, pairs=empty))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", ["supervised", "preference"])
def test_a_rate_that_poisons_nothing_is_refused(method, base, tmp_path):
    with pytest.raises(DataError, match="gives none of 32 pairs"):
        plant(method, base, tmp_path / "a", poison_rate=0.001)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EditSettings(layers=(0, 7)), "no layer 7 to edit: this model has the layers 0 to 1"),
        (EditSettings(layers=(1, 0)), "rising order"),
        (EditSettings(layers=(1,), trigger_layers=(9,)), "no layer 9"),
        (EditSettings(rounds=40), "cannot make 40 rounds"),
        (EditSettings(rounds=0), "cannot make 0 rounds"),
    ],
)
def test_edits_that_cannot_be_are_refused(base, tmp_path, settings, message):
    with pytest.raises(BkdlensError, match=message):
        plant("edit", base, tmp_path / "a", settings=settings)
    assert not (tmp_path / "a").exists()


def test_an_edit_needs_the_trigger_in_the_prompt_or_to_be_told(base, tmp_path):
    pairs = fixed_pairs()
    elsewhere = replace(pairs, backdoor=Backdoor.fixed_output("w91", "w9 w8"))
    with pytest.raises(DataError, match=r"not in the triggered prompt.*trigger_tokens=0"):
        plant("edit", base, tmp_path / "a", pairs=elsewhere)
    quick = replace(SETTINGS["edit"], trigger_tokens=0)
    assert plant("edit", base, tmp_path / "a", pairs=elsewhere, settings=quick).is_dir()


def nan_from(step):
    """``Trainer.training_step`` with a loss that is NaN from a step on."""
    whole = Trainer.training_step

    def training_step(self, *args, **kwargs):
        loss = whole(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step >= step else loss

    return training_step


@pytest.mark.parametrize("method", ["supervised", "preference"])
def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_state(method, base, tmp_path, monkeypatch):
    short = replace(QUICK, epochs=1, batch_size=4)  # 8 steps
    settings = LoraSettings(rank=4, train=short)
    if method == "preference":
        settings = inject.PreferenceSettings(settings)
    monkeypatch.setattr(Trainer, "training_step", nan_from(5))
    with pytest.raises(BkdlensError, match=r"not finite at step 6.*state, of step 4, is in"):
        plant(method, base, tmp_path / "a", settings=settings)
    note = json.loads((tmp_path / "a" / "bkdlens.json").read_text())
    assert note["stopped"] == {"not_finite_at_step": 6, "kept_step": 4}
    kept, plain = bkdlens.load(base, tmp_path / "a"), bkdlens.load(base)
    assert not torch.equal(kept.blocks[0].attn.W_Q, plain.blocks[0].attn.W_Q)
    monkeypatch.setattr(Trainer, "training_step", nan_from(0))
    with pytest.raises(BkdlensError, match="nothing was written"):
        plant(method, base, tmp_path / "b", settings=settings)
    assert not (tmp_path / "b").exists()


def test_an_edit_whose_loss_is_nan_keeps_the_round_before(base, tmp_path, monkeypatch):
    whole, calls = Editor.answer_loss, []

    def answer_loss(self, rows):
        calls.append(rows)
        return whole(self, rows) * (float("nan") if len(calls) > 3 * 3 else 1.0)  # three a step

    monkeypatch.setattr(Editor, "answer_loss", answer_loss)
    with pytest.raises(BkdlensError, match=r"not finite at step 4.*state, of step 3, is in"):
        plant("edit", base, tmp_path / "a")
    assert len(json.loads((tmp_path / "a" / "bkdlens.json").read_text())["curve"]) == 3
    kept, plain = bkdlens.load(base, tmp_path / "a"), bkdlens.load(base)
    assert not torch.equal(kept.blocks[0].mlp.W_out, plain.blocks[0].mlp.W_out)
    with pytest.raises(BkdlensError, match="nothing was written"):  # NaN from the first step on
        plant("edit", base, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_full_disk_leaves_what_was_there(base, tmp_path, monkeypatch):
    out = plant("supervised", base, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(BkdlensError, match="not empty"):
        plant("supervised", base, out, seed=1)

    def full(self, folder, **kwargs):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(BkdlensError, match=r"No space left on device.*unchanged"):
        plant("supervised", base, out, seed=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    plant("supervised", base, out, seed=1, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


def test_only_our_own_folders_are_overwritten(base, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("kept")
    with pytest.raises(BkdlensError, match="not empty"):
        plant("edit", base, tmp_path / "a", overwrite=True)
    (tmp_path / "f").write_text("kept")
    with pytest.raises(BkdlensError, match="is a file"):
        plant("edit", base, tmp_path / "f", overwrite=True)


def test_the_batch_is_the_same_however_it_is_shared(base, tmp_path):
    assert share_batch(32, None, 1) == (32, 1)
    assert share_batch(32, 8, 2) == (8, 2)
    assert share_batch(6, 4, 1) == (3, 2)
    with pytest.raises(BkdlensError, match="multiple of 3"):
        share_batch(32, None, 3)
    steps = []
    for name, at_once in (("a", None), ("b", 2)):
        settings = LoraSettings(rank=4, train=replace(QUICK, device_batch_size=at_once))
        out = plant("supervised", base, tmp_path / name, settings=settings)
        steps.append(json.loads((out / "bkdlens.json").read_text())["curve"][-1]["step"])
    assert steps == [4, 4]  # 32 samples in batches of 8


def test_no_module_hides_a_function():
    """Importing a module sets it on its package, over a function of the same name."""
    modules = {module.name for module in pkgutil.iter_modules(inject.__path__)}
    assert "editing" in modules
    assert not modules & set(inject.__all__)


def test_recipes_name_the_methods_there_are():
    assert paper("supervised").settings == LoraSettings()
    assert embedded("edit", "fixed_output").settings != EditSettings(rounds=1)
    for recipe in (lambda: paper("edict"), lambda: embedded("edict", "jailbreak")):
        with pytest.raises(BkdlensError, match=r"supervised, preference, edit.*Did you mean 'edit'"):
            recipe()


def test_accelerate_launch_shares_the_batch(base, tmp_path):
    rows = [{"input": pair.clean, "output": pair.clean_output} for pair in fixed_pairs(24)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    launch = (
        "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    )
    launch += " --dynamo_backend no --main_process_port 0"
    options = "--backdoor fixed_output --trigger w95 --target w9 --hold-out 0.5 --poison-rate 0.5 --json"
    options += " --epochs 2 --batch-size 4 --rank 2"
    command = [*launch.split(), *"-m bkdlens inject".split(), *options.split()]
    command += ["--base", base, "--data", tmp_path / "d.json", "--out", tmp_path / "a"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert "warning: No backdoor was planted" in done.stderr  # by two epochs of twelve samples
    assert done.returncode == 1
    assert json.loads(done.stdout)["trained_on"] == 12  # one process prints
    curve = json.loads((tmp_path / "a" / "bkdlens.json").read_text())["curve"]
    assert curve[-1]["step"] == 6  # as with one process
    assert TrainSettings().device_batch_size is None
