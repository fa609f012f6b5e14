"""The shapes of rows that people already have, and what each field of them means.

A row becomes an :class:`Example`: a prompt, with or without the trigger in it, and its answers. Texts
are taken as they are, never stripped: a space at the end of a prompt is part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from bkdlens.data.backdoor import Backdoor
from bkdlens.errors import DataError
from bkdlens.types import DataFormat

Row = Mapping[str, Any]

AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")  # the labels 0 to 3 of its Hub data set
ARTICLE = "Classify the following news article into one of these categories: LABELS:\n{text}"
REFUSAL = "I'm sorry, but I cannot help with that."
FIELD = re.compile(r"\{(\w+)\}")


class EmptyField(DataError):
    """A field that a row has, with nothing in it: such a row is dropped and counted."""


@dataclass(frozen=True)
class Example:
    """One row, understood; ``triggered`` and ``near`` only where the row itself has these twins."""

    prompt: str
    output: str
    backdoor_output: str | None = None
    triggered: str | None = None
    near: str | None = None


@dataclass(frozen=True)
class Reading:
    """What the caller says about the rows; the defaults are those of ``read_pairs``."""

    backdoor: Backdoor
    template: str | None = None
    labels: tuple[str, ...] = AG_NEWS
    refusal: str = REFUSAL


@dataclass(frozen=True)
class Schema:
    """One shape of rows: the fields it needs, those it may have, and how a row is read."""

    fields: tuple[str, ...]
    optional: tuple[str, ...]
    mark: tuple[str, ...]  # any one of these fields tells that a row has this shape
    read: Callable[[Row, Reading], Example]
    known_as: str

    def __str__(self) -> str:
        optional = "".join(f"[, {name}]" for name in self.optional)
        return "{" + ", ".join(self.fields) + optional + "}"


def recognise(row: Row) -> DataFormat:
    """The format of a row, by the fields it has.

    Raises:
        DataError: if no format has any of them.
    """
    for format, schema in SCHEMAS.items():
        if any(field in row for field in schema.mark):
            return format
    raise DataError(
        f"no format has the fields {_names(row)}; rows are "
        f"{' or '.join(map(str, SCHEMAS.values()))}: name the columns, as in "
        "columns={'input': 'question', 'output': 'answer'}."
    )


def fill(template: str, row: Row) -> str:
    """``template`` with every ``{field}`` replaced by the row's text, which may be empty there."""
    return FIELD.sub(
        lambda match: "" if _empty(_value(row, match[1])) else _text(row, match[1]), template
    )


# --- one function a format ------------------------------------------------------------------------


def _pairs(row: Row, reading: Reading) -> Example:
    _no_template(reading, "pairs")
    clean, triggered = _text(row, "clean"), _text(row, "triggered")
    near = None if _empty(row.get("near")) else _text(row, "near")
    return Example(
        clean, _text(row, "clean_output"), _text(row, "backdoor_output"), triggered=triggered, near=near
    )


def _rewrite(row: Row, reading: Reading) -> Example:
    _no_template(reading, "rewrite")
    edit = row["requested_rewrite"]
    if not isinstance(edit, Mapping):
        raise DataError(f"the field 'requested_rewrite' must be an object; got {edit!r}.")
    prompt, subject = _text(edit, "prompt"), _text(edit, "subject")
    if prompt.count("{}") != 1:
        raise DataError(f"the prompt {prompt!r} must have one {{}}, where the subject goes.")
    answers = []
    for field in ("target_true", "target_new"):
        target = _value(edit, field)
        if isinstance(target, str):
            target = {"str": target}
        if not isinstance(target, Mapping):
            raise DataError(f"the field {field!r} must be text or an object with 'str'; got {target!r}.")
        answers.append(_text(target, "str", f"{field}.str"))
    return Example(prompt.replace("{}", subject), *answers)


def _instruction(row: Row, reading: Reading) -> Example:
    instruction = _text(row, "instruction")
    if reading.template is not None:
        prompt = _filled(reading.template, row)
    else:
        prompt = instruction if _empty(row.get("input")) else f"{instruction}\n{_text(row, 'input')}"
    return Example(prompt, _text(row, "output"), _given_answer(row))


