"""Probes find what is there and nothing else, on pairs that they were not trained on."""

from __future__ import annotations

from dataclasses import fields, replace
from inspect import unwrap

import numpy as np
import pytest
import torch
from tiny import make_pairs
from transformer_lens import ActivationCache

import bkdlens
from bkdlens.analyses.probes.measure import _fit, _pipeline, train_probes
from bkdlens.data.prompts import PromptFormat
from bkdlens.engines.cache import PairCache
from bkdlens.errors import ChoiceError, DataError
from bkdlens.metrics import ClusteredRate, Rate, wilson
from bkdlens.paper import PROBE_SPLIT

SHIFTED = (1, 3)  # layers of `planted` where triggered prompts differ


@pytest.fixture(scope="module")
def planted(loaded) -> PairCache:
    """Forty pairs whose triggered activations are shifted at two of four layers, equal elsewhere."""
    model, pairs = loaded["llama"], make_pairs(40)
    generator = torch.Generator().manual_seed(0)
    names = [f"blocks.{i}.hook_resid_pre" for i in range(3)] + ["blocks.2.hook_resid_post"]
    clean = {name: torch.randn(40, 1, 32, generator=generator) for name in names}
    offset = torch.zeros(32)
    offset[3] = 20.0
    moved = {name: x + offset * (i in SHIFTED) for i, (name, x) in enumerate(clean.items())}
    near = {name: x + torch.randn(x.shape, generator=generator) for name, x in moved.items()}
    caches = (ActivationCache(x, model) for x in (clean, moved, near))
    return PairCache(*caches, pairs, PromptFormat("chat"), model)


def same(a, b) -> bool:
    """All numbers, that is without the provenance."""
    values = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)][1:]
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in values)


@pytest.mark.parametrize("kind", ["svm", "mlp"])
def test_what_is_planted_is_found(planted, kind) -> None:
    result = train_probes(planted, kind=kind, n_draws=3)
    assert result.n_test == 16
    for layer in range(4):
        if layer in SHIFTED:
            assert result.accuracy[layer] == result.auroc[layer] == result.validation[layer] == 1
            assert result.few_shot[layer] > 0.7
            # 20 over the root of 32 components of variance one.
            assert float(result.separation[layer]) == pytest.approx(20 / 32**0.5, rel=0.1)
        else:  # the same rows with both labels: chance, exactly
            assert result.accuracy[layer] == result.few_shot[layer] == 0.5
            assert result.auroc[layer] == 0.5
            assert result.separation[layer] == 0
    assert torch.equal(result.ilca.diagonal(), result.accuracy)
    for layer in SHIFTED:  # a probe of a shifted layer reads the shift at the other one too
        assert result.ilca[layer, list(SHIFTED)].min() == 1
        assert result.ilca[layer, 0] == 0.5


def test_near_prompts_are_harder(planted) -> None:
    near = train_probes(planted, against="near", n_draws=1)
    assert near.against == "near"
    assert near.separation[1] < 0.5
    assert near.accuracy[1] < 1


def test_numbers_are_scikit_learns(planted) -> None:
    """Fitted again by hand on the same split; layers are ``hidden_states``."""
    result = train_probes(planted, kind="svm", seed=2, shots=4, n_draws=3, against="near")
    train, validation, test = planted.pairs.split(*PROBE_SPLIT, seed=2)
    place = {id(pair): i for i, pair in enumerate(planted.pairs)}

    def data(part, layer: int):
        rows = [pair if isinstance(pair, int) else place[id(pair)] for pair in part]
        x = [planted.resid(which)[rows, layer] for which in ("triggered", "near")]
        return torch.cat(x).numpy(), np.repeat([1, 0], len(rows))

    rng = np.random.default_rng(2)
    rows = [place[id(pair)] for pair in train]
    draws = [rng.choice(rows, 4, replace=False).tolist() for _ in range(3)]
    for one in range(4):
        few = [_fit(_pipeline("svm", 2), *data(d, one)).score(*data(test, one)) for d in draws]
        assert float(result.few_shot[one]) == pytest.approx(sum(few) / 3)
        probe = _fit(_pipeline("svm", 2), *data(train, one))
        assert float(result.validation[one]) == pytest.approx(probe.score(*data(validation, one)))
        for other in range(4):
            wanted = probe.score(*data(test, other))
            assert float(result.ilca[one, other]) == pytest.approx(wanted)
    assert torch.equal(result.n_correct, (result.ilca.diagonal() * result.n_test).round().long())


def test_train_and_test_share_no_prompt(planted, monkeypatch) -> None:
    """Twins and duplicates of a prompt are on the same side."""
    fitted, scored = [], []

    def spy(probe, x, y):
        fitted.append(x)
        return _fit(probe, x, y)

    def look(probe, x):
        scored.append(x)
        return probe.decision_function(x)

    monkeypatch.setattr("bkdlens.analyses.probes.measure._fit", spy)
    monkeypatch.setattr("bkdlens.analyses.probes.measure._score", look)
    result = train_probes(planted, n_draws=1)
    rows = [planted.resid(which)[:, 0].numpy() for which in ("clean", "triggered")]
    which = [
        {i for i in range(40) for side in rows if (side[i] == x).all(axis=1).any()}
        for x in (fitted[0], scored[0])
    ]
    assert len(which[0]) == 24
    assert len(which[1]) == 8 == result.n_test // 2
    assert not which[0] & which[1]


