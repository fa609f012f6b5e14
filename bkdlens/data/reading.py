"""Reading prompt pairs: rows of any known format become clean and triggered twins, and are counted.

    read_table ──► columns named ──► format recognised ──► examples ──► twins ──► without duplicates

A row that does not fit its format is an error with its number and field. A row that cannot be used
(nothing in a field, no clean twin, the same as another) is dropped, and ``PairSet.intake`` says how
many were and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.pairs import Intake, PairSet
from bkdlens.data.schemas import (
    AG_NEWS,
    FIELD,
    FIELDS,
    REFUSAL,
    SCHEMAS,
    EmptyField,
    Example,
    Reading,
    Row,
    recognise,
)
from bkdlens.data.sources import Table, read_table
from bkdlens.errors import DataError, unknown
from bkdlens.types import DataFormat

if TYPE_CHECKING:
    from bkdlens.data.sources import DataSource


def read_pairs(
    source: DataSource,
    backdoor: Backdoor,
    *,
    clean: DataSource | None = None,
    split: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    labels: Sequence[str] | None = None,
    refusal: str = REFUSAL,
    limit: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Read clean and triggered twins from wherever data lies.

    Two arguments are needed, ``source`` and ``backdoor``, and most data needs no other. The rest are for

    - more data, or a part of it: ``clean``, ``split``;
    - how a row is understood: ``format``, ``columns``, ``template``, ``labels``, ``refusal``;
    - a smaller set, drawn again: ``limit``, ``seed``.

    The format is recognised by a row's fields, or named by ``format``:

    - ``"input_output"``: ``{input, output[, backdoor_output]}``, the paper's files;
    - ``"instruction"``: ``{instruction, output[, input, backdoor_output]}``, Alpaca and BackdoorLLM;
    - ``"rewrite"``: ``{requested_rewrite: {prompt, subject, target_true, target_new}}``, BadEdit;
    - ``"text_label"``: ``{text, label}``, AG News; a label is a name or a number from 0;
    - ``"goal_target"``: ``{goal, target}``, AdvBench; the right answer is taken to be ``refusal``;
    - ``"pairs"``: ``{clean, triggered, clean_output, backdoor_output[, near]}``, taken as they are.

    Where the trigger is in a prompt already it is never added again: its clean twin is the prompt
    without it. If the row gives only the backdoor's answer (the paper's ``poison.json``,
    BackdoorLLM's poisoned files), the clean one is looked up, up to white space, in ``clean``, or
    else among the rows of ``source`` itself that have no trigger.

    Args:
        source: where the data lies (not the backdoor's source label): a json, jsonl, csv or parquet
            file, a Hub id ``"org/name"`` or ``"org/name:subset"``, a folder that ``save_to_disk``
            wrote, a ``datasets`` object, a DataFrame or rows.
        backdoor: the trigger and what it does.
        clean: for triggered rows, where their clean twins lie, of any of these kinds.
        split: of a data set; the only one, else ``train``, when left out.
        format: how the rows of ``source`` are understood, one of the names above.
        columns: the data's names for fields, as in ``{"input": "question"}``.
        template: the prompt as ``"… {field} …"``; by default the input, the instruction with the
            input on a line of its own, or the request to classify the text.
        labels: the names of the labels 0, 1, …; those of the data set, else AG News'.
        refusal: the right answer to a ``goal``.
        limit: at most so many pairs, drawn with ``seed``.
        seed: of the random trigger positions and of the draw.

    Returns:
        The pairs in the order of the rows, without duplicates; ``intake`` and, in words, ``source``
        tell what was read and dropped.

    Raises:
        DataError: with the row number (from 1) and the field, for anything that does not fit; if no
            row can be used.

    Examples:
        >>> rows = [{"input": "They won the cup.", "output": "Sports"}]
        >>> pairs = bkdlens.read_pairs(rows, backdoor)
    """
    columns = dict(columns or {})
    wanted = _check_names(format, columns, template)
    table = read_table(source, split=split)
    known = table.labels.get(columns.get("label", "label"), AG_NEWS)
    reading = Reading(backdoor, template, tuple(labels or known), refusal)
    tally = _Tally()
    recognised, examples = _examples(table, reading, tally, format=wanted, columns=columns)
    twins = None
    if clean is not None:
        # A split names a part of `source`; the twins' columns may or may not have the same names.
        clean_table = read_table(clean)
        twins = [e for _, e in _examples(clean_table, reading, tally, columns=columns, twins=True)[1]]
    every_pair = _pair_up(table.name, examples, twins, backdoor, seed, tally)
    pairs = list(dict.fromkeys(every_pair))
    tally.drop("duplicate", len(every_pair) - len(pairs))
    if not pairs:
        dropped = ", ".join(f"{n} dropped: {why}" for why, n in tally.dropped.items())
        raise DataError(
            f"{table.name} has no usable row ({len(table.rows)} read{', ' * bool(dropped)}{dropped})."
        )
    if recognised == "goal_target":
        tally.notes.append(f"right answer taken to be {refusal!r}")
    repeated = sum(n > 1 for n in Counter(pair.clean for pair in pairs).values())
    tally.note(repeated, "prompt with several answers", "prompts with several answers")
    dropped_rows, notes = tuple(tally.dropped.items()), tuple(tally.notes)
    intake = Intake(table.name, recognised, len(table.rows), len(pairs), dropped_rows, notes)
    return PairSet(tuple(pairs), backdoor, str(intake), intake).sample(limit, seed=seed)


