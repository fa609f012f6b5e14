"""Adapters of every kind give what peft computes; several give the sum of their changes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CASES,
    VOCAB,
    add_lora,
    edit_json,
    edit_tensors,
    float64,
    make_model,
    make_tokenizer,
    save_base,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import EXACT, apart
from transformers import AutoModelForCausalLM

from bkdlens.errors import CheckpointError
from bkdlens.models.load import load, load_info
from bkdlens.models.merge import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of the reference
NEW = VOCAB + 5


def save_adapter(
    base: Path, folder: Path, case: str, *, size: int = VOCAB, seed: int = 1, **options
) -> Path:
    """A random adapter of the case's base, saved after its vocabulary was resized."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    if size != VOCAB:
        model.resize_token_embeddings(size, mean_resizing=False)
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            new = torch.randn(module.weight[VOCAB:].shape, generator=generator)
            module.weight.data[VOCAB:] = new * 0.3
    tuned = add_lora(model, case, seed, **options)
    for name, weight in tuned.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            weight.data += torch.randn(weight.shape, generator=generator) * 0.3
    tuned.save_pretrained(folder)
    return folder


def saved(tmp_path: Path, case: str, **options) -> tuple[Path, Path]:
    base = save_base(tmp_path, case)
    return base, save_adapter(base, tmp_path / "adapter", case, **options)


@torch.no_grad()
def reference(base: Path, adapter: Path, size: int = VOCAB):
    """peft's own model, not merged; resized first, as its users do."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if size != VOCAB:
        model.resize_token_embeddings(size, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def difference(model, hf, size: int = VOCAB) -> float:
    """Largest logit difference relative to the largest logit, over every token of the vocabulary."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(7))
    tokens = torch.cat([order, order[: -size % 30]]).view(-1, 30)
    return apart(model(tokens), hf(tokens).logits)


def refused(match: str, *args, **options) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(*args, **options)
    assert str(caught.value).endswith((".", "?"))


# --- targets and ranks ----------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"alpha_pattern": {"v_proj": 31, "down_proj": 1}, "use_rslora": True},
        {"target_modules": r".*layers\.1\..*(q|o)_proj"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"r": 40, "lora_alpha": 3},
        {"use_dora": True, "rank_pattern": {"o_proj": 3}},
        {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"modules_to_save": ["lm_head", "embed_tokens", "norm", "layers.0.mlp.up_proj"],
         "target_modules": ["q_proj"]},
        {"trainable_token_indices": [3, 90], "target_modules": ["q_proj"]},
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 7]}},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_targets_and_ranks(tmp_path, options) -> None:
    base, adapter = saved(tmp_path, "llama-gqa", **options)
    with float64():
        model, hf = load(base, adapter), reference(base, adapter)
        assert difference(model, hf) <= EXACT
        assert difference(load(base), hf) > 1e-3
    assert load_info(model).notes == ()


def test_biases(tmp_path) -> None:
    base, adapter = saved(tmp_path, "qwen2", bias="all")
    edit_tensors(
        adapter / "adapter_model.safetensors",
        base_model__model__model__layers__0__self_attn__q_proj__base_layer__bias=None,
    )
    with float64():
        assert difference(load(base, adapter), reference(base, adapter)) <= EXACT


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank_pattern": {"q_proj": 3}}, "does not fit its tensors"),
        ({"target_modules": r".*layers\.7\..*"}, "does not fit its tensors"),
        ({"target_modules": "(("}, "does not fit its tensors"),
        ({"modules_to_save": ["lm_head"]}, "the adapter lacks .*lm_head.*, which its config targets"),
        ({"trainable_token_indices": [1]}, "the adapter lacks .*embed_tokens.*, which its config"),
        ({"trainable_token_indices": [VOCAB]}, "trainable_token_indices=.96. must be lists of ids"),
        ({"trainable_token_indices": "all"}, "must be lists of ids below 96"),
    ],
)
def test_broken_configs(tmp_path, changes, match) -> None:
    base, adapter = saved(tmp_path, "llama-gqa")
    edit_json(adapter / "adapter_config.json", **changes)
    refused(match, base, adapter)


def test_broken_tokens(tmp_path) -> None:
    base, adapter = saved(tmp_path, "llama-gqa", trainable_token_indices=[1, 2])
    name = "base_model__model__model__embed_tokens__token_adapter__trainable_tokens_delta"
    file = adapter / "adapter_model.safetensors"
    edit_tensors(file, **{name: torch.zeros(2, 31)})
    refused("another base: tensor .*trainable_tokens_delta has shape", base, adapter)
    edit_tensors(file, **{name: torch.zeros(3, 32)})
    refused("does not fit its tensors", base, adapter)


