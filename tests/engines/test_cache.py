"""One pass fills the cache, everything reads it, and it holds what TransformerLens' own would."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
from checkpoints import CASES, make_model
from tiny import EXACT, apart, make_pairs, set_at
from transformer_lens import ActivationCache
from transformer_lens.components import Embed

import bkdlens
from bkdlens.data.backdoor import Backdoor
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat, encode_prompt
from bkdlens.engines import cache as cache_module
from bkdlens.engines.cache import cached_names, head_results
from bkdlens.errors import ChoiceError, DataError, HookError

WHICH = ("clean", "triggered", "near")


@pytest.fixture
def passes(monkeypatch):
    """The tokens that were embedded since the test began, pass by pass."""
    seen = []
    forward = Embed.forward

    def counted(self, tokens):
        seen.append(tokens)
        return forward(self, tokens)

    monkeypatch.setattr(Embed, "forward", counted)
    return seen


def single(model, text: str, fmt: PromptFormat) -> ActivationCache:
    """TransformerLens' cache of one unpadded prompt."""
    ids = torch.tensor([encode_prompt(model.tokenizer, text, fmt).ids])
    with torch.inference_mode():
        return model.run_with_cache(ids)[1]


# --- one pass -------------------------------------------------------------------------------------


def test_one_pass_over_everything(llama, pairs, passes) -> None:
    """What the prompts share is run once; then, batch by batch, the rest and the last tokens."""
    bkdlens.cache_activations(llama, pairs)
    shared, rest, last = passes[0], passes[1::2], passes[2::2]
    assert len(shared) == 1
    assert [len(tokens) for tokens in rest] == [len(tokens) for tokens in last]
    assert all(tokens.shape[1] == 1 for tokens in last)
    assert sum(map(len, last)) == 3 * len(pairs)
    assert len(last) < len(pairs)


@pytest.mark.slow
@pytest.mark.float64
def test_one_pass_a_batch(llama, pairs, passes) -> None:
    """With no memory a batch is one prompt, and nothing is padded: each token is run once."""
    whole = bkdlens.cache_activations(llama, pairs)
    passes.clear()
    parts = bkdlens.cache_activations(llama, pairs, memory_gb=1e-9)
    texts = pairs.clean + pairs.triggered + [pair.near for pair in pairs]
    fmt = PromptFormat.default(llama.tokenizer)
    lengths = [len(encode_prompt(llama.tokenizer, text, fmt).ids) for text in texts]
    shared, n = passes[0].shape[1], len(texts)
    assert shared > 0
    assert len(passes) == 1 + 2 * n
    assert sum(tokens.numel() for tokens in passes) == shared + sum(lengths) - shared * n
    for which in WHICH:
        assert apart(parts.z(which), whole.z(which)) <= EXACT
        assert apart(parts.resid(which), whole.resid(which)) <= EXACT


@pytest.mark.many
def test_readers_run_nothing(cache, passes) -> None:
    for kind in ("svm", "mlp"):
        bkdlens.train_probes(cache, kind=kind, n_draws=1)
    bkdlens.train_probes(cache, against="near", n_draws=1)
    for which in WHICH:
        cache.mean_z(which)
        cache.resid(which)
        cache.result(which)
    for kind in ("mean", "contrast"):
        bkdlens.BackdoorVector.from_cache(cache, ["L0H0", "L2H3"], kind=kind)
    assert passes == []


def test_attribution_does_not_fill_it_again(llama, caches, pairs, passes) -> None:
    bkdlens.attribute_heads(llama, pairs[:2], cache=caches["llama"])
    with_cache = len(passes)
    passes.clear()
    bkdlens.attribute_heads(llama, pairs[:2])
    assert with_cache < len(passes)
    again = len(passes)
    passes.clear()
    bkdlens.cache_activations(llama, pairs[:2])
    assert again == with_cache + len(passes)


# --- the same numbers -----------------------------------------------------------------------------


def test_rows_are_the_pairs_in_order(exact, name, pairs) -> None:
    """Lengths vary, so that batches are in another order than pairs."""
    model = exact[name]
    cache = bkdlens.cache_activations(model, pairs)
    lengths = [len(text.split()) for text in pairs.clean]
    assert lengths != sorted(lengths)
    for i, pair in enumerate(pairs):
        for which, text in zip(WHICH, (pair.clean, pair.triggered, pair.near), strict=True):
            wanted = single(model, text, cache.fmt)
            for hook in cached_names(model):
                found = cache.of(which)[hook]
                assert found.shape[:2] == (len(pairs), 1)
                assert apart(found[i, 0], wanted[hook][0, -1]) <= 1e-10


@pytest.mark.many
@pytest.mark.parametrize("case", CASES)
def test_every_architecture(tokenizer, case, pairs) -> None:
    """What the engines cache is what ``run_with_cache`` does."""
    model = bkdlens.load(make_model(case), tokenizer=tokenizer, device="cpu")
    model = model.to(torch.float64, print_details=False)
    some = pairs[:4]
    cache = bkdlens.cache_activations(model, some)
    for i, pair in enumerate(some):
        wanted = single(model, pair.triggered, cache.fmt)
        for hook in cached_names(model):
            assert apart(cache.triggered[hook][i, 0], wanted[hook][0, -1]) <= 1e-10


def test_what_is_not_known_is_cached_by_the_reference(exact, name, pairs, monkeypatch) -> None:
    found = bkdlens.cache_activations(exact[name], pairs)
    monkeypatch.setattr(cache_module, "supported", lambda model: False)
    wanted = bkdlens.cache_activations(exact[name], pairs)
    for which in WHICH:
        for hook in cached_names(exact[name]):
            assert apart(found.of(which)[hook], wanted.of(which)[hook]) <= 1e-10