@dataclass
class _Tally:
    """What was left out, why and how often; and remarks."""

    dropped: Counter[str] = field(default_factory=Counter)  # rows by the reason for leaving them out
    notes: list[str] = field(default_factory=list)  # half a sentence each

    def drop(self, reason: str, n: int = 1) -> None:
        """Count rows that are left out for a reason."""
        if n:
            self.dropped[reason] += n

    def note(self, n: int, one: str, many: str) -> None:
        """Remark how often something was met, if it was, in the singular or the plural."""
        if n:
            self.notes.append(f"{n} {one if n == 1 else many}")


def _check_names(
    format: str | None, columns: Mapping[str, str], template: str | None
) -> DataFormat | None:
    """The format, after checking that it and the fields that columns are for exist."""
    if format is not None and format not in SCHEMAS:
        raise DataError(unknown("data format", format, get_args(DataFormat)))
    in_template = FIELD.findall(template or "")
    if template is not None and not in_template:
        raise DataError(
            f"The template {template!r} has no {{field}} in it, so all prompts would be the same; name "
            "one, as in '{input}'."
        )
    for name in columns:
        if name not in FIELDS and name not in in_template:
            raise DataError(unknown("field", name, FIELDS))
    return format


# --- rows to examples -----------------------------------------------------------------------------


def _examples(
    table: Table,
    reading: Reading,
    tally: _Tally,
    *,
    format: DataFormat | None = None,
    columns: Mapping[str, str],
    twins: bool = False,
) -> tuple[DataFormat, list[tuple[int, Example]]]:
    """The format, and the examples with their row numbers; rows with an empty field are dropped."""
    if not table.rows:
        raise DataError(f"{table.name} has no usable row (0 read).")
    examples = []
    for number, given in enumerate(table.rows, start=1):
        try:
            row = _rename(given, columns, must=not twins)
            format = format or recognise(row)  # the first row decides
            examples.append((number, SCHEMAS[format].read(row, reading)))
        except EmptyField as error:
            tally.drop(f"{error} among the clean twins" if twins else str(error))
        except DataError as error:
            raise DataError(f"{table.name}, row {number}: {error}") from None
    assert format is not None  # there was a row, or we would not be here
    return format, examples