def test_sharded_adapters(tmp_path) -> None:
    base, adapter = saved(tmp_path, "llama-gqa")
    whole = load(base, adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    where = {}
    for i in range(3):
        part = dict(list(tensors.items())[i::3])
        where |= dict.fromkeys(part, f"adapter_model-{i}.safetensors")
        save_file(part, adapter / f"adapter_model-{i}.safetensors")
    file.unlink()
    index = adapter / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(load(base, adapter).W_Q, whole.W_Q)
    (adapter / "adapter_model-1.safetensors").unlink()
    refused("lacks adapter_model-1.safetensors, which", base, adapter)


# --- tied embeddings ------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("gpt2", {"target_modules": ["wte", "c_attn"]}),
        ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
        ("gpt2", {"trainable_token_indices": [3, 90]}),
        ("qwen3-mha", {}),
        ("qwen3-mha", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("qwen3-mha", {"target_modules": ["lm_head"]}),
        ("qwen3-mha", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("qwen3-mha", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
        ("qwen3-mha", {"modules_to_save": ["embed_tokens"]}),
        ("qwen3-mha", {"modules_to_save": ["lm_head"]}),
        ("qwen3-mha", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("qwen3-mha", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("qwen3-mha", {"trainable_token_indices": [3, 90]}),
        ("qwen3-mha", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 7]}}),
        ("gemma2", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("gemma2", {"trainable_token_indices": [3, 90]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain",
)
def test_tied_embeddings(tmp_path, case, options) -> None:
    """Exactly what the model that was trained computes: two tensors, where they have come apart."""
    base, adapter = saved(tmp_path, case, **options)
    with float64():
        hf = reference(base, adapter)
        assert hf.get_base_model().config.tie_word_embeddings
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = load(base, adapter)
            live = load(hf, tokenizer=make_tokenizer())
        assert difference(model, hf) <= EXACT
        assert difference(live, hf) <= EXACT
        assert difference(load(base), hf) > 1e-3


def test_a_broken_adapter_of_tied_embeddings(tmp_path) -> None:
    base, adapter = saved(tmp_path, "qwen3-mha", target_modules=["embed_tokens", "q_proj"])
    name = "base_model__model__model__embed_tokens__lora_embedding_A"
    edit_tensors(adapter / "adapter_model.safetensors", **{name: torch.zeros(4, VOCAB - 1)})
    refused("another base: tensor .*lora_embedding_A has shape .4, 95", base, adapter)


# --- resized vocabularies -------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("case", ["llama-gqa", "qwen3-mha", "gpt2"])
@pytest.mark.parametrize("size", [NEW, VOCAB - 6])
@pytest.mark.parametrize("kind", ["saved by peft", "modules_to_save", "LoRA", "tokens"])
def test_resized_vocabularies(tmp_path, case, size, kind) -> None:
    embed = "wte" if case == "gpt2" else "embed_tokens"
    plain = CASES[case][2][:1]
    options = {
        "saved by peft": {"target_modules": plain},
        "modules_to_save": {"target_modules": plain, "modules_to_save": [embed, "lm_head"]},
        "LoRA": {"target_modules": [*plain, embed, "lm_head"]},
        "tokens": {"target_modules": plain, "trainable_token_indices": [3, size - 1]},
    }[kind]
    base, adapter = saved(tmp_path, case, size=size, **options)
    with float64():
        model = load(base, adapter)
        drop_second_copies(adapter)
        assert difference(model, reference(base, adapter, size), size) <= EXACT
    assert model.cfg.d_vocab == size
    assert load_info(model).notes == (f"adapter brings a vocabulary of {size} tokens.",)


def drop_second_copies(adapter: Path) -> None:
    """peft cannot itself read the second copies of a saved module that it writes."""
    file = adapter / "adapter_model.safetensors"
    copies = [key for key in load_file(file) if ".modules_to_save." in key]
    edit_tensors(file, **dict.fromkeys(copies))


@pytest.mark.slow
def test_the_tokenizer_of_a_resized_vocabulary(tmp_path) -> None:
    base, adapter = saved(tmp_path, "llama-gqa", size=NEW)
    assert len(load(base, adapter).tokenizer) == VOCAB
    larger = make_tokenizer()
    larger.add_tokens([f"new{i}" for i in range(5)])
    larger.save_pretrained(adapter)
    assert load(base, adapter).to_tokens("w5 new4").tolist() == [[5, NEW - 1]]
    assert len(load(base, adapter, tokenizer=make_tokenizer()).tokenizer) == VOCAB


def test_resized_vocabularies_without_their_embeddings(tmp_path) -> None:
    base, adapter = saved(tmp_path, "llama-gqa", size=NEW)
    file, good = adapter / "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")
    lm_head = "base_model.model.lm_head.weight"
    save_file({key: w for key, w in good.items() if key != lm_head}, file)
    refused(
        "vocabulary of 101 tokens, the base one of 96, and it does not bring the resized lm_head; re",
        base,
        adapter,
    )
    save_file(good | {lm_head: torch.full((NEW, 32), torch.nan)}, file)
    refused("lm_head.weight holds NaN", base, adapter)
    save_file(good | {lm_head: good[lm_head][:-1]}, file)
    refused("made for another base: tensor .* has shape", base, adapter)
    save_file(good | {"base_model.model.lm_head.modules_to_save.weight": good[lm_head] + 1}, file)
    refused("should be equal", base, adapter)
    # a saved embedding of a tied model leaves the unembedding's new rows unknown
    (tmp_path / "tied").mkdir()
    options = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}
    base, adapter = saved(tmp_path / "tied", "qwen3-mha", size=NEW, **options)
    file = adapter / "adapter_model.safetensors"
    known = ("original_module", "lm_head")
    save_file({k: w for k, w in load_file(file).items() if not any(part in k for part in known)}, file)
    refused("does not bring the resized lm_head", base, adapter)


# --- several adapters -----------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """A base and three adapters of it, of other targets, ranks and scalings."""
    base = save_base(tmp_path, "llama-gqa")
    options = (
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "use_rslora": True},
        {"target_modules": ["v_proj", "lm_head"], "lora_alpha": 9, "alpha_pattern": {"lm_head": 2}},
    )
    names = ("style", "topic", "tail")
    return base, [
        save_adapter(base, tmp_path / name, "llama-gqa", seed=i, **given)
        for i, (name, given) in enumerate(zip(names, options, strict=True))
    ]


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight of its base, by hand."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        name = key.removeprefix("base_model.model.")
        for mark in (".lora_A.weight", ".lora_embedding_A"):
            if name.endswith(mark):
                module = name.removesuffix(mark)
                b = tensors[key.replace("_A", "_B")]
                alpha = config["alpha_pattern"].get(module.split(".")[-1], config["lora_alpha"])
                scale = alpha / (config["r"] ** (0.5 if config["use_rslora"] else 1))
                delta = (b.double() @ a.double()) * scale
                found[f"{module}.weight"] = delta.T if "embedding" in mark else delta
    return found


@pytest.mark.many
@torch.no_grad()
@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0), (0.5, -1.25, 2.0), (0.0, 1.0, 0.0)])
def test_several_adapters_are_the_sum_of_their_changes(three, weights) -> None:
    base, adapters = three
    with float64():
        hf = AutoModelForCausalLM.from_pretrained(base)
        state = dict(hf.state_dict())
        for adapter, weight in zip(adapters, weights or (1, 1, 1), strict=True):
            for name, delta in deltas(adapter).items():
                state[name] = state[name] + weight * delta
        hf.load_state_dict(state)
        model = load(base, adapters, adapter_weights=weights)
        again = load(base, adapters[::-1], adapter_weights=weights and weights[::-1])
        assert difference(model, hf) <= EXACT
        assert difference(again, hf) <= EXACT
    assert apart(model.W_U, state["lm_head.weight"].T) <= EXACT
    assert apart(model.W_E, state["model.embed_tokens.weight"]) <= EXACT


