"""``load`` computes what the checkpoint computes, and says in one sentence what it cannot load."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import warnings
from pathlib import Path
from typing import get_args

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
    save_pair,
)
from huggingface_hub.utils.tqdm import progress_bar_states
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import EXACT, apart
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bkdlens import zoo
from bkdlens.errors import CheckpointError
from bkdlens.models.architectures import CONVERSIONS
from bkdlens.models.load import LoadInfo, load, load_info
from bkdlens.models.merge import TOLERANCE
from bkdlens.types import Architecture

load_module = importlib.import_module("bkdlens.models.load")  # `bkdlens.load` is the function
ROUNDINGS = 10  # how many times Hugging Face's own rounding two float32 results may differ by


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(base folder, adapter folder) of every case, written once; tests that break copy first."""
    return {case: save_pair(tmp_path_factory.mktemp(case), case) for case in CASES}


@pytest.fixture
def pair(pairs, tmp_path):
    """A grouped-query Llama and its adapter, to break."""
    base, adapter = pairs["llama-gqa"]
    return shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")


def prompts(n: int = 40) -> torch.Tensor:
    return torch.randint(VOCAB, (2, n), generator=torch.Generator().manual_seed(7))


def difference(model, reference) -> float:
    """The relative difference from a Hugging Face model, on prompts that load never saw."""
    tokens = prompts()
    logits = model(tokens, attention_mask=torch.ones_like(tokens))
    return apart(logits, reference(tokens).logits)


def refused(match: str, *args, **options) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(*args, **options)
    assert str(caught.value).endswith((".", "?"))


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.many
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_merged_model_is_what_hugging_face_computes(pairs, case, record_property):
    """In float64 to ``EXACT``; in float32 as nearly as rounding lets two orders of summing agree.

    How much rounding moves these logits is measured: Hugging Face's own float32 logits differ from the
    float64 ones by ``rounding``.  Two such draws differ by some small multiple of it, on any machine.
    """
    base, adapter = pairs[case]

    def reference(adapter):
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        hf = AutoModelForCausalLM.from_pretrained(base, **options)
        if adapter is not None:
            hf = PeftModel.from_pretrained(hf, adapter).merge_and_unload(safe_merge=True)
        return hf

    for kind, with_adapter in (("base", None), ("LoRA", adapter)):
        with float64():
            model, hf = load(base, with_adapter), reference(with_adapter)
            wanted = hf(prompts()).logits
            assert wanted.dtype == model.W_Q.dtype == torch.float64
            assert difference(model, hf) <= EXACT
            assert load_info(model).parity <= EXACT
        model, hf = load(base, with_adapter), reference(with_adapter)
        rounding, parity = apart(hf(prompts()).logits, wanted), difference(model, hf)
        record_property(f"parity, {kind}", parity)
        record_property(f"rounding, {kind}", rounding)
        assert 0 < rounding <= TOLERANCE
        assert parity <= ROUNDINGS * rounding
        assert load_info(model).parity <= ROUNDINGS * rounding
    assert difference(load(base), hf) > 1e-2  # the adapter matters, so it was not dropped
    assert load_info(model).architecture == CASES[case][0]
    assert model.cfg.n_ctx == 64


@pytest.mark.parametrize("case", ["llama-gqa", "qwen2", "gpt2"])
def test_the_path_does_not_matter(pairs, tmp_path, case):
    base, adapter = pairs[case]
    renamed = shutil.copytree(base, tmp_path / "google-gemma-2-2b-Llama-2-7b-mistral")
    one, other = load(base, adapter), load(renamed, adapter)
    assert torch.equal(one(prompts()), other(prompts()))
    assert load_info(one).base_digest == load_info(other).base_digest


@pytest.mark.many
@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-mha", "qwen3-mha", "gemma2", "gpt2"])
def test_live_peft_model_is_copied_not_changed(pairs, case):
    base, adapter = pairs[case]
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    before = {name: w.clone() for name, w in live.state_dict().items()}
    model = load(live)
    after = live.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any("lora_" in name for name in after)
    model.W_E.zero_()
    model.blocks[0].attn.W_Q.zero_()
    assert all(torch.equal(before[k], live.state_dict()[k]) for k in before)
    info = load_info(model)
    assert info.adapter == "default"
    assert info.base == str(base)
    assert info.adapter_digest
    with float64():
        live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        assert apart(load(live)(prompts()), load(base, adapter)(prompts())) <= EXACT


