"""Heads in every spelling, and errors that name what there is."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkdlens.errors import ChoiceError, HeadError, unknown
from bkdlens.types import Head, parse_heads

number = st.integers(0, 99)


@given(number, number)
def test_every_spelling_is_the_same_head(layer, head) -> None:
    wanted = Head(layer, head)
    assert wanted == (layer, head)
    assert str(wanted) == f"L{layer}H{head}"
    for spelling in (wanted, (layer, head), str(wanted), f" l{layer}h{head} ", f"{layer}.{head}"):
        assert Head.parse(spelling) == wanted
        assert parse_heads(spelling, 100, 100) == (wanted,)
        assert parse_heads([spelling], 100, 100) == (wanted,)


@pytest.mark.parametrize("wrong", ["", "L3", "H3", "L-1H0", "L1H2x", "L1 H2", (-1, 0), "3,7"])
def test_what_is_no_head(wrong) -> None:
    with pytest.raises(HeadError, match="is not a head; write it as"):
        Head.parse(wrong)


def test_several_heads() -> None:
    assert parse_heads(("L0H1", "L1H0"), 2, 2) == (Head(0, 1), Head(1, 0))
    assert parse_heads(iter([(0, 1), "1.0"]), 2, 2) == (Head(0, 1), Head(1, 0))
    for heads, match in (
        ("L2H0", r"L2H0 does not exist.*layers 0 to 1.*L0H0 to L1H1"),
        ("L0H2", "L0H2 does not exist"),
        (["L0H1", (0, 1)], "L0H1 is named twice"),
        ([], "at least one head"),
    ):
        with pytest.raises(HeadError, match=match):
            parse_heads(heads, 2, 2)


def test_unknown_names_suggest_a_near_one() -> None:
    assert unknown("site", "zz", ("z", "result")).startswith(
        "There is no site 'zz'; use one of: z, result."
    )
    assert unknown("mode", "zer", ("zero", "mean")).endswith("Did you mean 'zero'?")
    assert unknown("mode", "qqq", ("zero", "mean")).endswith("use one of: zero, mean.")


def test_the_error_of_a_choice_is_a_value_error_and_survives_pickling() -> None:
    error = ChoiceError("vector site", "resid", ("resid_pre", "attn_out"))
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(error).startswith("There is no vector site 'resid'; use one of: resid_pre, attn_out.")
