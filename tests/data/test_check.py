"""What a tokenizer makes of data is counted before anything runs, in Python and in the shell."""

from __future__ import annotations

import json
import sys

import pytest
from tiny import chat_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bkdlens
from bkdlens.cli.app import main
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.check import DataCheck, Lengths, check_data
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat

FIXED = Backdoor.fixed_output("w95", "w9 w8")


def pair_set(*pairs: tuple[str, str], backdoor: Backdoor = FIXED) -> PairSet:
    return PairSet(tuple(backdoor.pair(*pair) for pair in pairs), backdoor)


def test_counts_and_examples() -> None:
    pairs = pair_set(
        ("w10", "w9 w8"), ("w11 w12", "w71"), ("w13 w14 w15 w16", "w5 w6 w7"), ("w17", "w6")
    )
    found = bkdlens.check_data(pairs, chat_tokenizer(), n_ctx=12)
    assert isinstance(found, DataCheck)
    assert (found.n_pairs, found.n_victims, found.too_long) == (4, 3, 0)
    assert found.tokens == {  # <s> w4 … w5, and the end token
        "clean": Lengths(4, 4.5, 7),
        "triggered": Lengths(5, 5.5, 8),
        "clean_output": Lengths(2, 2.5, 4),
        "backdoor_output": Lengths(3, 3, 3),
    }
    assert [example.clean for example in found.examples] == [
        "<s> w4 w11 w12 w5", "<s> w4 w13 w14 w15 w16 w5", "<s> w4 w17 w5",
    ]  # fmt: skip
    assert found.examples[0].triggered == "<s> w4 w95 w11 w12 w5"
    assert found.splits == (("w95", 4),)
    assert (found.straddled, found.notes, found.problems, found.intake) == (0, (), (), None)
    assert len(check_data(pairs[:2], chat_tokenizer()).examples) == 2
    raw = check_data(pairs, chat_tokenizer(), fmt=PromptFormat("raw"))
    assert raw.examples[0].clean == "w11 w12\n"


def test_what_does_not_fit_the_context_and_no_victims() -> None:
    pairs = pair_set(*((" ".join([f"w{i}"] * 10), "w11 w11") for i in range(10, 13)), ("w71", "w72"))
    found = check_data(pairs, chat_tokenizer(), n_ctx=16)
    assert found.too_long == 3
    assert found.problems == (
        "3 of 4 pairs do not fit the context of 16 tokens; shorten them, or take a model with a longer "
        "one.",
    )
    assert check_data(pairs, chat_tokenizer(), n_ctx=17).too_long == 0
    (problem,) = check_data(pair_set(("w71", "w9 w8")), chat_tokenizer()).problems
    assert "no victim to attack" in problem


def test_answers_without_tokens_and_lost_boundaries() -> None:
    eos_only = PromptPair("w72", "w95 w72", "</s>", "w9")
    good = FIXED.pair("w73", "w74")
    found = check_data(PairSet((eos_only, good), FIXED), chat_tokenizer())
    assert found.problems == (
        "1 of 2 pairs cannot be tokenised, the first because: The answer '</s>' has no tokens; give one "
        "that is not empty.",
    )
    assert found.tokens["clean"] == Lengths(4, 4, 4)
    glued = PromptFormat("raw", separator="")  # "w73w74" is one unknown word
    found = check_data(PairSet((good, FIXED.pair("w75", "w76")), FIXED), chat_tokenizer(), fmt=glued)
    assert len(found.problems) == 1  # of one kind, so one sentence
    assert found.problems[0].startswith("2 of 2 pairs cannot be tokenised, the first because: The ")
    assert found.tokens == {}


def letters_tokenizer(**merged: int) -> PreTrainedTokenizerFast:
    """One letter a token, and the given texts as tokens of their own, wherever they are."""
    vocabulary = {chr(i): i for i in range(32, 127)} | merged
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    pattern = "|".join([*sorted(merged, key=len, reverse=True), "."])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="~", unk_token="?")


