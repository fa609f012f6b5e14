"""The vector is the heads' mean output; it is added once, at the last prompt token."""

from __future__ import annotations

from inspect import unwrap
from itertools import combinations

import pytest
import torch
from tiny import EXACT, add_at, apart, encoded, forward, judge

import bkdlens
from bkdlens.analyses.steering import measure as steering
from bkdlens.analyses.steering.measure import sweep_layers
from bkdlens.analyses.steering.vector import BackdoorVector, steer
from bkdlens.engines.generate import generate
from bkdlens.engines.hooks import hooked
from bkdlens.errors import ChoiceError, DataError, HeadError, HookError
from bkdlens.types import Head

CUT = 6
HEADS = ["L0H1", "L2H3", "L1H0"]
IDS = torch.tensor([[1, 4, 10, 11, 12, 5], [1, 4, 20, 21, 22, 5]])


def vector_of(direction: torch.Tensor, cache, site: str = "resid_pre") -> BackdoorVector:
    """One with a given direction."""
    made = BackdoorVector.from_cache(cache, "L0H0", site=site)
    return BackdoorVector(
        provenance=made.provenance, direction=direction, heads=made.heads, site=site, kind="mean"
    )


# --- the vector -----------------------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize("kind", ["mean", "contrast"])
def test_it_is_the_sum_of_the_heads_mean_outputs(model, cache, pairs, kind) -> None:
    vector = BackdoorVector.from_cache(cache, HEADS, kind=kind)
    rows = [i for i, pair in enumerate(pairs) if pair.clean_output != pair.backdoor_output]
    wanted = torch.zeros(32)
    for head in vector.heads:
        for i in rows:
            z = cache.z("triggered")[i][head]
            if kind == "contrast":
                z = z - cache.z("clean")[i][head]
            wanted += z @ model.W_O[head] / len(rows)
    assert apart(vector.direction, wanted) <= EXACT
    assert vector.heads == (Head(0, 1), Head(2, 3), Head(1, 0))
    assert (vector.kind, vector.site) == (kind, "resid_pre")
    assert vector.norm == pytest.approx(float(wanted.norm()), rel=EXACT)


@pytest.mark.float64
def test_heads_add_up(cache) -> None:
    parts = [BackdoorVector.from_cache(cache, head).direction for head in HEADS]
    whole = BackdoorVector.from_cache(cache, HEADS).direction
    assert apart(whole, sum(parts)) <= EXACT


@pytest.mark.float64
def test_all_heads_are_the_attention_output(model, cache) -> None:
    """The heads of one layer together write the layer's output, bias aside."""
    heads = [(1, h) for h in range(4)]
    vector = BackdoorVector.from_cache(cache, heads, kind="contrast", site="attn_out")
    out = [cache.of(which)["attn_out", 1][cache.victims, 0].mean(0) for which in ("triggered", "clean")]
    assert apart(vector.direction, out[0] - out[1]) <= EXACT
    assert vector.site == "attn_out"


def test_what_a_vector_says(cache) -> None:
    vector = BackdoorVector.from_cache(cache, [(i, j) for i in range(3) for j in range(2)])
    assert vector.direction.dtype == torch.float32
    assert repr(vector).startswith("BackdoorVector(mean of L0H0, L0H1, L1H0, L1H1, …; norm ")
    frame = vector.to_frame()
    assert frame["value"].tolist() == vector.direction.tolist()


def test_wrong_vectors(cache) -> None:
    for options, match in (
        ({"kind": "median"}, "no vector kind 'median'; use one of: mean, contrast"),
        ({"site": "resid"}, "no vector site 'resid'.*Did you mean 'resid_pre'"),
    ):
        with pytest.raises(ChoiceError, match=match):
            unwrap(BackdoorVector.from_cache.__func__)(BackdoorVector, cache, "L0H0", **options)
    with pytest.raises(HeadError, match="Head L0H4 does not exist"):
        BackdoorVector.from_cache(cache, "L0H4")


# --- the context ----------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.float64
@pytest.mark.parametrize("site", ["resid_pre", "attn_out"])
@pytest.mark.parametrize("coefficient", [1.0, -2.5])
def test_it_adds_the_vector_at_the_last_token_alone(model, cache, site, coefficient) -> None:
    direction = torch.randn(32)
    for layer in range(3):
        _, before = model.run_with_cache(IDS)
        with steer(model, direction, layer, coefficient, site=site) as same:
            assert same is model
            _, after = model.run_with_cache(IDS)
        name = f"blocks.{layer}.hook_{site}"
        added = after[name] - before[name]
        assert apart(added[:, -1], (coefficient * direction).expand(2, -1)) <= EXACT
        assert not added[:, :-1].any()
        for earlier in range(layer):
            assert torch.equal(after["resid_pre", earlier], before["resid_pre", earlier])
    assert torch.equal(model(IDS), model(IDS))


