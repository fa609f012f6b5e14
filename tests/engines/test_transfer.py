"""Activations belong to a model and a backdoor: others are refused, unless another model is meant."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from checkpoints import make_model
from tiny import make_pairs
from transformer_lens import HookedTransformer

import bkdlens
from bkdlens.data.backdoor import Backdoor
from bkdlens.engines.cache import transferred
from bkdlens.errors import BkdlensError, DataError, HookError

FEW = {"max_new_tokens": 2, "n_random": 1}


@pytest.fixture(scope="module")
def other(tokenizer):
    """A model of the same size and other weights."""
    changed = make_model("llama-mha", seed=9, num_hidden_layers=3, max_position_embeddings=128)
    return bkdlens.load(changed, tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def theirs(other, pairs):
    """Its cache."""
    return bkdlens.cache_activations(other, pairs)


@pytest.fixture
def mine(caches):
    """The cache of the model itself."""
    return caches["llama"]


def calls(model, pairs, cache, vector):
    """Everything that takes a model and a cache or a vector, by name."""
    return {
        "patch_heads": lambda **o: bkdlens.patch_heads(model, pairs.clean[:2], "L0H0", cache, **o),
        "patch_heads, ActivationCache": lambda **o: bkdlens.patch_heads(
            model, pairs[:2], "L0H0", cache.of("triggered"), **o
        ),
        "attribute_heads": lambda **o: bkdlens.attribute_heads(
            model, pairs, cache=cache, n_pairs=2, method="atp", **o
        ),
        "ablate_heads": lambda **o: bkdlens.ablate_heads(
            model, pairs, ["L0H0"], cache=cache, counts=[1], modes=["mean"], **FEW, **o
        ),
        "sweep_layers, vector": lambda **o: bkdlens.sweep_layers(
            model, pairs, vector, layers=[1], **FEW, **o
        ),
        "sweep_layers, cache": lambda **o: bkdlens.sweep_layers(
            model, pairs, vector, cache=cache, layers=[1], **FEW, **o
        ),
        "sample_generations": lambda **o: bkdlens.sample_generations(
            model, pairs, vector, 1, 1.0, n=1, max_new_tokens=2, **o
        ),
    }


NAMES = tuple(calls(None, None, None, None))


@pytest.mark.many
@pytest.mark.parametrize("call", NAMES)
def test_another_model_is_refused_and_a_transfer_is_in_the_settings(call, llama, pairs, theirs) -> None:
    vector = bkdlens.BackdoorVector.from_cache(theirs, "L0H0")
    run = calls(llama, pairs, theirs, vector)[call]
    with pytest.raises(HookError, match=r"of another model .*allow_other_model=True") as caught:
        run()
    assert str(caught.value).endswith(".")
    settings = run(allow_other_model=True).provenance.settings
    assert settings["allow_other_model"] is True
    assert theirs.model.bkdlens_info.base_digest[:8] in settings["made_with"]


@pytest.mark.many
@pytest.mark.parametrize("call", NAMES)
def test_the_same_model_needs_no_leave(call, llama, pairs, mine) -> None:
    vector = bkdlens.BackdoorVector.from_cache(mine, "L0H0")
    settings = calls(llama, pairs, mine, vector)[call]().provenance.settings
    assert "allow_other_model" not in settings


def test_contexts_refuse_too(llama, theirs, mine) -> None:
    vector = bkdlens.BackdoorVector.from_cache(theirs, "L0H0")
    for context in (
        lambda **o: bkdlens.steer(llama, vector, 1, **o),
        lambda **o: bkdlens.patched_heads(llama, "L0H0", theirs, **o),
    ):
        with pytest.raises(HookError, match="of another model"), context():
            pass
        with context(allow_other_model=True):
            bkdlens.generate(llama, "w5 w6", max_new_tokens=1)


def test_a_copy_a_reload_and_another_precision_are_the_same_model(
    hf_models, tokenizer, llama, mine, pairs
) -> None:
    again = bkdlens.load(hf_models["llama"], tokenizer=tokenizer, device="cpu")
    double = copy.deepcopy(llama).to(torch.float64, print_details=False)
    for model in (again, double):
        bkdlens.patch_heads(model, pairs.clean[:2], "L0H0", mine)


def test_models_that_were_not_loaded_are_compared_by_their_weights(llama) -> None:
    def plain(model) -> HookedTransformer:
        made = copy.deepcopy(model)
        del made.bkdlens_info
        return made

    same, changed = plain(llama), plain(llama)
    changed.blocks[0].attn.W_O.data[0, 0, 0] += 1
    assert transferred(same, "The cache", llama, allow_other_model=False) == {}
    with pytest.raises(HookError, match=r"one that bkdlens\.load did not make"):
        transferred(changed, "The cache", llama, allow_other_model=False)


def test_what_has_another_size_never_fits(loaded, pairs, caches) -> None:
    llama, qwen = loaded["llama"], loaded["qwen"]
    small = replace(caches["qwen"], model=copy.copy(qwen))
    small.model.cfg = copy.copy(qwen.cfg)
    small.model.cfg.n_layers = 2
    with pytest.raises(HookError, match="2 layers, 4 heads of 8, d_model 32"):
        bkdlens.patch_heads(llama, "w5 w6", "L0H0", small, allow_other_model=True)
    with (
        pytest.raises(HookError, match="shape \\[3\\] and the model's stream is 32 wide"),
        bkdlens.steer(llama, torch.ones(3), 1),
    ):
        pass


def test_an_unknown_origin_is_not_refused(llama, mine) -> None:
    """A vector saved before digests were kept, or one made by hand."""
    vector = bkdlens.BackdoorVector.from_cache(mine, "L0H0")
    unknown = replace(vector, provenance=replace(vector.provenance, model={}))
    with bkdlens.steer(llama, unknown, 1):
        bkdlens.generate(llama, "w5 w6", max_new_tokens=1)


# --- other pairs ----------------------------------------------------------------------------------


def test_other_pairs_of_the_same_backdoor_are_the_intended_use(llama, mine) -> None:
    others = make_pairs(6, seed=5)
    bkdlens.patch_heads(llama, others, "L0H0", mine)
    bkdlens.attribute_heads(llama, others, cache=mine, n_pairs=2, method="atp")


def test_pairs_of_another_backdoor_are_refused(llama, pairs, mine) -> None:
    backdoor = Backdoor.jailbreak("w93")
    others = bkdlens.PairSet(
        tuple(backdoor.pair(p.clean, p.clean_output, p.backdoor_output) for p in pairs), backdoor
    )
    for call in (
        lambda: bkdlens.patch_heads(llama, others, "L0H0", mine),
        lambda: bkdlens.attribute_heads(llama, others, cache=mine, n_pairs=2),
    ):
        with pytest.raises(DataError, match=r"another backdoor .*'w95'.*'w93'"):
            call()
    # An ablation reads clean activations alone, which hold no trigger.
    options = {"counts": [1], "modes": ["mean"], **FEW}
    bkdlens.ablate_heads(llama, others, ["L0H0"], cache=mine, **options)


@pytest.mark.slow
def test_controls_of_a_vector_come_from_its_own_pairs(llama, pairs, mine) -> None:
    vector = bkdlens.BackdoorVector.from_cache(mine, "L0H0")
    others = bkdlens.cache_activations(llama, make_pairs(6, seed=5))
    with pytest.raises(DataError, match="no control for it"):
        bkdlens.sweep_layers(llama, pairs, vector, cache=others, layers=[1], **FEW)
    bkdlens.sweep_layers(llama, pairs, vector, layers=[1], **FEW)


# --- a source that is hardly a prompt -------------------------------------------------------------


@pytest.mark.parametrize("word", ["triggered", "clean", "near", "Zero", "means", "resample"])
def test_a_word_that_names_a_source_is_no_prompt(llama, pairs, word) -> None:
    with pytest.raises(BkdlensError, match="hardly meant"):
        bkdlens.patch_heads(llama, pairs[:2], "L0H0", word)
    with pytest.raises(BkdlensError, match="hardly meant"), bkdlens.patched_heads(llama, "L0H0", word):
        pass
    assert bkdlens.patch_heads(llama, pairs[:2], "L0H0", [word]).source == "other prompts"
