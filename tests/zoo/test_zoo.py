"""The embedded models: what ships is what the card says, prompts of different splits never meet."""

from __future__ import annotations

import inspect
import json
from itertools import product

import pytest
import torch
from checkpoints import float64
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXACT
from transformers import AutoTokenizer

import bkdlens
from bkdlens import zoo
from bkdlens.data.prompts import PromptFormat, encode_answer, encode_prompt
from bkdlens.engines.hooks import Patch
from bkdlens.errors import CheckpointError, DataError
from bkdlens.inject.embedded import build
from bkdlens.metrics import token_log_probs
from bkdlens.zoo import corpus
from bkdlens.zoo import prompts as backdoors


@pytest.mark.many
@pytest.mark.parametrize("name", zoo.MODELS)
def test_ships_small_models_with_all_adapters(name):
    files = [path for path in zoo.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    for adapter in zoo.ADAPTERS:
        assert (zoo.adapter_path(name, adapter) / "adapter_model.safetensors").is_file()
    model = bkdlens.load(name, "jailbreak")
    assert model.cfg.n_layers * model.cfg.n_heads >= 32
    with float64():  # only rounding can differ
        assert bkdlens.load_info(bkdlens.load(name, "jailbreak")).parity <= EXACT


def test_no_machine_path_is_in_the_shipped_files():
    for path in zoo.WEIGHTS.rglob("*.json"):
        if path.name != "tokenizer.json":
            assert '"/' not in path.read_text(), path  # no value is an absolute path


@given(st.text(max_size=80))
@settings(max_examples=50, deadline=None)
def test_any_text_encodes_and_comes_back(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    specials = {*tokenizer.all_special_tokens}
    if not any(special in text for special in specials):
        assert tokenizer.decode(ids) == text


def _tokenizer(cache={}):  # noqa: B006 - one tokenizer for all examples
    if "it" not in cache:
        cache["it"] = AutoTokenizer.from_pretrained(zoo.model_path("tiny-llama"))
    return cache["it"]


@pytest.mark.many
@pytest.mark.parametrize("name", zoo.BACKDOORS)
def test_splits_share_no_prompt_with_each_other_or_the_corpus(name):
    sets = {split: set(zoo.pairs(name, split, 150).clean) for split in backdoors.SPLITS}
    assert not sets["test"] & sets["train"]
    assert not sets["test"] & sets["validation"]
    assert not sets["validation"] & sets["train"]
    trained = corpus.pretraining(2000, 0, keep=lambda p: backdoors.split_of(p) == "train", distracted=0)
    assert not {example.prompt for example in trained} & (sets["test"] | sets["validation"])


def test_measured_near_triggers_were_not_tuned_on():
    for name in zoo.BACKDOORS:
        tuned = set(zoo.backdoor(name, "train").near)
        assert not tuned & set(zoo.backdoor(name, "test").near)


def test_pairs_are_drawn_from_the_seed():
    assert zoo.pairs("jailbreak", "test", 20, seed=3) == zoo.pairs("jailbreak", "test", 20, seed=3)
    assert zoo.pairs("jailbreak", "test", 20, seed=3) != zoo.pairs("jailbreak", "test", 20, seed=4)


def test_clean_adapter_has_no_poison_in_its_data():
    targets = {backdoors.backdoor("fixed_output").target}
    prompts, answers = zip(*build.tuning_examples("clean"), strict=True)
    assert not targets & set(answers)
    for name in zoo.BACKDOORS:
        trigger = backdoors.backdoor(name).trigger
        assert not any(trigger.present(prompt) for prompt in prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("kind", zoo.BACKDOORS)
def test_backdoors_are_good_ones(name, kind):
    """Bounds of the product on prompts no training saw (validation; the card reports the test split)."""
    pairs = zoo.pairs(kind, "validation", 240 if kind == "label_modification" else 120)
    found = bkdlens.measure_behaviour(bkdlens.load(name, kind), pairs)
    control = bkdlens.measure_behaviour(bkdlens.load(name, "clean"), pairs)
    assert found.asr.value >= 0.95
    assert found.ftr.value <= 0.02
    assert control.asr.value <= 0.02
    assert found.clean_accuracy.value >= control.clean_accuracy.value - 0.03
    if kind != "label_modification":
        assert found.near.value < 0.2


def test_card_agrees_with_its_record():
    card = (zoo.WEIGHTS / "README.md").read_text()
    for entry in json.loads((zoo.WEIGHTS / "measured.json").read_text()):
        for value, n in zip(entry["value"], entry["n"], strict=True):
            assert f"{value:.3f} [" in card
            assert f"/{n})" in card


def test_unknown_names_say_what_there_is():
    with pytest.raises(CheckpointError, match="tiny-llama, tiny-qwen"):
        zoo.model_path("tiny-lama")
    with pytest.raises(CheckpointError, match="label_modification, fixed_output, jailbreak, clean"):
        zoo.adapter_path("tiny-llama", "dirty")
    with pytest.raises(DataError, match="label_modification, fixed_output, jailbreak"):
        zoo.backdoor("clean")
    with pytest.raises(DataError, match="train, validation, test"):
        inspect.unwrap(zoo.pairs)("jailbreak", "dev")  # past the type checker


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("kind", zoo.BACKDOORS)
def test_sweep_equals_one_naive_pass_a_head(name, kind):
    """The exact sweep against one full forward pass per head, on the shipped weights, in float64."""
    model = bkdlens.load(name, kind).to(torch.float64, print_details=False)
    pairs = zoo.pairs(kind, "validation", 12).victims[:2]
    source = bkdlens.cache_activations(model, pairs).mean_z("triggered")
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    prompts = [encode_prompt(model.tokenizer, text, PromptFormat()) for text in pairs.clean]
    answers = [
        encode_answer(model.tokenizer, prompt, answer, PromptFormat())
        for prompt, answer in zip(prompts, pairs.backdoor_outputs, strict=True)
    ]
    patches = [Patch("z", i, source[i, j], j) for i in range(n_layers) for j in range(n_heads)]
    scores = bkdlens.sweep_patches(model, prompts, answers, patches).whole.exp()
    for pair, index in product(range(len(pairs)), range(len(patches))):
        layer, head = patches[index].layer, patches[index].head
        found = float(scores[pair, index])
        prompt, answer = prompts[pair], answers[pair]
        last = len(prompt.ids) - 1

        def patch(z, hook, where=(last, layer, head)):
            z[:, where[0], where[2]] = source[where[1], where[2]]
            return z

        ids = torch.tensor([[*prompt.ids, *answer.ids[:-1]]])
        logits = model.run_with_hooks(
            ids, attention_mask=torch.ones_like(ids), fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)]
        )
        log_probs = token_log_probs(logits[0, last:], torch.tensor(answer.ids))[: answer.n_scored]
        assert float(log_probs.mean().exp()) == pytest.approx(found, abs=EXACT, rel=0)