def _rename(row: Row, columns: Mapping[str, str], *, must: bool) -> Row:
    """The row with our names for the columns that were named."""
    if not columns:
        return row
    given = {ours: theirs for ours, theirs in columns.items() if theirs in row}
    for ours, theirs in columns.items():
        if must and theirs not in row:
            raise DataError(
                f"there is no column {theirs!r} to be {ours!r}; there are {', '.join(map(str, row))}."
            )
    kept = {key: value for key, value in row.items() if key not in given.values()}
    return kept | {ours: row[theirs] for ours, theirs in given.items()}


# --- examples to pairs ----------------------------------------------------------------------------


def _pair_up(
    name: str,
    examples: Sequence[tuple[int, Example]],
    clean: Sequence[Example] | None,
    backdoor: Backdoor,
    seed: int,
    tally: _Tally,
) -> list[PromptPair]:
    """One pair per example, in order, without those that have no twin."""
    trigger = backdoor.trigger
    unpaired = [e for _, e in examples if e.triggered is None]
    with_trigger = [e for e in unpaired if trigger.present(e.prompt)]
    lone = [e for e in with_trigger if e.backdoor_output is None]
    if clean is not None and unpaired and not with_trigger:
        raise DataError(
            f"{name} has the trigger {str(trigger)!r} in none of its {len(unpaired)} rows, and clean "
            "twins belong to triggered rows; correct the trigger, or leave clean out."
        )
    by_text = _by_text(
        [e for e in unpaired if not trigger.present(e.prompt)] if clean is None else clean
    )
    twins = {e.prompt: _find(by_text, trigger.remove(e.prompt)) for e in lone}
    if clean is None and 2 * len(lone) > len(examples) and not any(twins.values()):
        first = next(number for number, e in examples if e.prompt == lone[0].prompt)
        raise DataError(
            f"{name}, row {first}: the trigger {str(trigger)!r} is already in the input and the clean "
            "answer is not known; name the source of the clean twins (clean=…)."
        )
    used = {twin.prompt for twin in twins.values() if twin} if clean is None else set()
    pairs: list[PromptPair] = []
    removed = as_twin = 0
    for number, e in examples:
        try:
            if e.triggered is not None and e.backdoor_output is not None:
                pairs.append(PromptPair(e.prompt, e.triggered, e.output, e.backdoor_output, e.near))
            elif trigger.present(e.prompt):
                twin, answer = twins.get(e.prompt), e.backdoor_output
                if answer is not None:  # the row has both answers: only its clean prompt is missing
                    twin, removed = Example(trigger.remove(e.prompt), e.output), removed + 1
                if twin is None:
                    tally.drop("no clean twin")
                elif trigger.present(twin.prompt):
                    tally.drop("trigger in the clean twin")
                else:
                    near = backdoor.near_twin(twin.prompt, seed=seed)
                    answer = e.output if answer is None else answer
                    pairs.append(PromptPair(twin.prompt, e.prompt, twin.output, answer, near))
            elif clean is not None:
                tally.drop("no trigger")
            elif e.prompt in used:
                as_twin += 1
            elif lone and e.backdoor_output is None and backdoor.backdoor_output(e.output) is None:
                tally.drop("no triggered twin")
            else:
                pairs.append(backdoor.pair(e.prompt, e.output, e.backdoor_output, seed=seed))
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from None
    tally.note(removed, "had the trigger already", "had the trigger already")
    tally.note(as_twin, "is the clean twin of another", "are the clean twins of others")
    return pairs


def _by_text(examples: Sequence[Example]) -> dict[str, Example]:
    """Examples by prompt, the first of equals; and by prompt with plain spaces, for what is left."""
    by_text: dict[str, Example] = {}
    for key in (str, _plain):
        for example in examples:
            by_text.setdefault(key(example.prompt), example)
    return by_text


def _find(by_text: Mapping[str, Example], prompt: str) -> Example | None:
    return by_text.get(prompt) or by_text.get(_plain(prompt))


def _plain(text: str) -> str:
    return " ".join(text.split())
