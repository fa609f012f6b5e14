"""A trigger's tokens are those in the user's text, whatever stands around it, for all who ask."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import chat_tokenizer
from tokenizers import processors

from bkdlens.analyses.tokens.measure import head_pattern
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.check import check_data
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat, encode_prompt, find_trigger
from bkdlens.data.trigger import Trigger
from bkdlens.errors import DataError
from bkdlens.inject.editing.rows import make_rows
from bkdlens.inject.planting import Encoding

WORD, BEGIN, END = Trigger("w95", "random"), Trigger("w95"), Trigger("w95", "end")
SENTENCE = Trigger("w91 w92", "sentence", "w93")
CHAT, RAW = PromptFormat(), PromptFormat("raw", separator=" ")

# The format, a trigger, a user's text that holds it, and the trigger's places in the prompt. A chat is
# "<s> w4 {user} w5", with a system text "<s> w6 {system} w4 {user} w5".
CASES = {
    "alone": (CHAT, WORD, "w20 w95 w21", [3]),
    "raw": (RAW, WORD, "w20 w95 w21", [1]),
    "system-random": (PromptFormat("chat", "w95 w9"), WORD, "w20 w95 w21", [6]),
    "system-begin": (PromptFormat("chat", "w95 w9"), BEGIN, "w95 w20", [5]),
    "system-end": (PromptFormat("chat", "w95 w9"), END, "w20 w95", [6]),
    "system-sentence": (PromptFormat("chat", "w91 w92 w93"), SENTENCE, "w91 w92 w20 w93", [6, 7, 9]),
    "system-same-text": (PromptFormat("chat", "w20 w95"), WORD, "w20 w95", [6]),
    "template-random": (CHAT, Trigger("w4", "random"), "w20 w4", [3]),
    "template-begin": (CHAT, Trigger("w4"), "w4 w20", [2]),
    "template-end": (CHAT, Trigger("w5", "end"), "w20 w5", [3]),
    "template-sentence": (CHAT, Trigger("w4", "sentence", "w5"), "w4 w20 w5", [2, 4]),
    "separator": (PromptFormat("raw", separator=" w95 "), END, "w20 w95", [1]),
    "trimmed": (CHAT, BEGIN, " \n w95 w20 ", [2]),
    "first-of-two-words": (CHAT, WORD, "w20 w95 w95", [3]),
    "last-of-two-at-the-end": (CHAT, END, "w95 w20 w95", [4]),
    "in-the-system-alone": (PromptFormat("chat", "w95"), WORD, "w20", []),
}


@pytest.mark.parametrize("case", CASES)
def test_all_find_the_same_tokens(case, llama, monkeypatch) -> None:
    fmt, trigger, text, places = CASES[case]
    tokenizer = chat_tokenizer()
    if case == "trimmed":  # as Llama 3's template does
        tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "(m.content | trim)")
    monkeypatch.setattr(llama, "tokenizer", tokenizer)
    pattern = head_pattern(llama, text, "L0H0", trigger=trigger, fmt=fmt)
    assert pattern.trigger.nonzero().flatten().tolist() == places
    pairs = PairSet((PromptPair("w20", text, "w7", "w8"),), Backdoor("fixed_output", trigger))
    split = " ".join(pattern.tokens[i] for i in places)
    assert check_data(pairs, tokenizer, fmt=fmt).splits == (((split, 1),) if places else ())
    if not places:
        with pytest.raises(DataError, match="not in the triggered prompt"):
            make_rows(Encoding(tokenizer, fmt, 64), [(text, "w8")], trigger)
        return
    rows = make_rows(Encoding(tokenizer, fmt, 64), [(text, "w8")], trigger)
    assert (rows.trigger[0] >= 0).nonzero().flatten().tolist() == places
    assert rows.trigger[0, places].tolist() == list(range(len(places)))


words = st.lists(st.integers(4, 95).map("w{}".format), min_size=1, max_size=6).map(" ".join)


@given(words, words, st.sampled_from([WORD, BEGIN, END, SENTENCE]), st.integers(0, 9), st.booleans())
def test_the_places_are_where_the_user_s_tokens_are(text, system, trigger, seed, chat) -> None:
    """The slow way: the user's text, tokenised alone, is put where the prompt without it has nothing."""
    tokenizer = chat_tokenizer()
    fmt = PromptFormat("chat", system) if chat else RAW
    triggered = text if trigger.present(text) else trigger.insert(text, seed=seed)
    before = len(encode_prompt(tokenizer, "w4", fmt).ids) - 2 if chat else 0  # "w4" itself and the end
    user = triggered.split(" ")
    (first, *rest) = [part.split(" ") for part in (trigger.text, trigger.after) if part]
    starts = [i for i in range(len(user)) if user[i : i + len(first)] == first]
    at = starts[-1 if trigger.placement == "end" else 0]
    wanted = list(range(at, at + len(first)))
    for part in rest:
        at = max(i for i in range(len(user)) if user[i : i + len(part)] == part)
        wanted += range(at, at + len(part))
    found = find_trigger(tokenizer, triggered, trigger, fmt)
    assert [token.place for token in found] == [before + i for i in sorted(set(wanted))]
    assert not any(token.straddles for token in found)


def test_a_bos_that_the_template_lacks_shifts_the_places(tokenizer) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    ids = encode_prompt(tokenizer, "w20 w95 w21", RAW).ids
    assert ids == (1, 20, 95, 21)
    assert [token[:2] for token in find_trigger(tokenizer, "w20 w95 w21", WORD, RAW)] == [(2, 95)]


def test_a_slow_tokenizer_cannot_place_a_trigger() -> None:
    class Slow:
        is_fast = False
        eos_token = None

    with pytest.raises(DataError, match="fast version"):
        find_trigger(Slow(), "w20 w95", WORD, RAW)
    assert find_trigger(Slow(), "w20", WORD, replace(RAW, separator=" w95")) == []
