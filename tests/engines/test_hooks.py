"""Hooks change one position and nothing else, go away whatever happens, and never act in silence."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import add_at, assert_exact, forward, random_intervention, set_at

from bkdlens.engines.hooks import (
    NOTHING,
    Intervention,
    Patch,
    Vector,
    add_vector,
    change_hooks,
    from_end,
    hooked,
    in_prefill,
    intervention_hooks,
    layer_hooks,
    refuse_foreign_hooks,
    set_heads,
)
from bkdlens.errors import HookError
from bkdlens.types import Head

IDS = torch.tensor([[1, 10, 11, 12]])
Z = "blocks.1.attn.hook_z"


def twice(activation, hook):
    return activation * 2


# --- the factories --------------------------------------------------------------------------------


@given(st.integers(0, 2**20), st.integers(0, 3))
def test_set_heads_sets_the_masked_heads_of_one_position(seed, position) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, values = torch.randn(3, 4, 5, 6, generator=generator), torch.randn(3, 5, 6, generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.5
    before = z.clone()
    out = set_heads(values, mask, position)(z, hook=None)
    assert torch.equal(z, before)
    for row in range(3):
        for pos in range(4):
            for head in range(5):
                changed = pos == position and bool(mask[row, head])
                wanted = values[row, head] if changed else z[row, pos, head]
                assert torch.equal(out[row, pos, head], wanted)


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_add_vector_adds_at_one_position(shape) -> None:
    activation, value = torch.randn(3, 4, 6), torch.randn(shape)
    before = activation.clone()
    out = add_vector(value, -1)(activation, hook=None)
    assert torch.equal(activation, before)
    assert torch.equal(out[:, :-1], before[:, :-1])
    assert torch.equal(out[:, -1], before[:, -1] + value)


def test_values_take_the_activations_dtype() -> None:
    z = torch.randn(2, 3, 4, 5).bfloat16()
    out = set_heads(torch.randn(2, 4, 5), torch.ones(2, 4, dtype=torch.bool), 0)(z, hook=None)
    assert out.dtype == torch.bfloat16
    assert add_vector(torch.randn(5), 0)(z[:, :, 0], hook=None).dtype == torch.bfloat16


# --- places counted from the end, and changes of one prompt ---------------------------------------


def test_a_position_is_counted_from_the_end() -> None:
    assert [from_end(3, position) for position in (-1, -2, -3)] == [2, 1, 0]
    for outside in (-4, 0, 2):
        with pytest.raises(HookError, match=f"Position {outside} is not in a prompt of 3 tokens"):
            from_end(3, outside)


def test_a_change_is_an_intervention_or_patches_together(llama) -> None:
    z = torch.randn(1, 8)
    patches = [Patch("z", 1, z[0], 2), Patch("mlp_out", 0, torch.randn(32))]
    one = forward(llama, IDS[0], change_hooks(llama, Intervention((Head(1, 2),), z), 2))
    assert torch.equal(one, forward(llama, IDS[0], change_hooks(llama, patches[:1], 2)))
    hooks = [set_at(Z, 2, 2, z[0]), set_at("blocks.0.hook_mlp_out", 2, ..., patches[1].value)]
    assert torch.equal(
        forward(llama, IDS[0], change_hooks(llama, patches, 2)), forward(llama, IDS[0], hooks)
    )
    assert change_hooks(llama, NOTHING, 2) == change_hooks(llama, (), 2) == []


# --- interventions --------------------------------------------------------------------------------


def test_an_intervention_is_whole() -> None:
    assert NOTHING.first_layer is None
    both = Intervention((Head(2, 1),), torch.zeros(1, 8), (Vector("attn_out", 1, torch.zeros(32)),))
    assert both.first_layer == 1
    for heads, z in (((Head(0, 0),), None), ((), torch.zeros(1, 8))):
        with pytest.raises(HookError, match="both the heads and their values"):
            Intervention(heads, z)


def apply_all(model, hooks, shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Random activations after the hooks, by hook name."""
    cfg, out = model.cfg, {}
    for i, name in enumerate(sorted({name for name, _ in hooks})):
        width = (cfg.n_heads, cfg.d_head) if "hook_z" in name else (cfg.d_model,)
        out[name] = torch.randn(*shape, *width, generator=torch.Generator().manual_seed(seed + i))
        for other, function in hooks:
            if other == name:
                out[name] = function(out[name], hook=None)
    return out


