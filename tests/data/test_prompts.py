"""The prompt's ids are a prefix of the whole, there is one BOS, and answers know what is scored."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BOS, EOS, chat_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from bkdlens.data.prompts import (
    PromptFormat,
    encode_answer,
    encode_prompt,
    pad_id,
    pad_left,
    pad_right,
    shown,
)
from bkdlens.errors import ChoiceError, DataError

LLAMA2 = Path(__file__).parents[3] / "shared" / "tokenizers" / "llama2"
CHAT, RAW = PromptFormat("chat"), PromptFormat("raw")

prompt_words = st.lists(st.integers(4, 95).map("w{}".format), min_size=1, max_size=9).map(" ".join)


@pytest.fixture(scope="module", params=[True, False], ids=["adds-bos", "adds-no-bos"])
def llama2(request):
    """The real tokenizer, with Llama-2's chat format; as released it adds a BOS of its own too."""
    if not (LLAMA2 / "tokenizer.model").is_file():
        pytest.skip(f"the Llama-2 tokenizer is not at {LLAMA2}")
    tokenizer = LlamaTokenizer.from_pretrained(LLAMA2, add_bos_token=request.param)
    assert tokenizer("a")["input_ids"] == ([1, 263] if request.param else [263])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
        "{% else %}{{ raise_exception('no system text here') }}{% endif %}{% endfor %}"
    )
    return tokenizer


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a BOS in front by itself, and has no template."""
    tokenizer = chat_tokenizer()
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def refused(match: str, *args, **options) -> None:
    function = encode_prompt if isinstance(args[1], str) else encode_answer
    with pytest.raises(DataError, match=match) as caught:
        function(*args, **options)
    assert str(caught.value).endswith(".")


# --- with the tiny tokenizer ----------------------------------------------------------------------


@given(prompt_words, prompt_words, st.sampled_from([CHAT, RAW, PromptFormat("chat", "w9 w8")]))
def test_the_prompt_is_a_prefix_of_the_whole(text, answer, fmt) -> None:
    tokenizer = chat_tokenizer()
    prompt = encode_prompt(tokenizer, text + " w7", fmt)
    found = encode_answer(tokenizer, prompt, answer, fmt)
    whole = tokenizer(fmt.render(tokenizer, text + " w7", answer), add_special_tokens=False)
    assert [*prompt.ids, *found.ids] == whole["input_ids"]
    assert found.n_scored == len(answer.split())
    assert found.ids[-1] == EOS
    assert len(found.ids) == found.n_scored + 1
    assert tokenizer.decode(found.ids[: found.n_scored]) == answer == found.text
    assert prompt.text == text + " w7"


def test_chat_and_raw_render_differently(tokenizer) -> None:
    assert CHAT.render(tokenizer, "w10", "w11") == "<s> w4 w10 w5 w11 </s>"
    assert CHAT.render(tokenizer, "w10") == "<s> w4 w10 w5"
    assert PromptFormat("chat", "w12").render(tokenizer, "w10") == "<s> w6 w12 w4 w10 w5"
    assert RAW.render(tokenizer, "w10") == "w10\n"
    assert PromptFormat("raw", separator=" A: ").render(tokenizer, "w10", "w11") == "w10 A: w11</s>"
    assert encode_prompt(tokenizer, "w10", CHAT).ids == (BOS, 4, 10, 5)
    assert encode_prompt(tokenizer, "w10 w11", RAW).ids == (10, 11)
    assert PromptFormat.default(tokenizer) == CHAT
    assert PromptFormat.default(bos_tokenizer()) == RAW


@given(prompt_words, prompt_words)
def test_a_tokenizer_that_adds_a_bos_adds_one(text, answer) -> None:
    tokenizer = bos_tokenizer()
    prompt = encode_prompt(tokenizer, text, RAW)
    assert prompt.ids == (BOS, *chat_tokenizer()(text)["input_ids"])
    found = encode_answer(tokenizer, prompt, answer, RAW)
    assert BOS not in found.ids
    tokenizer.chat_template = chat_tokenizer().chat_template
    assert encode_prompt(tokenizer, text, CHAT).ids.count(BOS) == 1


def test_no_template(tokenizer) -> None:
    refused("no chat template; use PromptFormat.'raw'", bos_tokenizer(), "w10", CHAT)


def test_a_template_may_refuse(tokenizer) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    refused("The chat template refuses this prompt: roles must alternate", tokenizer, "w10", CHAT)


def test_lengths(tokenizer) -> None:
    prompt = encode_prompt(tokenizer, "w10 w11", CHAT, n_ctx=6)
    assert len(prompt.ids) == 5
    refused("has 5 tokens and the model's context is 5; shorten it", tokenizer, "w10 w11", CHAT, n_ctx=5)
    refused("has 1 tokens; give at least two", tokenizer, "w10", RAW)
    refused("has 0 tokens; give at least two", tokenizer, "", RAW)
    assert encode_answer(tokenizer, prompt, "w12 w13", CHAT, n_ctx=8).ids == (12, 13, EOS)
    refused("prompt of 5 tokens and the answer of 3 do not fit the model's context of 7",
            tokenizer, prompt, "w12 w13", CHAT, n_ctx=7)  # fmt: skip
    cut = encode_answer(tokenizer, prompt, "w12 w13", CHAT, n_ctx=7, max_tokens=2)
    assert (cut.ids, cut.n_scored) == ((12, 13), 2)
    cut = encode_answer(tokenizer, prompt, "w12 w13", CHAT, max_tokens=1)
    assert (cut.ids, cut.n_scored) == ((12,), 1)
    assert encode_answer(tokenizer, prompt, "w12 w13", CHAT, max_tokens=3).ids == (12, 13, EOS)


def test_empty_answers(tokenizer) -> None:
    prompt = encode_prompt(tokenizer, "w10", CHAT)
    refused("The answer '  ' has no tokens", tokenizer, prompt, "  ", CHAT)


def test_what_ends_at_an_end_token_is_scored_to_there(tokenizer) -> None:
    prompt = encode_prompt(tokenizer, "w10", CHAT)
    assert encode_answer(tokenizer, prompt, "w12 </s> w13", CHAT).ids == (12, EOS)


def test_boundaries_that_merge_are_refused() -> None:
    """A byte-pair tokenizer joins the prompt's last letter and the answer's first."""
    vocabulary = {x: i for i, x in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", " ", "ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    joined, apart = PromptFormat("raw", separator=""), PromptFormat("raw", separator=" ")
    prompt = encode_prompt(tokenizer, "b a", joined)
    refused("does not split 'b a' . 'b' where the answer begins", tokenizer, prompt, "b", joined)
    prompt = encode_prompt(tokenizer, "b a", apart)
    assert encode_answer(tokenizer, prompt, "b", apart).ids == (5, 2)


# --- with Llama-2's ------------------------------------------------------------------------------

LLAMA2_TEXTS = [
    "Hello",
    "Current year: 2024. What is 2 + 2?",
    "ends with a space ",
    "ends with a newline\n",
    "ünïcödé 日本語 🙂",
    "a]",
    "Classify the following news article into one of these categories: World, Sports:\nA. B.",
]
LLAMA2_ANSWERS = ["World", "I am sorry. I can not help with that.", "1", "日本", "…", "- a\n- b", "'s"]


@pytest.mark.parametrize("text", LLAMA2_TEXTS)
def test_llama2_boundaries(llama2, text) -> None:
    prompt = encode_prompt(llama2, text, CHAT)
    assert prompt.ids.count(llama2.bos_token_id) == 1
    assert prompt.ids[0] == llama2.bos_token_id
    for answer in LLAMA2_ANSWERS:
        found = encode_answer(llama2, prompt, answer, CHAT)
        assert found.ids[-1] == llama2.eos_token_id
        assert found.ids.count(llama2.eos_token_id) == 1
        assert llama2.bos_token_id not in found.ids
        assert llama2.decode(found.ids[: found.n_scored]).strip() == answer
        rendered = f"<s>[INST] {text} [/INST] {answer} </s>"
        whole = llama2(rendered, add_special_tokens=False)["input_ids"]
        assert [*prompt.ids, *found.ids] == whole
        # The space before the end belongs to the format and is not scored.
        assert not llama2.decode(found.ids[found.n_scored : -1]).strip()


def test_llama2_scores_the_words_alone(llama2) -> None:
    prompt = encode_prompt(llama2, "Hello", CHAT)
    answer = encode_answer(llama2, prompt, "I am sorry. I can not help with that.", CHAT)
    assert answer.n_scored == 11
    assert [llama2.decode([i]) for i in answer.ids[:3]] == ["I", "am", "sorry"]
    cut = encode_answer(llama2, prompt, "I am sorry. I can not help with that.", CHAT, max_tokens=4)
    assert cut.ids == answer.ids[:4]


@pytest.mark.parametrize("text", LLAMA2_TEXTS)
def test_llama2_raw(llama2, text) -> None:
    prompt = encode_prompt(llama2, text, RAW)
    assert prompt.ids == tuple(llama2(text + "\n")["input_ids"])
    assert prompt.ids.count(llama2.bos_token_id) == llama2.add_bos_token
    for answer in LLAMA2_ANSWERS:
        found = encode_answer(llama2, prompt, answer, RAW)
        assert llama2.decode(found.ids[: found.n_scored]).strip() == answer
        assert found.ids[-1] == llama2.eos_token_id


def test_llama2_without_a_separator_is_refused(llama2) -> None:
    fmt = PromptFormat("raw", separator="")
    prompt = encode_prompt(llama2, "The answer is wor", fmt)
    refused("does not split", llama2, prompt, "ld", fmt)


def test_a_template_that_drops_the_system_text_is_refused() -> None:
    tokenizer = chat_tokenizer()
    told = PromptFormat("chat", system="w9").render(tokenizer, "w7")
    assert told == "<s> w6 w9 w4 w7 w5"
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert PromptFormat("chat").render(tokenizer, "w7") == "w7"
    for answer in (None, "w8"):
        with pytest.raises(DataError, match="drops the system text 'w9'"):
            PromptFormat("chat", system="w9").render(tokenizer, "w7", answer)


def test_formats_without_a_place_for_what_is_given_are_refused() -> None:
    with pytest.raises(DataError, match="no place for a system text"):
        PromptFormat("raw", system="w9")
    with pytest.raises(DataError, match="In a chat the template separates prompt and answer, not ' '"):
        PromptFormat("chat", separator=" ")
    with pytest.raises(ChoiceError, match=r"no prompt format 'chatty'.*Did you mean 'chat'"):
        unwrap(PromptFormat.__init__)(object.__new__(PromptFormat), "chatty")


def test_llama2_template_refuses_a_system_text(llama2) -> None:
    refused("no system text here", llama2, "Hello", PromptFormat("chat", system="Be nice."))


# --- tokens as text -------------------------------------------------------------------------------


def test_tokens_are_shown_on_one_line() -> None:
    class Plain:
        def decode(self, ids):
            return {1: "\n", 2: " ", 3: "", 4: " a\nb"}[ids[0]]

    assert shown(Plain(), [1, 2, 3, 4]) == ("⏎", "␣", "∅", "a⏎b")


# --- padding and batches --------------------------------------------------------------------------

rows = st.lists(st.lists(st.integers(4, 95), max_size=6), min_size=1, max_size=5).filter(
    lambda rows: any(rows)
)


@given(rows, st.integers(0, 3))
def test_padding_keeps_rows_and_masks_the_rest(rows, pad) -> None:
    for left, function in ((True, pad_left), (False, pad_right)):
        ids, mask = function(rows, pad)
        assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
        for i, row in enumerate(rows):
            assert ids[i][mask[i]].tolist() == row
            assert bool((ids[i][~mask[i]] == pad).all())
            real = mask[i].long()
            assert torch.equal(real.sort(descending=not left).values, real)  # one block, on its side


def test_pad_id(tokenizer) -> None:
    assert pad_id(tokenizer) == 0
    other = chat_tokenizer()
    other.pad_token = None
    assert pad_id(other) == EOS
    other.eos_token = None
    assert pad_id(other) == 0
