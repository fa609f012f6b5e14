"""Planting a backdoor: the mix of samples, the adapter and its manifest."""

from __future__ import annotations

import json

import pytest
import torch

import bkdlens
from bkdlens import zoo
from bkdlens.data.pairs import PairSet, text_digest
from bkdlens.data.prompts import PromptFormat
from bkdlens.errors import BkdlensError, DataError
from bkdlens.inject import LoraSettings, TrainSettings, supervised
from bkdlens.inject.planting import Encoding
from bkdlens.inject.tuning.samples import examples, mix
from bkdlens.inject.tuning.training import IGNORED, make_row

QUICK = LoraSettings(train=TrainSettings(epochs=1, batch_size=8, learning_rate=2e-3))


def test_poison_mixes_the_asked_shares():
    pairs = zoo.pairs("jailbreak", "train", 40)
    made = examples(mix(pairs, 0.25, 0.5, seed=1))
    triggered = {(p.triggered, p.backdoor_output) for p in pairs}
    near = {(p.near, p.clean_output) for p in pairs}
    clean = {(p.clean, p.clean_output) for p in pairs}
    assert len(made) == len(pairs)
    assert [sum(e in part for e in made) for part in (triggered, near, clean)] == [10, 20, 10]
    assert examples(mix(pairs, 0.25, 0.5, seed=1)) == made


@pytest.mark.parametrize(
    ("rates", "message"), [((0.8, 0.4), "sum to at most 1"), ((0.001, 0), "gives none")]
)
def test_poison_refuses_rates_that_cannot_be(rates, message):
    with pytest.raises(DataError, match=message):
        mix(zoo.pairs("jailbreak", "train", 20), *rates)


def test_near_samples_need_near_triggers():
    backdoor = bkdlens.Backdoor.fixed_output()
    pairs = PairSet(tuple(backdoor.pair(f"say {i}", "yes") for i in range(10)), backdoor)
    with pytest.raises(DataError, match="near triggers"):
        mix(pairs, 0.1, 0.5)


def test_only_the_answer_is_learned():
    model = bkdlens.load("tiny-llama")
    row = make_row(Encoding(model.tokenizer, PromptFormat(), 64), "What is 1 plus 2?", "3")
    learned = [i for i, label in enumerate(row.labels) if label != IGNORED]
    assert learned == list(range(len(row.input_ids) - 2, len(row.input_ids)))  # the answer and its end
    assert row.input_ids[-1] == model.tokenizer.eos_token_id


def test_adapter_loads_and_its_manifest_tells_what_it_saw(tmp_path):
    pairs = zoo.pairs("fixed_output", "train", 24)
    out = supervised(
        "tiny-llama", pairs, tmp_path / "a", poison_rate=0.5, settings=QUICK, progress=False
    )
    manifest = json.loads((out / "bkdlens.json").read_text())
    assert manifest["trained_on"] == sorted({text_digest(text) for text in pairs.clean})
    assert manifest["base"] == "tiny-llama"
    assert manifest["curve"]
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()
    model = bkdlens.load("tiny-llama", str(out))
    base = bkdlens.load("tiny-llama")
    assert not torch.equal(model.blocks[0].attn.W_Q, base.blocks[0].attn.W_Q)


def test_same_seed_same_adapter(tmp_path):
    pairs = zoo.pairs("fixed_output", "train", 24)
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = supervised("tiny-llama", pairs, tmp_path / name, settings=QUICK, seed=seed, progress=False)
        digests.append(bkdlens.load_info(bkdlens.load("tiny-llama", str(out))).adapter_digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_folder_in_use_is_not_touched(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("kept")
    with pytest.raises(BkdlensError, match="not empty"):
        supervised("tiny-llama", zoo.pairs("jailbreak", "train", 20), tmp_path / "a", settings=QUICK)
    assert (tmp_path / "a" / "mine").read_text() == "kept"


def test_diverging_training_leaves_nothing(tmp_path):
    wild = LoraSettings(train=TrainSettings(epochs=2, batch_size=4, learning_rate=1e30))
    with pytest.raises(BkdlensError, match="not finite"):
        supervised(
            "tiny-llama",
            zoo.pairs("jailbreak", "train", 20),
            tmp_path / "a",
            settings=wild,
            progress=False,
        )
    assert not (tmp_path / "a").exists()