def test_a_vector_brings_its_own_site(llama, caches) -> None:
    vector = BackdoorVector.from_cache(caches["llama"], "L1H1", site="attn_out")
    wanted = forward(llama, IDS[0], [add_at("blocks.1.hook_attn_out", -1, 2 * vector.direction)])
    with steer(llama, vector, 1, 2.0):
        assert torch.equal(llama(IDS[:1])[0], wanted)
    other = forward(llama, IDS[0], [add_at("blocks.1.hook_resid_pre", -1, 2 * vector.direction)])
    with steer(llama, vector, 1, 2.0, site="resid_pre"):
        assert torch.equal(llama(IDS[:1])[0], other)


@pytest.mark.float64
def test_opposite_coefficients_cancel(llama) -> None:
    direction = torch.randn(32)
    before = llama(IDS)
    with steer(llama, direction, 1, 3.0), steer(llama, direction, 1, -3.0):
        assert apart(llama(IDS), before) <= EXACT


def test_decoding_steps_are_left_alone(llama) -> None:
    with pytest.raises(HookError, match="never acted"), steer(llama, torch.randn(32), 0):
        llama(IDS[:, :1])


def test_wrong_layers_and_sites(llama) -> None:
    for layer in (3, -1):
        with (
            pytest.raises(HeadError, match=f"Layer {layer} does not exist.*layers 0 to 2"),
            steer(llama, torch.randn(32), layer),
        ):
            raise AssertionError("not reached")
    with pytest.raises(ChoiceError, match="no vector site 'mlp_out'"):
        next(unwrap(steer)(llama, torch.randn(32), 0, site="mlp_out"))


# --- the sweep ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.float64
@pytest.mark.parametrize("behaviour", ["fixed_output", "jailbreak"])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out"])
def test_counts_are_those_of_steer_and_generate(model, name, judged, cache, behaviour, site) -> None:
    pairs = judged[name, behaviour]
    vector = vector_of(2 * torch.randn(32), cache, site)
    coefficients = (1.0, -1.0, 0.1, -2.0)
    result = sweep_layers(
        model, pairs, vector, coefficients=coefficients, n_random=0, max_new_tokens=CUT
    )
    victims = pairs.victims

    def judged_texts(part, on: str) -> tuple[int, int]:
        said = generate(model, [getattr(pair, on) for pair in part], max_new_tokens=CUT)
        attack = correct = 0
        for text, pair in zip(said, part, strict=True):
            right, wrong = (" ".join(a.split()[:CUT]) for a in (pair.clean_output, pair.backdoor_output))
            attack += text == wrong if pairs.backdoor.behaviour == "fixed_output" else text != ""
            correct += text == right
        return attack, correct

    assert result.base_attack == tuple(judged_texts(victims, on)[0] for on in ("clean", "triggered"))
    assert result.base_clean == judged_texts(pairs, "clean")[1]
    for c, coefficient in enumerate(coefficients):
        for layer in range(3):
            with steer(model, vector, layer, coefficient):
                side = judged_texts(victims, "clean" if coefficient > 0 else "triggered")
                clean = judged_texts(pairs, "clean")[1]
            assert (int(result.attack[c, layer]), int(result.correct[c, layer])) == side
            assert int(result.clean[c, layer]) == clean
    assert result.random_heads.shape == result.random_vectors.shape == (4, 3, 0)


@pytest.mark.slow
@pytest.mark.float64
def test_counts_are_those_of_naive_decoding(model, name, judged, cache) -> None:
    pairs = judged[name, "fixed_output"]
    vector = vector_of(torch.randn(32), cache)
    result = sweep_layers(
        model, pairs, vector, layers=[2, 0], coefficients=(-1.5,), n_random=0, max_new_tokens=CUT
    )
    assert result.layers == (2, 0)
    for i, layer in enumerate((2, 0)):

        def hooks_of(row, position, layer=layer):
            return [add_at(f"blocks.{layer}.hook_resid_pre", position, -1.5 * vector.direction)]

        attack, correct = judge(model, pairs.victims, "triggered", hooks_of, CUT)
        assert int(result.attack[0, i]) == sum(attack)
        assert int(result.correct[0, i]) == sum(correct)


@pytest.mark.slow
def test_controls(loaded, judged, caches) -> None:
    model, pairs, cache = loaded["llama"], judged["llama", "jailbreak"][:6], caches["llama"]
    vector = BackdoorVector.from_cache(cache, HEADS, kind="contrast")
    options = {"cache": cache, "coefficients": (2.0, -2.0), "n_random": 3, "max_new_tokens": CUT}
    result = sweep_layers(model, pairs, vector, seed=5, **options)
    assert result.random_heads.shape == result.random_vectors.shape == (2, 3, 3)
    assert result == sweep_layers(model, pairs, vector, seed=5, **options)
    other = sweep_layers(model, pairs, vector, seed=6, **options)
    assert torch.equal(other.attack, result.attack)
    assert not torch.equal(
        torch.cat([other.random_heads, other.random_vectors]),
        torch.cat([result.random_heads, result.random_vectors]),
    )
    bare = sweep_layers(model, pairs, vector, **options | {"cache": None})
    assert bare.random_heads.shape == (2, 3, 0)
    assert bare.random_vectors.shape == (2, 3, 3)