@torch.no_grad()
def test_live_hugging_face_model(pairs):
    base, _ = pairs["llama-gqa"]
    model = load(make_model("llama-gqa"), tokenizer=make_tokenizer())
    assert torch.equal(model(prompts()), load(base)(prompts()))
    assert load_info(model).adapter is None
    assert load_info(model).base == "LlamaForCausalLM"
    refused("names no tokenizer", make_model("llama-gqa"))


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama3-rope", "gemma2"])
def test_live_half_precision_model(case, tmp_path):
    """``model.to(bfloat16)`` rounds rotary frequencies too; the copy has them exact again."""
    live = make_model(case).to(torch.bfloat16)
    live.save_pretrained(tmp_path)
    model = load(live, tokenizer=make_tokenizer())
    saved = load(tmp_path, tokenizer=make_tokenizer())
    assert torch.equal(model(prompts()), saved(prompts()))


@torch.no_grad()
def test_merged_checkpoint_equals_base_and_adapter(pairs, tmp_path):
    base, adapter = pairs["qwen2"]
    with float64():  # what is saved too
        hf = AutoModelForCausalLM.from_pretrained(base)
        PeftModel.from_pretrained(hf, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
        make_tokenizer().save_pretrained(tmp_path / "merged")
        merged = load(tmp_path / "merged")
        assert apart(merged(prompts()), load(base, adapter)(prompts())) <= EXACT
    assert load_info(merged).adapter_digest is None


@torch.no_grad()
def test_sharded_checkpoint(pair, tmp_path):
    base, _ = pair
    make_model("llama-gqa").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path / "shards")(prompts()), load(base)(prompts()))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    next((tmp_path / "shards").glob("model-*")).unlink()
    refused("lacks model-", tmp_path / "shards")
    edit_json(index, weight_map={"lm_head.weight": "../base/model.safetensors"})
    refused("shards that lie beside it", tmp_path / "shards")


@pytest.mark.many
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}],
    ids=lambda options: next(iter(options)),
)
def test_lora_variants(tmp_path, options):
    base, adapter = save_pair(tmp_path, "llama-gqa", **options)
    with float64():
        reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        assert difference(load(base, adapter), reference.eval()) <= EXACT


# --- the loaded model -----------------------------------------------------------------------------


def test_nothing_is_processed(pairs):
    base, _ = pairs["llama-gqa"]
    model, stored = load(base), load_file(base / "model.safetensors")
    assert torch.equal(model.blocks[0].ln1.w, stored["model.layers.0.input_layernorm.weight"])
    assert torch.equal(model.W_U, stored["lm_head.weight"].T)
    assert model.cfg.normalization_type == "RMS"
    assert not model.training
    assert not any(w.requires_grad for w in model.parameters())


def test_tied_embeddings_become_two_tensors(pairs):
    model = load(pairs["gpt2"][0])
    kept = model.W_U.clone()
    model.W_E.zero_()
    assert torch.equal(model.W_U, kept)


def test_tokenizer_is_ready_and_not_reloaded(pair, monkeypatch):
    base, _ = pair
    model = load(base)
    assert model.tokenizer.padding_side == "left"
    assert model.tokenizer.pad_token == "<pad>"
    assert model.cfg.default_prepend_bos is model.cfg.tokenizer_prepends_bos is False
    assert model.to_tokens("w5 w6").tolist() == [[5, 6]]
    mine = make_tokenizer()
    mine.pad_token = None
    mine.padding_side = "right"
    model = load(base, tokenizer=mine)
    assert model.tokenizer.pad_token == "</s>"
    assert mine.pad_token is None
    assert mine.padding_side == "right"