@torch.no_grad()
def test_one_weighted_adapter_and_conv1d(tmp_path) -> None:
    base, adapter = saved(tmp_path, "gpt2")
    with float64():
        plain, full = load(base), load(base, [adapter])
        half = load(base, adapter, adapter_weights=[0.5])
    for name in ("W_Q", "W_in"):
        none, some, whole = (getattr(model, name) for model in (plain, half, full))
        assert apart(some - none, (whole - none) / 2) <= EXACT
    full = load(base, [adapter])
    assert torch.equal(full.W_Q, load(base, adapter).W_Q)
    assert load_info(full) == load_info(load(base, adapter))


def test_info_names_all_adapters(three) -> None:
    base, adapters = three
    info = load_info(load(base, adapters, adapter_weights=[1, 0.5, -1]))
    assert info.adapters == tuple(map(str, adapters))
    assert info.adapter_weights == (1, 0.5, -1)
    assert info.adapter == "style + 0.5 * topic + -1 * tail"
    alone = load_info(load(base, adapters[1]))
    assert (alone.adapter, alone.adapters) == (str(adapters[1]), (str(adapters[1]),))
    digests = {
        load_info(load(base, given, adapter_weights=weights)).adapter_digest
        for given, weights in (
            (adapters[:1], None), (adapters[:1], [2]), (adapters[:2], None), (adapters[:2], [1, 2]),
            (adapters[1::-1], None), (adapters[:2], [2, 1]),
        )
    }  # fmt: skip
    assert len(digests) == 6
    assert load_info(load(base)).adapters == ()