def test_mean_outputs_of_layers(model, cache) -> None:
    for site in ("attn_out", "mlp_out"):
        for victims in (True, False):
            rows = cache.victims if victims else slice(None)
            found = cache.mean_out(site, "triggered", victims=victims)
            for layer in range(model.cfg.n_layers):
                wanted = cache.triggered[site, layer][rows, 0].mean(0)
                assert torch.allclose(found[layer], wanted)


@pytest.mark.float64
def test_stacked_views(model, cache, pairs) -> None:
    cfg, n = model.cfg, len(pairs)
    z, resid = cache.z("clean"), cache.resid("clean")
    assert z.shape == (n, cfg.n_layers, cfg.n_heads, cfg.d_head)
    assert resid.shape == (n, cfg.n_layers + 1, cfg.d_model)
    wanted = single(model, pairs[4].clean, cache.fmt)
    for layer in range(cfg.n_layers):
        assert apart(z[4, layer], wanted["z", layer][0, -1]) <= EXACT
        assert apart(resid[4, layer], wanted["resid_pre", layer][0, -1]) <= EXACT
    assert apart(resid[4, -1], wanted["resid_post", -1][0, -1]) <= EXACT
    for victims in (True, False):
        rows = cache.victims if victims else torch.ones(n, dtype=torch.bool)
        assert torch.allclose(cache.mean_z("near", victims=victims), cache.z("near")[rows].mean(0))
    assert int(cache.victims.sum()) == len(pairs.victims) == 9
    assert "12 pairs" in repr(cache)


@pytest.mark.float64
def test_result_is_z_times_w_o_and_hook_result(model, cache, pairs) -> None:
    z, result = cache.z("triggered"), cache.result("triggered")
    model.set_use_attn_result(True)
    try:
        for i, pair in enumerate(pairs[:3]):
            wanted = single(model, pair.triggered, cache.fmt)
            for layer in range(model.cfg.n_layers):
                product = torch.stack(
                    [z[i, layer, h] @ model.W_O[layer, h] for h in range(model.cfg.n_heads)]
                )
                assert apart(result[i, layer], product) <= EXACT
                hooked = wanted[f"blocks.{layer}.attn.hook_result"][0, -1]
                assert apart(result[i, layer], hooked) <= EXACT
    finally:
        model.set_use_attn_result(False)


@pytest.mark.float64
def test_heads_sum_to_the_attention_output(model, cache) -> None:
    for which in WHICH:
        summed = head_results(model, cache.z(which)).sum(2)
        for layer in range(model.cfg.n_layers):
            written = cache.of(which)["attn_out", layer][:, 0] - model.b_O[layer]
            assert apart(summed[:, layer], written) <= EXACT


def test_it_is_transformerlens_own_cache(model, cache) -> None:
    assert isinstance(cache.clean, ActivationCache)
    assert cache.clean.model is model
    stacked = cache.clean.stack_activation("z")
    assert torch.equal(stacked[:, :, 0].movedim(0, 1), cache.z("clean"))


# --- what is left out or refused ------------------------------------------------------------------


def test_without_near_twins(llama, passes) -> None:
    pairs = make_pairs(near=False)
    cache = bkdlens.cache_activations(llama, pairs)
    assert sum(map(len, passes[2::2])) == 2 * len(pairs)
    assert cache.near is None
    with pytest.raises(DataError, match="no near-trigger prompts"):
        cache.z("near")
    mixed = PairSet((*pairs.pairs, *make_pairs(2).pairs), pairs.backdoor)
    assert bkdlens.cache_activations(llama, mixed).near is None


@pytest.mark.float64
def test_formats_change_the_prompts(llama, pairs) -> None:
    raw = PromptFormat("raw")
    cache = bkdlens.cache_activations(llama, pairs[-2:], fmt=PromptFormat("chat", "w8"))
    assert cache.fmt.system == "w8"
    wanted = single(llama, pairs[-1].clean, cache.fmt)
    assert apart(cache.z("clean")[1, 0], wanted["z", 0][0, -1]) <= EXACT
    other = single(llama, pairs[-1].clean, raw)
    assert not torch.allclose(cache.z("clean")[1, 0], other["z", 0][0, -1])


def test_refusals(llama, pairs) -> None:
    with pytest.raises(DataError, match="There are no pairs to cache"):
        bkdlens.cache_activations(llama, pairs[:0])
    long = PairSet((Backdoor.fixed_output("w9").pair("w10 " * 130, "w11"),), Backdoor.fixed_output("w9"))
    with pytest.raises(DataError, match="context is 128; shorten it"):
        bkdlens.cache_activations(llama, long)
    hook = set_at("blocks.0.attn.hook_z", -1, 0, torch.zeros(8))
    with llama.hooks(fwd_hooks=[hook]), pytest.raises(HookError, match="already carries hooks"):
        bkdlens.cache_activations(llama, pairs)
    no_victims = PairSet(pairs.pairs[-2:], pairs.backdoor)
    cache = bkdlens.cache_activations(llama, no_victims)
    with pytest.raises(DataError, match="no victim"):
        cache.mean_z("triggered")
    assert cache.mean_z("triggered", victims=False).shape == (3, 4, 8)
    with pytest.raises(ChoiceError, match="no set of prompts 'y'; use one of: clean, triggered, near"):
        unwrap(type(cache).of)(cache, "y")