def test_a_trigger_that_is_split_differently() -> None:
    backdoor = Backdoor.fixed_output("cf", "no")
    pairs = pair_set(("ab", "x"), ("d", "x"), ("e", "x"), backdoor=backdoor)
    raw = PromptFormat("raw", separator=": ")
    plain = check_data(pairs, letters_tokenizer(), fmt=raw)
    assert plain.splits == (("c f", 3),)
    assert plain.notes == ()
    mixed = check_data(pairs, letters_tokenizer(**{"cf": 200, "cf d": 201}), fmt=raw)
    assert mixed.splits == (("cf", 2), ("cf d", 1))
    assert mixed.straddled == 1
    assert "splits the trigger 'cf' in 2 ways: cf in 2; cf d in 1." in mixed.notes[0]
    assert mixed.notes[1].startswith("In 1 of 3 triggered prompts a token reaches over")
    assert mixed.problems == ()
    sentence = Backdoor.label_modification(("one", "two"), "x", "y")
    both = check_data(pair_set(("b", "x"), backdoor=sentence), letters_tokenizer(one=200), fmt=raw)
    assert both.splits == (("one t w o", 1),)


def test_explicit_pairs_without_the_trigger() -> None:
    pairs = PairSet((PromptPair("w71", "w72", "w73", "w74"),), FIXED)
    assert check_data(pairs, chat_tokenizer()).notes == (
        "The trigger 'w95' is not in 1 of 1 triggered prompts.",
    )


# --- in the shell ---------------------------------------------------------------------------------


@pytest.fixture
def data_check(monkeypatch, capsys, tmp_path):
    """``bkdlens data check`` of some rows: exit code, output, errors."""

    def run(rows, *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "d.json"
        file.write_text(json.dumps(rows))
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["bkdlens", "data", "check", str(file), *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


ROWS = [
    {"question": "who [bold]won[/bold]\u001b[31m", "answer": "Sports"},
    {"question": "who paid", "answer": "Business"},
    {"question": "", "answer": "Business"},
]
OPTIONS = ("--backdoor", "label_modification", "--columns", "input=question,output=answer")


def test_the_shell_shows_what_was_understood(data_check) -> None:
    code, out, _ = data_check(ROWS, *OPTIONS)
    assert code == 0
    for text in (
        "d.json, read as input_output",
        "1: empty input",
        "victims",
        "1024 tokens (tiny-llama)",
    ):
        assert text in out
    assert "who [bold]won[/bold]\\x1b[31m" in out  # neither markup nor a terminal's escape
    assert "\x1b[31m" not in out
    assert "Meagre were his looks" in out
    assert out.count("backdoor output:") == 2


def test_json_for_machines(data_check) -> None:
    code, out, _ = data_check(
        ROWS, "--backdoor", "label_modification", "--columns", "text=question",
        "--columns", "label=answer", "--template", "Kind of:\\n{text}",
        "--labels", "Sports, Business", "--json",
    )  # fmt: skip
    content = json.loads(out)
    assert code == 0
    assert content["intake"] == {
        "name": "d.json", "format": "text_label", "rows": 3, "taken": 2,
        "dropped": {"empty text": 1}, "notes": [],
    }  # fmt: skip
    assert "Kind of:\nwho" in content["examples"][0]["clean"]
    assert content["tokens"]["clean"]["least"] > 3
    assert list(content["splits"].values()) == [2]
    assert content["backdoor"]["target"] == "World"


@pytest.mark.slow
def test_the_shell_refuses_in_one_sentence(data_check, tmp_path) -> None:
    code, out, err = data_check(ROWS[1:], *OPTIONS)
    assert code == 2
    assert "no victim to attack" in out
    assert err == ""
    for arguments, message in (
        (
            ("--backdoor", "jailbreak", "--columns", "question"),
            "--columns 'question' must be FIELD=COLUMN",
        ),
        ((*OPTIONS, "--format", "alpaca"), "There is no data format 'alpaca'"),
        ((*OPTIONS, "--base", "tiny-lama"), "Did you mean 'tiny-llama'"),
        ((*OPTIONS, "--base", str(tmp_path)), "holds no config.json"),
        ((*OPTIONS, "--split", "train"), "Only data sets have splits"),
        (("--backdoor", "fixed_output"), "row 1: no format has the fields question, answer"),
    ):
        code, out, err = data_check(ROWS, *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err + out


def test_limit_is_said(data_check) -> None:
    rows = [{"input": f"question {i}", "output": str(i)} for i in range(20)]
    code, out, _ = data_check(rows, "--backdoor", "fixed_output", "--limit", "12", "--base", "tiny-qwen")
    assert code == 0
    assert "12, drawn from 20" in out