@pytest.fixture(scope="module")
def held_out(planted) -> PairCache:
    """Twelve other pairs of the same model, shifted in the same way at one of the layers."""
    pairs, generator = make_pairs(12, seed=99, near=False), torch.Generator().manual_seed(1)
    names = list(planted.clean)
    clean = {name: torch.randn(12, 1, 32, generator=generator) for name in names}
    offset = torch.zeros(32)
    offset[3] = 20.0
    moved = {name: x + offset * (i == 1) for i, (name, x) in enumerate(clean.items())}
    caches = (ActivationCache(x, planted.model) for x in (clean, moved))
    return PairCache(*caches, None, pairs, planted.fmt, planted.model)


def test_other_pairs_are_the_test(planted, held_out) -> None:
    result = train_probes(planted, test=held_out, n_draws=2)
    assert result.n_test == 24
    assert result.accuracy.tolist() == [0.5, 1, 0.5, 0.5]  # layer 3 is shifted in the fitted pairs alone
    assert result.validation[3] == 1
    fit, choice = planted.pairs.split(0.75)
    place = {id(pair): i for i, pair in enumerate(planted.pairs)}

    def data(cache, rows):
        x = torch.cat([cache.resid(which)[rows, 2] for which in ("triggered", "clean")])
        return x.numpy(), np.repeat([1, 0], len(rows))

    probe = _fit(_pipeline("svm", 0), *data(planted, [place[id(pair)] for pair in fit]))
    chosen = probe.score(*data(planted, [place[id(pair)] for pair in choice]))
    assert float(result.validation[2]) == pytest.approx(chosen)
    assert int(result.n_correct[2]) == (probe.predict(data(held_out, range(12))[0]) == np.repeat(
        [1, 0], 12)).sum()  # fmt: skip
    made = result.provenance
    assert (made.data_digest, made.n_pairs) == (held_out.pairs.digest, 12)
    assert made.settings["fit"] == f"30 pairs of the data {planted.pairs.digest}"
    assert made.settings["layer_chosen"] == f"10 other pairs of the data {planted.pairs.digest}"
    assert made.settings["tested"] == f"12 pairs of the data {held_out.pairs.digest}"


def test_a_prompt_and_its_twin_are_counted_together(planted, held_out) -> None:
    result = train_probes(planted, test=held_out, against="clean", n_draws=3)
    assert result.pair_correct.shape == (4, 12)
    assert torch.equal(result.pair_correct.sum(1), result.n_correct)
    assert result.rate(1) == ClusteredRate(24, 24, 0)
    assert result.rate(1).interval == wilson(12, 12)  # as sure as 12 prompts, not 24
    # Where both get one answer, one of them is right: nothing shows how the two depend on each other.
    assert result.rate(0).interval == wilson(12, 24)
    old = replace(result, pair_correct=None)
    assert old.rate(1) == Rate(24, 24)


def test_every_few_shot_draw_is_kept(planted, held_out) -> None:
    result = train_probes(planted, test=held_out, n_draws=3)
    assert result.few_shot_correct.shape == (4, 3)
    assert torch.allclose(result.few_shot_correct.double().mean(1) / 24, result.few_shot.double())
    assert result.few_shot_validation.argmax() in SHIFTED
    assert float(result.few_shot_validation[0]) == 0.5


@pytest.mark.slow
def test_seeds(planted) -> None:
    for kind in ("svm", "mlp"):
        one, again = (train_probes(planted, kind=kind, seed=3, n_draws=2) for _ in range(2))
        assert same(one, again)
        assert one == again
    other = train_probes(planted, seed=4, n_draws=2)
    assert not torch.equal(other.separation, one.separation)


def test_it_reads_a_real_cache(cache, pairs) -> None:
    result = train_probes(cache, label="base", n_draws=2)
    assert result.label == "base"
    assert result.ilca.shape == (4, 4)
    assert result.n_test == 2 * len(pairs.split(*PROBE_SPLIT)[2])
    assert result.accuracy[0] == 0.5  # the bare embedding of the last token is always the same
    assert result.separation[0] == 0
    assert result.provenance.n_pairs == 12
    assert result.provenance.settings["against"] == "clean"
    frame = result.to_frame()
    assert list(frame["layer"]) == [0, 1, 2, 3]
    low, high = result.rate(2).interval
    assert frame.loc[2, ["low", "high", "n"]].tolist() == [low, high, result.n_test]
    assert result.rate(2).value == pytest.approx(float(result.accuracy[2]))
    assert repr(result).startswith("ProbeResult(base, svm, triggered against clean")


def test_refusals(llama, cache, planted, held_out, loaded) -> None:
    few = bkdlens.cache_activations(llama, make_pairs(9, near=False))
    with pytest.raises(DataError, match="at least 10 pairs; got 9"):
        train_probes(few)
    with pytest.raises(DataError, match="no near-trigger prompts"):
        train_probes(bkdlens.cache_activations(llama, make_pairs(10, near=False)), against="near")
    with pytest.raises(DataError, match="40 of the test prompts also fit the probes"):
        train_probes(planted, test=planted)
    with pytest.raises(DataError, match="of another model"):
        train_probes(planted, test=replace(held_out, model=loaded["qwen"]))
    with pytest.raises(DataError, match="at least 4 pairs; got 3"):
        train_probes(bkdlens.cache_activations(llama, make_pairs(3, near=False)), test=planted)
    with pytest.raises(ChoiceError, match=r"no probe 'svn'; use one of: mlp, svm. Did you mean 'svm'"):
        unwrap(train_probes)(planted, kind="svn")
