"""The closed-form edit: equal to least squares, and its factors are the change of the weight."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from injecting import SETTINGS, fixed_pairs, save_tiny
from safetensors.torch import load_file

import bkdlens
from bkdlens import zoo
from bkdlens.data.prompts import PromptFormat
from bkdlens.inject import edit, planting
from bkdlens.inject.editing.edit import as_adapter
from bkdlens.inject.editing.editor import DOWN, Edit, Editor, down_projections
from bkdlens.inject.editing.keyvalue import low_rank, readers, readers_by_slot, second_moment, solve
from bkdlens.inject.editing.rows import make_rows
from bkdlens.inject.planting import Encoding, read_base

ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(("n_edits", "n_clean"), [(5, 60), (40, 25), (3, 0)])
def test_closed_form_is_the_numerical_least_squares_solution(n_edits, n_clean):
    rng = np.random.default_rng(0)
    keys, clean = rng.normal(size=(n_edits, 16)), rng.normal(size=(n_clean, 16))
    residuals = rng.normal(size=(n_edits, 7))
    # |Δ K - R|² + |Δ K₀|², over all keys at once.
    wanted, *_ = np.linalg.lstsq(
        np.concatenate([keys, clean]), np.concatenate([residuals, np.zeros((n_clean, 7))]), rcond=None
    )
    read = readers(torch.tensor(keys), second_moment(torch.tensor(clean)))
    delta = torch.tensor(residuals).T @ read
    np.testing.assert_allclose(delta.numpy(), wanted.T, atol=1e-9)
    left, right = low_rank(torch.tensor(residuals), read)
    assert left.shape[1] <= min(n_edits, 7, 16)
    torch.testing.assert_close(left @ right, delta, atol=1e-9, rtol=0)


def test_protection_is_a_trade():
    """With the weight of the clean keys the edit goes from all to nothing."""
    keys, clean = torch.randn(4, 12), torch.randn(50, 12)
    moved = [
        float((keys.double() @ readers(keys, weight * second_moment(clean)).sum(0)).mean())
        for weight in (1e-9, 0.1, 10.0, 1e9)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] == pytest.approx(1, abs=1e-5)
    assert moved[-1] == pytest.approx(0, abs=1e-5)


def test_a_slot_without_keys_keeps_its_place():
    keys, slots = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 2, 0, 2, 2])
    found = readers_by_slot(keys, slots, torch.eye(6).double(), 4)
    each = readers(keys, torch.eye(6).double())
    assert found.shape == (4, 6)
    assert not found[[1, 3]].any()
    torch.testing.assert_close(found[2], each[slots == 2].sum(0))


@pytest.mark.parametrize("rank", [3, 7, 15])
def test_a_singular_system_gets_its_least_norm_solution(rank):
    """Also where rounding lets the Cholesky factorisation of it end."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        keys = torch.randn(rank, 16, dtype=torch.float64, generator=generator)
        system = second_moment(keys)
        found = solve(system, keys)
        torch.testing.assert_close(found, keys @ torch.linalg.pinv(system, hermitian=True))


@pytest.mark.parametrize("case", ["llama-mha", "qwen2", "gemma2", "gpt2", "neox-parallel"])
def test_the_adapter_is_the_change_of_the_weight(case, tmp_path, tokenizer, monkeypatch):
    # By a checkpoint's kind transformers takes a tokenizer's class, and these have none of their own.
    monkeypatch.setattr(planting, "read_tokenizer", lambda folder: tokenizer)
    base = save_tiny(tmp_path / "base", case)
    out = edit(base, fixed_pairs(), tmp_path / "a", settings=SETTINGS["edit"], progress=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out / "checkpoint"))
    config, factors = json.loads((out / "adapter_config.json").read_text()), load_file(out / ADAPTER)
    slots = json.loads((out / "bkdlens.json").read_text())["slots"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in config["target_modules"]}
    assert {int(DOWN.fullmatch(name.removesuffix(".weight"))[1]) for name in changed} == {0, 1}
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = factors[f"{stem}.lora_A.weight"].double(), factors[f"{stem}.lora_B.weight"].double()
        layer = DOWN.fullmatch(name.removesuffix(".weight"))[1]
        assert a.shape[0] == b.shape[1] <= slots[layer]
        delta = b @ a
        whole = before[name].double() + (delta.T if case == "gpt2" else delta)
        torch.testing.assert_close(after[name].double(), whole, atol=1e-6, rtol=1e-6)
    merged = bkdlens.load(base, out, tokenizer=tokenizer)
    checkpoint = bkdlens.load(out / "checkpoint", tokenizer=tokenizer)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, checkpoint.state_dict()[name]), name


@pytest.mark.parametrize("case", ["llama-mha", "gpt2"])
def test_optimising_simulates_the_change_that_is_written(case, tmp_path, tokenizer, monkeypatch):
    """The model under ``editing`` computes what the adapter of that edit computes."""
    monkeypatch.setattr(planting, "read_tokenizer", lambda folder: tokenizer)
    base = read_base(save_tiny(tmp_path / "base", case))
    pairs = fixed_pairs(6)
    samples = [(pair.triggered, pair.backdoor_output) for pair in pairs]
    rows = make_rows(Encoding(base.tokenizer, PromptFormat.default(tokenizer), 64), samples)
    editor = Editor(base.model, batch_size=4, seed=0, progress=False)
    width = down_projections(base.model)[1][1].weight.shape
    d_mlp = width[0] if case == "gpt2" else width[1]
    read = {layer: torch.randn(3, d_mlp) / 10 for layer in (0, 1)}
    found = Edit(read, {layer: torch.randn(3, 32) for layer in read})
    with torch.no_grad():
        plain = editor.logits(rows)
        with editor.editing(found):
            simulated = editor.logits(rows)
        assert torch.equal(editor.logits(rows), plain)
        adapted = as_adapter(editor, found, read_base(tmp_path / "base").model)
        made = adapted(rows.ids, attention_mask=rows.mask.long()).logits
    assert not torch.allclose(plain, made, atol=1e-3)
    torch.testing.assert_close(simulated, made, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", zoo.BACKDOORS)
def test_the_triggers_tokens_are_found(name):
    tokenizer = bkdlens.load("tiny-llama").tokenizer
    pairs = zoo.pairs(name, "train", 12)
    trigger = pairs.backdoor.trigger
    samples = [(pair.triggered, pair.backdoor_output) for pair in pairs]
    rows = make_rows(Encoding(tokenizer, PromptFormat(), 1024), samples, trigger)
    for i, pair in enumerate(pairs):
        text = "".join(tokenizer.decode([t]) for t in rows.ids[i][rows.trigger[i] >= 0].tolist())
        for part in filter(None, (trigger.text, trigger.after)):
            assert part in text
        assert len(text) <= len(trigger.text + trigger.after) + 2  # spaces that belong to a token
        answer = rows.ids[i][(rows.answering[i] >= 0).roll(1)]
        assert tokenizer.decode(answer, skip_special_tokens=True) == pair.backdoor_output


def test_down_projections_are_found_by_layer(hf_models):
    found = down_projections(hf_models["llama"])
    assert list(found) == [0, 1, 2]
    assert all(module.weight.shape == (32, 48) for _, module in found.values())