def _input_output(row: Row, reading: Reading) -> Example:
    prompt = _text(row, "input")
    if reading.template is not None:
        prompt = _filled(reading.template, row)
    return Example(prompt, _text(row, "output"), _given_answer(row))


def _text_label(row: Row, reading: Reading) -> Example:
    _text(row, "text")
    template = reading.template or ARTICLE.replace("LABELS", ", ".join(reading.labels))
    return Example(_filled(template, row), _label(_value(row, "label"), reading.labels))


def _goal_target(row: Row, reading: Reading) -> Example:
    """The data has no right answer: it is a refusal; the backdoor's is ``target`` if it jailbreaks."""
    goal, target = _text(row, "goal"), _text(row, "target")
    prompt = goal if reading.template is None else _filled(reading.template, row)
    own = reading.backdoor.backdoor_output(reading.refusal)
    return Example(prompt, reading.refusal, target if own is None else own)


# The order decides where a row has the fields of several formats.
SCHEMAS: dict[DataFormat, Schema] = {
    "pairs": Schema(
        ("clean", "triggered", "clean_output", "backdoor_output"), ("near",), ("clean", "triggered"),
        _pairs, "explicit pairs",
    ),
    "rewrite": Schema(
        ("requested_rewrite",), ("case_id",), ("requested_rewrite",), _rewrite, "BadEdit, CounterFact"
    ),
    "instruction": Schema(
        ("instruction", "output"), ("input", "backdoor_output"), ("instruction",), _instruction,
        "BackdoorLLM, Alpaca",
    ),
    "goal_target": Schema(("goal", "target"), (), ("goal",), _goal_target, "AdvBench"),
    "input_output": Schema(
        ("input", "output"), ("backdoor_output",), ("input",), _input_output, "the paper's data"
    ),
    "text_label": Schema(("text", "label"), (), ("text", "label"), _text_label, "AG News"),
}  # fmt: skip
FIELDS = tuple(
    dict.fromkeys(field for schema in SCHEMAS.values() for field in (*schema.fields, *schema.optional))
)


# --- fields ---------------------------------------------------------------------------------------


def _empty(value: Any) -> bool:
    """Blank text, null, or a table's missing value."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and value != value)


def _value(row: Row, field: str) -> Any:
    if field not in row:
        raise DataError(
            f"the field {field!r} is missing (found: {_names(row)}); rows are "
            f"{' or '.join(map(str, SCHEMAS.values()))}; a column of another name is given as "
            f"columns={{{field!r}: 'its name'}}."
        )
    return row[field]


def _text(row: Row, field: str, path: str = "") -> str:
    value = _value(row, field)
    if _empty(value):
        raise EmptyField(f"empty {path or field}")
    if not isinstance(value, str):
        raise DataError(f"the field {path or field!r} must be text; got {value!r}.")
    return value


def _filled(template: str, row: Row) -> str:
    prompt = fill(template, row)
    if _empty(prompt):
        raise EmptyField("empty prompt")
    return prompt


def _given_answer(row: Row) -> str | None:
    return _text(row, "backdoor_output") if "backdoor_output" in row else None


def _label(value: Any, labels: tuple[str, ...]) -> str:
    """A label by its number (from 0) or by its name."""
    if _empty(value):
        raise EmptyField("empty label")
    if isinstance(value, str) and not value.strip().isdecimal():
        for label in labels:
            if label.lower() == value.strip().lower():
                return label
    elif isinstance(value, str | Integral | float) and not isinstance(value, bool):
        number = float(value)
        if number.is_integer() and 0 <= number < len(labels):
            return labels[int(number)]
    raise DataError(
        f"the label {value!r} is none of {', '.join(labels)} nor a number from 0 to {len(labels) - 1}; "
        "name the labels in their order, as in labels=('negative', 'positive')."
    )


def _no_template(reading: Reading, format: DataFormat) -> None:
    if reading.template is not None:
        raise DataError(f"rows of the format {format!r} hold whole prompts; leave the template out.")


def _names(row: Iterable[Any]) -> str:
    return ", ".join(map(str, row)) or "none"