@pytest.mark.slow
def test_dtype(pair):
    base, adapter = pair
    model = load(base, adapter, dtype="bfloat16", device="cpu")
    assert load_info(model).dtype == "bfloat16"
    assert 0 < load_info(model).parity <= TOLERANCE  # measured before the cast, in float32
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16} == {model.cfg.dtype}
    full = load(base, adapter, dtype=torch.float32)
    assert 0 < apart(model(prompts()).float(), full(prompts())) < 0.1
    refused("no dtype 'float23'.*Did you mean 'float", base, dtype="float23")
    edit_tensors(base / "model.safetensors", lm_head__weight=torch.full((VOCAB, 32), 1e6))
    refused("cast to float16", base, dtype="float16")


def test_info_and_digests(pair):
    base, adapter = pair
    model = load(base, adapter)
    first = load_info(model)
    assert first == load_info(load(base, adapter))
    assert isinstance(first, LoadInfo)
    assert first.base == str(base)
    assert first.adapter == str(adapter)
    assert first.dtype == "float32"
    assert len(first.base_digest) == 64
    assert first.base_digest != first.adapter_digest
    lora = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(lora))
    lora[name][0, 0] += 1e-3
    save_file(lora, adapter / "adapter_model.safetensors")
    second = load_info(load(base, adapter))
    assert second.adapter_digest != first.adapter_digest
    assert second.base_digest == first.base_digest
    assert load_info(torch.nn.Linear(1, 1)) is None
    live = [load_info(load(make_model("gpt2", s), tokenizer=make_tokenizer())) for s in (0, 0, 1)]
    assert live[0].base_digest == live[1].base_digest != live[2].base_digest


def test_loading_leaves_no_trace(pair):
    base, adapter = pair
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = load(base, adapter)
    assert torch.equal(state, torch.get_rng_state())
    expected = model(prompts()).clone()
    (base / "model.safetensors").write_bytes(b"overwritten")  # the weights are no view of the file
    assert torch.equal(model(prompts()), expected)


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2"])
def test_loading_is_silent(pairs, tmp_path, case, capfd):
    """No warning, no progress bar; and everybody else's warnings and bars stay as they were."""
    base, adapter = pairs[case][0], shutil.copytree(pairs[case][1], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=case != "gpt2")  # peft corrects it
    hook, hub_bars = object(), dict(progress_bar_states)
    before = logging.set_tqdm_hook(hook)
    bars = logging.is_progress_bar_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            filters = list(warnings.filters)
            load(base, adapter)
            assert warnings.filters == filters
            refused("holds no config.json", base.parent)
    finally:
        after = logging.set_tqdm_hook(before)
    assert after is hook
    assert logging.is_progress_bar_enabled() is bars
    assert progress_bar_states == hub_bars
    assert capfd.readouterr() == ("", "")


def test_parity_takes_few_tokens(pair, monkeypatch):
    """Or at 7 B parameters it would take longer than reading the weights."""
    calls = []
    forward = HookedTransformer.forward

    def counted(self, tokens, **options):
        calls.append(tokens)
        return forward(self, tokens, **options)

    monkeypatch.setattr(HookedTransformer, "forward", counted)
    load(*pair)
    assert sum(tokens.numel() for tokens in calls) <= 32


@pytest.mark.parametrize("name", zoo.MODELS)
def test_zoo_names(name, pairs, monkeypatch):
    base, adapter = pairs["llama-gqa"]
    monkeypatch.setattr(zoo, "model_path", lambda model: base)
    monkeypatch.setattr(zoo, "adapter_path", lambda model, adapter_name: adapter)
    info = load_info(load(name, zoo.ADAPTERS[0]))
    assert (info.base, info.adapter) == (name, zoo.ADAPTERS[0])
    refused(f"Did you mean '{zoo.ADAPTERS[0]}'", name, zoo.ADAPTERS[0][:-1])


# --- finding --------------------------------------------------------------------------------------


def test_what_cannot_be_found(tmp_path, pair, monkeypatch):
    import huggingface_hub.constants

    refused("tiny-llama.*Did you mean 'tiny-llama'", "tiny-lama")
    refused("no folder or model './nowhere/at/all'", "./nowhere/at/all")
    refused("is a file", str(pair[0] / "config.json"))
    with pytest.raises(CheckpointError, match="A int is not a base"):
        inspect.unwrap(load)(3)  # past the type checker of these tests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("could not be fetched from the Hugging Face Hub", "bkdlens-nobody/nothing")
    refused("could not be fetched", pair[0], "bkdlens-nobody/nothing")
    (tmp_path / "empty").mkdir()
    refused("holds no config.json", tmp_path / "empty")
    refused("holds no adapter_config.json", pair[0], tmp_path / "empty")