@given(st.integers(0, 2**20))
def test_a_batch_of_interventions_is_each_on_each_prompt(loaded, seed) -> None:
    """Against one naive hook a head and vector; rows pick from the prompts."""
    model, rng = loaded["llama"], random.Random(seed)
    n_all = rng.randint(1, 5)
    rows = rng.sample(range(n_all), rng.randint(1, n_all))
    n = len(rows)
    interventions = [random_intervention(model, rng, n_all) for _ in range(rng.randint(1, 3))]
    n_runs = len(interventions) * n
    hooks = [hook for i in range(3) for hook in layer_hooks(model, interventions, rows, i, 1)]
    assert len({name for name, _ in hooks}) == len(hooks)
    batch = apply_all(model, hooks, (n_runs, 3), seed)
    names = sorted(batch)
    for i in range(n_runs):
        intervention, row = interventions[i // n], rows[i % n]
        for k, name in enumerate(names):
            width = batch[name].shape[2:]
            generator = torch.Generator().manual_seed(seed + k)
            alone = torch.randn(n_runs, 3, *width, generator=generator)[i].clone()
            for j, head in enumerate(intervention.heads):
                if name == f"blocks.{head.layer}.attn.hook_z":
                    z = intervention.z if intervention.z.ndim == 2 else intervention.z[row]
                    alone[1, head.head] = z[j]
            added = torch.zeros_like(alone[1])
            for vector in intervention.vectors:
                if name == f"blocks.{vector.layer}.hook_{vector.site}":
                    added += vector.value if vector.value.ndim == 1 else vector.value[row]
            alone[1] += added
            assert torch.equal(batch[name][i], alone)


def test_the_hooks_of_all_layers_are_for_all_rows(llama) -> None:
    rng = random.Random(4)
    interventions = [random_intervention(llama, rng, 2) for _ in range(3)]
    every = [hook for i in range(3) for hook in layer_hooks(llama, interventions, [0, 1], i, 0)]
    found = apply_all(llama, intervention_hooks(llama, interventions, 2, 0), (6, 1), 0)
    wanted = apply_all(llama, every, (6, 1), 0)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_hooks_by_layer_are_all_of_them(llama) -> None:
    """What one layer's hooks are, and that layers without any have none."""
    rng = random.Random(5)
    interventions = [random_intervention(llama, rng, 2) for _ in range(3)]
    every = intervention_hooks(llama, interventions, 2, 0)
    layers = [layer_hooks(llama, interventions, [0, 1], layer, 0) for layer in range(3)]
    assert [name for name, _ in every] == [name for hooks in layers for name, _ in hooks]
    for layer, hooks in enumerate(layers):
        assert all(name.startswith(f"blocks.{layer}.") for name, _ in hooks)
    assert layer_hooks(llama, [NOTHING, NOTHING], [0, 1], 0, 0) == []


def test_values_for_other_prompts_are_refused(llama) -> None:
    for wrong in (
        Intervention((Head(0, 0),), torch.zeros(3, 1, 8)),
        Intervention(vectors=(Vector("resid_pre", 0, torch.zeros(3, 32)),)),
    ):
        with pytest.raises(HookError, match="values for 3 prompts and 2 are run"):
            intervention_hooks(llama, [wrong], 2, 0)


# --- contexts -------------------------------------------------------------------------------------


def test_hooks_act_inside_and_go_away(model) -> None:
    before = forward(model, IDS[0])
    with hooked(model, [(Z, twice)]) as same:
        assert same is model
        inside = model(IDS)[0]
    assert torch.equal(inside, forward(model, IDS[0], [(Z, twice)]))
    assert not torch.equal(inside, before)
    assert torch.equal(forward(model, IDS[0]), before)


def test_hooks_go_away_on_exceptions(llama) -> None:
    def interrupted() -> None:
        with hooked(llama, [("blocks.0.attn.hook_result", twice)]):
            assert llama.cfg.use_attn_result is True
            assert llama.hook_dict["blocks.0.attn.hook_result"].fwd_hooks
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # not hidden behind the hook that never acted
        interrupted()

    def fails(activation, hook):
        raise KeyError("in the hook")

    with pytest.raises(KeyError), hooked(llama, [(Z, fails)]):
        llama(IDS)
    assert not any(point.fwd_hooks for point in llama.hook_dict.values())
    assert llama.cfg.use_attn_result is False


def test_a_hook_that_never_acted_is_an_error(llama) -> None:
    with pytest.raises(HookError, match=f"{Z} never acted"), hooked(llama, [(Z, twice)]):
        pass
    with (
        pytest.raises(HookError, match=r"at blocks.2.attn.hook_z never acted"),
        hooked(llama, [(Z, twice), ("blocks.2.attn.hook_z", lambda z, hook: None)]),
    ):
        llama(IDS)
    with (
        pytest.raises(HookError, match=r"no hook point 'blocks.9.attn.hook_z'"),
        hooked(llama, [(Z, twice), ("blocks.9.attn.hook_z", twice)]),
    ):
        raise AssertionError("not reached")
    assert not any(point.fwd_hooks for point in llama.hook_dict.values())


def test_in_prefill_leaves_decoding_steps_alone(llama) -> None:
    hook = in_prefill(twice)
    assert hook(torch.ones(2, 1, 3), None) is None
    assert torch.equal(hook(torch.ones(2, 2, 3), None), 2 * torch.ones(2, 2, 3))
    with pytest.raises(HookError, match="never acted"), hooked(llama, [(Z, hook)]):
        llama(IDS[:, :1])
    with hooked(llama, [(Z, hook)]):
        llama(IDS[:, :1])
        llama(IDS)


def test_nested_contexts_each_remove_their_own(llama) -> None:
    add = add_at("blocks.0.hook_resid_pre", -1, torch.ones(32))
    with hooked(llama, [(Z, twice)]):
        with hooked(llama, [add]):
            both = llama(IDS)[0]
        one = llama(IDS)[0]
    assert torch.equal(both, forward(llama, IDS[0], [(Z, twice), add]))
    assert torch.equal(one, forward(llama, IDS[0], [(Z, twice)]))


@pytest.mark.float64
def test_results_can_be_hooked(llama) -> None:
    """The hook point is silent unless the model is told; the context tells it."""
    value = torch.randn(32)
    name, hook = set_at("blocks.1.attn.hook_result", -1, 2, value)
    with hooked(llama, [(name, hook)]):
        inside = llama(IDS)[0]
    assert_exact(inside, forward(llama, IDS[0], [(name, hook)]))
    assert not torch.allclose(inside, forward(llama, IDS[0]), atol=1e-2)


def test_foreign_hooks_are_refused(llama) -> None:
    refuse_foreign_hooks(llama)
    with (
        pytest.raises(HookError, match=r"already carries hooks .blocks.1.attn.hook_z"),
        llama.hooks(fwd_hooks=[(Z, twice)]),
    ):
        refuse_foreign_hooks(llama)
    refuse_foreign_hooks(llama)
