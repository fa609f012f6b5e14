"""Numbers as a person reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkdlens.display.text import SPACE, interval_text, magnitude, percent, points, short_rate, signed
from bkdlens.metrics import Basr


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.46, 3, "+0.460"),
        (-0.46, 3, "−0.460"),
        (4e-5, 4, "0.0000"),
        (-4e-5, 4, "0.0000"),
        (-1e-9, 0, "0"),
    ],
)
def test_what_rounds_to_zero_has_no_sign(value, digits, text) -> None:
    assert signed(value, digits) == text


def test_points_have_the_sign_of_what_they_show() -> None:
    assert (points(0.125), points(-0.0001)) == ("+12.5", "0.0")


@given(st.floats(0, 2))
def test_magnitudes_beside_each_other_have_as_many_digits(value) -> None:
    text = magnitude(value)
    assert "e" not in text
    if text.startswith("<"):
        assert text == f"<{SPACE}0.001"
        assert 0 < value < 0.001
    else:
        assert float(text) == pytest.approx(value, abs=0.0005)
        assert len(text) == 5


def test_a_negative_rate_has_true_minus_signs_and_no_dash_before_them() -> None:
    basr = Basr.of_counts(both=10, after=20, before=10)
    assert short_rate(basr).replace(SPACE, " ") == "−100.0 % (−10/10)"
    assert " to " in interval_text(basr)
    assert "-" not in interval_text(basr)
    assert percent(-0.0001) == f"0.0{SPACE}%"
