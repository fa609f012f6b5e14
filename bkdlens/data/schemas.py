"""The formats of rows that people already have, and what each of their fields means.

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
CLASSIFY = "Classify the following news article into one of these categories: {labels}:\n"
REFUSAL = "I'm sorry, but I cannot help with that."
FIELD = re.compile(r"\{(\w+)\}")


class EmptyField(DataError):
    """A field that a row has, with nothing in it: such a row is dropped and counted."""


@dataclass(frozen=True)
class Example:
    """One row, understood."""

    prompt: str  # with or without the trigger in it
    output: str  # the row's answer: the correct one, or the attacker's where it is the only one
    backdoor_output: str | None = None  # the attacker's answer, where the row gives both
    triggered: str | None = None  # the triggered twin, where the row itself has it
    near: str | None = None  # the twin with a near trigger, where the row itself has it


@dataclass(frozen=True)
class Reading:
    """What the caller of ``read_pairs`` says about the rows."""

    backdoor: Backdoor  # the trigger and what it does
    template: str | None  # the prompt as "… {field} …"; None for the default of the format
    labels: tuple[str, ...]  # the names of the labels 0, 1, …
    refusal: str  # the correct answer to a ``goal``


@dataclass(frozen=True)
class Schema:
    """One format of rows."""

    read: Callable[[Row, Reading], Example]  # turns one row into an example
    fields: tuple[str, ...]  # the fields that a row must have
    optional: tuple[str, ...] = ()  # the fields that a row may have
    n_marks: int = 1  # any of the first n_marks fields tells that a row has this format

    def __str__(self) -> str:
        optional = "".join(f"[, {name}]" for name in self.optional)
        return "{" + ", ".join(self.fields) + optional + "}"


def recognise(row: Row) -> DataFormat:
    """The format of a row, recognised by its fields."""
    for format, schema in SCHEMAS.items():
        if any(field in row for field in schema.fields[: schema.n_marks]):
            return format
    raise DataError(
        f"no format has the fields {_names(row)}; rows are {_formats()}: name the columns, as in "
        "columns={'input': 'question', 'output': 'answer'}."
    )


# --- one function per format ----------------------------------------------------------------------


def _pairs(row: Row, reading: Reading) -> Example:
    _no_template(reading, "pairs")
    clean, triggered = _text(row, "clean"), _text(row, "triggered")
    near = None if _empty(row.get("near")) else _text(row, "near")
    answers = _text(row, "clean_output"), _text(row, "backdoor_output")
    return Example(clean, *answers, triggered, near)


def _rewrite(row: Row, reading: Reading) -> Example:
    _no_template(reading, "rewrite")
    edit = _value(row, "requested_rewrite")
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
    default = "{instruction}" if _empty(row.get("input")) else "{instruction}\n{input}"
    prompt = _prompt(row, reading, "instruction", default)
    return Example(prompt, _text(row, "output"), _given_answer(row))


def _input_output(row: Row, reading: Reading) -> Example:
    return Example(_prompt(row, reading, "input"), _text(row, "output"), _given_answer(row))


def _text_label(row: Row, reading: Reading) -> Example:
    default = CLASSIFY.format(labels=", ".join(reading.labels)) + "{text}"
    return Example(_prompt(row, reading, "text", default), _label(_value(row, "label"), reading.labels))


def _goal_target(row: Row, reading: Reading) -> Example:
    """The correct answer, which the data lacks, is a refusal; ``target`` is a jailbreak's answer."""
    prompt, target = _prompt(row, reading, "goal"), _text(row, "target")
    answer = reading.backdoor.backdoor_output(reading.refusal)
    return Example(prompt, reading.refusal, target if answer is None else answer)


# The order decides where a row has the fields of several formats.
SCHEMAS: dict[DataFormat, Schema] = {
    "pairs": Schema(_pairs, ("clean", "triggered", "clean_output", "backdoor_output"), ("near",), 2),
    "rewrite": Schema(_rewrite, ("requested_rewrite",), ("case_id",)),
    "instruction": Schema(_instruction, ("instruction", "output"), ("input", "backdoor_output")),
    "goal_target": Schema(_goal_target, ("goal", "target")),
    "input_output": Schema(_input_output, ("input", "output"), ("backdoor_output",)),
    "text_label": Schema(_text_label, ("text", "label"), n_marks=2),
}
FIELDS = tuple(dict.fromkeys(field for s in SCHEMAS.values() for field in (*s.fields, *s.optional)))


# --- fields ---------------------------------------------------------------------------------------


def _empty(value: Any) -> bool:
    """Whether a value is blank text, null, or a table's missing value."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and value != value)


def _value(row: Row, field: str) -> Any:
    if field not in row:
        raise DataError(
            f"the field {field!r} is missing (found: {_names(row)}); rows are {_formats()}; a column of "
            f"another name is given as columns={{{field!r}: 'its name'}}."
        )
    return row[field]


def _text(row: Row, field: str, path: str = "") -> str:
    value = _value(row, field)
    if _empty(value):
        raise EmptyField(f"empty {path or field}")
    if not isinstance(value, str):
        raise DataError(f"the field {path or field!r} must be text; got {value!r}.")
    return value


def _prompt(row: Row, reading: Reading, field: str, default: str | None = None) -> str:
    """The template with the row's texts, of which only that of ``field`` must not be empty."""
    _text(row, field)
    template = reading.template or default or f"{{{field}}}"
    prompt = FIELD.sub(lambda m: "" if _empty(_value(row, m[1])) else _text(row, m[1]), template)
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


def _formats() -> str:
    return " or ".join(map(str, SCHEMAS.values()))