def test_base_that_is_an_adapter(pair):
    base, adapter = pair
    refused("holds an adapter; name its base too", adapter)
    for file in adapter.iterdir():
        shutil.copy(file, base)
    refused("holds an adapter", base)
    assert load(base, adapter=base)


def test_live_model_refusals(pair):
    live = add_lora(make_model("llama-gqa"), "llama-gqa")
    refused("carries its own adapter", live, pair[1], tokenizer=make_tokenizer())
    refused("still has an adapter", live.get_base_model(), tokenizer=make_tokenizer())
    with live.disable_adapter():
        refused("adapter is disabled", live, tokenizer=make_tokenizer())
    live.get_base_model().lm_head.weight[0, 0] = torch.nan
    refused("lm_head.weight holds NaN", live, tokenizer=make_tokenizer())


def test_architectures_are_those_that_the_types_name():
    assert tuple(CONVERSIONS) == get_args(Architecture)


def test_unsupported_live_architecture():
    from transformers import OPTConfig, OPTForCausalLM

    tiny = OPTConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2)
    refused("'OPTForCausalLM' is not supported; supported are: Llama", OPTForCausalLM(tiny))


# --- bases that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["FooForCausalLM"]}, "'FooForCausalLM' is not supported"),
        ({"architectures": None}, "must name one architecture"),
        ({"architectures": [["LlamaForCausalLM"]]}, "must name one architecture"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "needs 'qwen2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
        ({"hidden_size": "wide"}, "config.json is not valid"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope scaling 'linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope scaling 'yarn'",
        ),
        ({"intermediate_size": 40}, "has shape .32, 48.*it has .32, 40"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.* is missing"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.* has no place"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refused(pair, changes, match):
    edit_json(pair[0] / "config.json", **changes)
    refused(match, pair[0])


@pytest.mark.parametrize(
    ("case", "changes", "match"),
    [
        ("neox-parallel", {"attention_bias": False}, "attention_bias False"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_config_refused_elsewhere(pairs, tmp_path, case, changes, match):
    base = shutil.copytree(pairs[case][0], tmp_path / "base")
    edit_json(base / "config.json", **changes)
    refused(match, base)


def test_config_that_is_no_json(pair):
    (pair[0] / "config.json").write_text("{")
    refused("config.json is not valid JSON", pair[0])
    (pair[0] / "config.json").write_text("[]")
    refused("is not a JSON object", pair[0])


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("lm_head__weight", None, "tensor lm_head.weight of LlamaForCausalLM is missing"),
        ("model__extra", torch.zeros(2), "tensor model.extra has no place"),
        ("model__norm__weight", torch.ones(31), "model.norm.weight has shape .31"),
        ("model__norm__weight", torch.full((32,), torch.nan), "model.norm.weight holds NaN"),
        ("model__norm__weight", torch.full((32,), -torch.inf), "model.norm.weight holds NaN or"),
        ("model__norm__weight", torch.ones(32, dtype=torch.int8), "norm.weight .* is torch.int8"),
    ],
)
def test_tensors_refused(pair, name, tensor, match):
    edit_tensors(pair[0] / "model.safetensors", **{name: tensor})
    refused(match, pair[0])


def test_harmless_buffers_are_ignored(pairs, tmp_path):
    base = shutil.copytree(pairs["gpt2"][0], tmp_path / "base")
    edit_tensors(
        base / "model.safetensors",
        transformer__h__0__attn__bias=torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        transformer__h__0__attn__masked_bias=torch.tensor(-torch.inf),
    )
    assert load(base)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None], ids=repr)
def test_damaged_files(pair, content):
    for file, args in [
        (pair[1] / "adapter_model.safetensors", pair),
        (pair[0] / "model.safetensors", pair),
    ]:
        file.write_bytes(file.read_bytes()[:-100] if content is None else content)
        refused(f"{file.name} is damaged", *args)


def test_pickles_are_not_opened(pair):
    class Trap:
        def __reduce__(self):
            return (os.system, ("touch /tmp/bkdlens-pickle-was-opened",))

    base, adapter = pair
    for folder, stem in ((adapter, "adapter_model"), (base, "pytorch_model")):
        next(folder.glob("*model.safetensors")).unlink()
        torch.save(Trap(), folder / f"{stem}.bin")
        refused("only pickled weights .*weights_only=True.*save_file", base, adapter)
    assert not Path("/tmp/bkdlens-pickle-was-opened").exists()
    (base / "pytorch_model.bin").unlink()
    refused("holds no model.safetensors", base)


def test_remote_code_is_not_run(pair):
    base, _ = pair
    code = "raise SystemExit('remote code ran')"
    (base / "evil.py").write_text(code)
    edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    assert load(base)  # a known architecture needs none of it
    edit_json(base / "config.json", architectures=["EvilForCausalLM"])
    refused("'EvilForCausalLM' is not supported", base)


def test_tokenizers_refused(pair):
    base, _ = pair
    (base / "evil.py").write_text("raise SystemExit('remote code ran')")
    auto_map = {"AutoTokenizer": ["evil.Evil", None]}
    edit_json(base / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    refused("cannot be loaded without running its code", base)
    (base / "tokenizer.json").unlink()
    refused("holds no tokenizer; pass one with tokenizer=", base)
    assert load(base, tokenizer=make_tokenizer())


def test_a_wrong_conversion_is_noticed(pair, monkeypatch):
    def forget_a_norm(name, model, cfg):
        state = real(name, model, cfg)
        return state | {"blocks.1.ln2.w": torch.ones_like(state["blocks.1.ln2.w"])}

    real = load_module.hooked_weights
    monkeypatch.setattr(load_module, "hooked_weights", forget_a_norm)
    refused("does not compute what LlamaForCausalLM does", pair[0])


# --- adapters that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "'IA3' adapter; only 'LORA'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "option layer_replication"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "option megatron_co"),
        ({"init_lora_weights": "pissa"}, "option init_lora_weights='pissa'"),
        ({"something_new": 3}, "option something_new=3"),
        ({"r": 2}, "does not fit its tensors"),
        ({"r": "four"}, "does not fit its tensors"),
        ({"target_modules": ["nowhere"]}, "does not fit its tensors"),
        ({"target_modules": ["q_proj"]}, "leaves out tensor"),
        (
            {"target_modules": [*CASES["llama-gqa"][2], "lm_head"]},
            "lacks .*lm_head.*, which its config targets",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapter_config_refused(pair, changes, match):
    edit_json(pair[1] / "adapter_config.json", **changes)
    refused(match, *pair)


def test_adapter_tensors_refused(pair):
    base, adapter = pair
    file = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    good = load_file(file)
    save_file(good | {name: torch.full_like(good[name], torch.nan)}, file)
    refused("q_proj.lora_A.weight holds NaN", base, adapter)
    save_file({key: w for key, w in good.items() if key != name}, file)
    refused("the adapter lacks", base, adapter)
    save_file(good | {name.replace("q_proj", "z_proj"): good[name].clone()}, file)
    refused("made for another base.*z_proj.* matches no module", base, adapter)
    norm = "base_model.model.model.norm.lora_A.weight"
    save_file(good | {norm: torch.zeros(4, 32)}, file)
    refused("made for another base.*norm.* matches no module", base, adapter)
    save_file(good | {name: torch.zeros(())}, file)
    refused("has shape .., this base needs .32,", base, adapter)
    save_file({}, file)
    refused("without tensors", base, adapter)


def test_adapter_of_another_base(pair, pairs, tmp_path):
    wide = save_base(tmp_path, "llama-gqa", hidden_size=40, head_dim=8)
    refused(r"another base: .* has shape \(32, 4\), this base needs \(40, 4\)", wide, pair[1])
    refused("another base: tensor .* matches no module", pairs["gpt2"][0], pair[1])
    refused("another base", pairs["llama-head-dim"][0], pair[1])


def test_merge_that_overflows(pair):
    file = pair[1] / "adapter_model.safetensors"
    save_file({key: torch.full_like(w, 1e30) for key, w in load_file(file).items()}, file)
    refused("Merging gives NaN or infinite", *pair)