@pytest.mark.slow
def test_zoo_adapters_together() -> None:
    info = load_info(load("tiny-llama", ["jailbreak", "fixed_output"]))
    assert info.adapter == "jailbreak + fixed_output"
    assert info.parity <= TOLERANCE
    with float64():
        assert load_info(load("tiny-llama", ["jailbreak", "fixed_output"])).parity <= EXACT
    refused("Did you mean 'jailbreak'", "tiny-llama", ["fixed_output", "jailbrake"])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}],
    ids=lambda options: next(iter(options)),
)
def test_what_cannot_be_added_comes_first(three, tmp_path, options) -> None:
    base, adapters = three
    fixed = save_adapter(base, tmp_path / "fixed", "llama-gqa", **options)
    with float64():
        hf = reference(base, fixed).merge_and_unload(safe_merge=True)
        hf = PeftModel.from_pretrained(hf, adapters[0]).merge_and_unload(safe_merge=True)
        assert difference(load(base, [fixed, adapters[0]]), hf) <= EXACT
    what = "cannot be scaled or added to another's; give it first and with weight 1"
    refused(what, base, [adapters[0], fixed])
    refused(what, base, [fixed, adapters[0]], adapter_weights=[0.5, 1])
    refused(what, base, fixed, adapter_weights=[2])


def test_broken_lists(three) -> None:
    base, adapters = three
    refused("list of adapters is empty", base, [])
    for weights in ([1], [1, 2, 3], [1, float("nan")], [1, float("inf")]):
        refused("one finite number per adapter", base, adapters[:2], adapter_weights=weights)
    refused("one finite number per adapter; got .1.0. for 0 adapters", base, adapter_weights=[1])
    refused("carries its own adapter", make_model("llama-gqa"), adapter_weights=[1])
    edit_json(adapters[1] / "adapter_config.json", r=2)
    refused("topic.*does not fit its tensors", base, adapters)


# --- quantised bases ------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"base_model_name_or_path": "org/Llama-3-8b-bnb-4bit"}, "org/Llama-3-8b-bnb-4bit"),
        ({"base_model_name_or_path": "org/Llama-2-7B-GPTQ"}, "org/Llama-2-7B-GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
    ids=["name", "gptq", "config"],
)
def test_adapter_of_a_quantised_base(tmp_path, changes, how) -> None:
    base, adapter = saved(tmp_path, "llama-gqa")
    plain = load(base, adapter)
    assert load_info(plain).notes == ()
    edit_json(adapter / "adapter_config.json", **changes)
    model = load(base, adapter)
    (note,) = load_info(model).notes
    assert note.startswith(
        f"adapter was trained on a quantised base ({how}); it is merged into the float"
    )
    assert torch.equal(model.W_Q, plain.W_Q)


def test_adapter_whose_base_folder_is_quantised(tmp_path) -> None:
    base, adapter = saved(tmp_path, "llama-gqa")
    quantised = shutil.copytree(base, tmp_path / "other")
    edit_json(quantised / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(quantised))
    assert "quantised base (bitsandbytes)" in load_info(load(base, adapter)).notes[0]
    refused("quantised .bitsandbytes.*give the float checkpoint", quantised, adapter)


def test_adapters_that_belong_to_quantised_weights_alone(tmp_path) -> None:
    """LoftQ's matrices make up for the rounding of its base; on the float base they do not belong."""
    base, adapter = saved(tmp_path, "llama-gqa")
    edit_json(adapter / "adapter_config.json", init_lora_weights="loftq")
    refused("init_lora_weights='loftq' is not supported", base, adapter)
    edit_json(adapter / "adapter_config.json", init_lora_weights=True, use_qalora=True)
    refused("use_qalora=True is not supported", base, adapter)