@pytest.mark.slow
@pytest.mark.float64
def test_a_draw_is_counted_in_its_own_place(model, name, judged, cache, monkeypatch) -> None:
    """The vector itself as the control, beside one that does nothing."""
    pairs = judged[name, "jailbreak"][:6]
    vector = vector_of(4 * torch.randn(32), cache)
    nothing = torch.zeros(32)
    monkeypatch.setattr(steering, "_random_heads", lambda *_: [vector.direction, nothing])
    monkeypatch.setattr(steering, "_random_vectors", lambda *_: [nothing, vector.direction])
    result = sweep_layers(
        model, pairs, vector, cache=cache, coefficients=(1.0, -1.0), n_random=2, max_new_tokens=CUT
    )
    base = torch.tensor(result.base_attack)[:, None].expand(2, 3)
    assert torch.equal(result.random_heads[..., 0], result.attack)
    assert torch.equal(result.random_heads[..., 1], base)
    assert torch.equal(result.random_vectors[..., 0], base)
    assert torch.equal(result.random_vectors[..., 1], result.attack)
    assert not torch.equal(result.attack, base)


@pytest.mark.float64
def test_random_vectors_have_the_same_norm_and_random_heads_are_others(cache) -> None:
    vector = BackdoorVector.from_cache(cache, HEADS)
    for noise in steering._random_vectors(vector, 5, 0):
        assert float(noise.norm()) == pytest.approx(vector.norm, rel=EXACT)
    others = [Head(i, j) for i in range(3) for j in range(4) if Head(i, j) not in vector.heads]
    parts = {head: BackdoorVector.from_cache(cache, head).direction for head in others}
    for direction in steering._random_heads(cache, vector, 5, 0):
        sums = [sum(parts[head] for head in three) for three in combinations(others, 3)]
        assert sum(apart(direction, found) <= EXACT for found in sums) == 1


@pytest.mark.slow
def test_what_a_result_says(loaded, judged, caches) -> None:
    model, pairs = loaded["llama"], judged["llama", "jailbreak"]
    vector = BackdoorVector.from_cache(caches["llama"], HEADS)
    result = sweep_layers(
        model, pairs, vector, cache=caches["llama"], coefficients=(1.0, -1.0), n_random=2,
        max_new_tokens=CUT,
    )  # fmt: skip
    n = result.n_victims
    for c, sign in ((0, 1), (1, -1)):
        moved = sign * (result.attack[c].double() - result.base_attack[c]) / n
        assert torch.allclose(result.shift[c].double(), moved, atol=1e-6)
        noise = sign * (result.random_vectors[c].double() - result.base_attack[c]) / n
        assert torch.allclose(result.random_shift("vectors")[c].double(), noise, atol=1e-6)
    weaker = torch.minimum(result.shift[0], result.shift[1])
    assert result.best_layer(1.0) == 1 + int(weaker[1:].argmax())  # not the bare embedding
    assert result.rate("attack", 2, -1.0).successes == int(result.attack[1, 2])
    assert result.rate("clean", 2, -1.0).n == len(pairs)
    frame = result.to_frame()
    assert frame["on"].tolist() == ["clean"] * 3 + ["triggered"] * 3
    assert frame["without"].tolist() == pytest.approx(
        [result.base_attack[c] / n for c in (0, 0, 0, 1, 1, 1)]
    )
    assert frame["random_vectors"][4] == pytest.approx(
        float(result.random_vectors[1, 1].double().mean()) / n
    )
    assert "SteeringResult(mean of 3 heads at resid_pre, layers 0–2" in repr(result)


def test_refusals(llama, judged, caches) -> None:
    pairs, cache = judged["llama", "fixed_output"], caches["llama"]
    vector = BackdoorVector.from_cache(cache, HEADS)
    with pytest.raises(HeadError, match="Layer 7 does not exist"):
        sweep_layers(llama, pairs, vector, layers=[0, 7])
    with pytest.raises(HeadError, match="A coefficient of 0 does nothing"):
        sweep_layers(llama, pairs, vector, coefficients=(1.0, 0.0))
    with pytest.raises(DataError, match="no victim"):
        sweep_layers(llama, pairs[-2:], vector)
    with hooked(llama, [add_at("blocks.0.hook_resid_pre", -1, torch.ones(32))]):
        with pytest.raises(HookError, match="already carries hooks"):
            sweep_layers(llama, pairs, vector)
        llama(torch.tensor([encoded(llama, "w10")]))
    with steer(llama, vector, 1):
        llama(IDS)
        with pytest.raises(HookError, match="already carries hooks"):
            bkdlens.evaluate(llama, pairs)
