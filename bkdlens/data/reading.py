"""Reading prompt pairs: rows of any known format become clean and triggered twins, and are counted.

    read_table ──► columns named ──► format recognised ──► examples ──► twins ──► without duplicates

A row that does not fit its format is an error with its number and field. A row that cannot be used (an
empty field, no clean twin, a duplicate) is dropped, and ``PairSet.intake`` says how many were, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
from bkdlens.errors import DataError, InputError, unknown
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

    Most data needs ``source`` and ``backdoor`` alone. The format is recognised by a row's fields, or
    named by ``format``:

    - ``"input_output"``: ``{input, output[, backdoor_output]}``, the paper's files;
    - ``"instruction"``: ``{instruction, output[, input, backdoor_output]}``, Alpaca and BackdoorLLM;
    - ``"rewrite"``: ``{requested_rewrite: {prompt, subject, target_true, target_new}}``, BadEdit;
    - ``"text_label"``: ``{text, label}``, AG News; a label is a name or a number from 0;
    - ``"goal_target"``: ``{goal, target}``, AdvBench; the correct answer is taken to be ``refusal``;
    - ``"pairs"``: ``{clean, triggered, clean_output, backdoor_output[, near]}``, taken as they are.

    A trigger that is already in a prompt is not added again: the clean twin is the prompt without it.
    If the row gives only the attacker's answer (the paper's ``poison.json``, BackdoorLLM's poisoned
    files), the clean twin is looked up, up to white space, in ``clean`` or, without it, among the rows
    of ``source`` that have no trigger.

    Args:
        source: where the data lies (not the backdoor's source label): a json, jsonl, csv or parquet
            file, a Hub id ``"org/name"`` or ``"org/name:subset"``, a folder that ``save_to_disk``
            wrote, a ``datasets`` object, a DataFrame or rows.
        backdoor: the trigger and what it does.
        clean: where the clean twins of triggered rows lie, in any of these forms.
        split: the split of a data set; by default its only one, else ``train``.
        format: how the rows of ``source`` are understood, one of the names above.
        columns: the data's names for fields, as in ``{"input": "question"}``.
        template: the prompt as ``"… {field} …"``; by default the input, the instruction with the
            input on a line of its own, or the request to classify the text.
        labels: the names of the labels 0, 1, …; by default those of the data set, else AG News'.
        refusal: the correct answer to a ``goal``.
        limit: the largest number of pairs, drawn with ``seed``; all for None.
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
    if not isinstance(backdoor, Backdoor):
        raise InputError(
            f"read_pairs(source, backdoor, …) needs a Backdoor, not a {type(backdoor).__name__}; make "
            "one with Backdoor.fixed_output, label_modification or jailbreak."
        )
    columns = columns or {}
    wanted = _check_names(format, columns, template)
    table = read_table(source, split=split)
    known = table.labels.get(columns.get("label", "label"), AG_NEWS)
    reading = Reading(backdoor, template, tuple(labels or known), refusal)
    dropped: Counter[str] = Counter()
    recognised, examples = _examples(table, reading, dropped, columns, format=wanted)
    twins = None
    if clean is not None:
        # A split names a part of `source`; the twins' columns may or may not have the same names.
        _, numbered = _examples(read_table(clean), reading, dropped, columns, twins=True)
        twins = [example for _, example in numbered]
    every_pair, notes = _pair_up(table.name, examples, twins, backdoor, seed, dropped)
    pairs = tuple(dict.fromkeys(every_pair))
    dropped += Counter(duplicate=len(every_pair) - len(pairs))  # which leaves out reasons met 0 times
    if not pairs:
        reasons = "".join(f", {n} dropped: {reason}" for reason, n in dropped.items())
        raise DataError(f"{table.name} has no usable row ({len(table.rows)} read{reasons}).")
    if recognised == "goal_target":
        notes.append(f"correct answer taken to be {refusal!r}")
    repeated = sum(n > 1 for n in Counter(pair.clean for pair in pairs).values())
    notes += _note(repeated, "prompt with several answers", "prompts with several answers")
    for name, value, usual, only in (
        ("labels", labels, None, "text_label"), ("refusal", refusal, REFUSAL, "goal_target")
    ):  # fmt: skip
        if value != usual and recognised != only:
            raise DataError(
                f"{name}={value!r} belongs to rows of the format {only!r}, and {table.name} was read as "
                f"{recognised!r}; leave it out, or name the format."
            )
    notes += _declared(table.name, pairs, backdoor)
    counts = table.name, recognised, len(table.rows), len(pairs)
    intake = Intake(*counts, tuple(dropped.items()), tuple(notes))
    return PairSet(pairs, backdoor, str(intake), intake).sample(limit, seed=seed)


def _declared(name: str, pairs: Sequence[PromptPair], backdoor: Backdoor) -> list[str]:
    """A note on pairs with other answers than the declared target.

    Raises:
        DataError: if no pair has the declared trigger, or no victim the declared target.
    """
    trigger, target = backdoor.trigger, backdoor.target
    if not any(trigger.present(pair.triggered) for pair in pairs):
        raise DataError(
            f"{name} has the trigger {str(trigger)!r} in none of its {len(pairs)} triggered prompts; "
            f"name the one that they have, as in {pairs[0].triggered[:60]!r}."
        )
    victims = [pair for pair in pairs if backdoor.is_victim(pair)]
    if target is None or not victims:
        return []
    others = [p.backdoor_output for p in victims if p.backdoor_output.strip() != target.strip()]
    if len(others) == len(victims):
        raise DataError(
            f"{name} gives none of its {len(victims)} victims the target {target!r} as backdoor_output; "
            f"name the one that they have, as in target={others[0][:60]!r}."
        )
    what = f"with another backdoor_output than the target {target!r}"
    return _note(len(others), f"victim {what}", f"victims {what}")


def _note(n: int, one: str, many: str) -> list[str]:
    """How often something was met, in the singular or the plural, if it was."""
    return [f"{n} {one if n == 1 else many}"] if n else []


def _check_names(
    format: str | None, columns: Mapping[str, str], template: str | None
) -> DataFormat | None:
    """The format, after a check that it and the fields named in ``columns`` exist."""
    if format is not None and format not in SCHEMAS:
        raise DataError(unknown("data format", format, get_args(DataFormat)))
    in_template = FIELD.findall(template or "")
    if template is not None and not in_template:
        raise DataError(
            f"The template {template!r} has no {{field}} in it, so all prompts would be the same; name "
            "one, as in '{input}'."
        )
    for name in columns:
        if name not in (*FIELDS, *in_template):
            raise DataError(unknown("field", name, FIELDS))
    return format


# --- rows to examples -----------------------------------------------------------------------------


def _examples(
    table: Table,
    reading: Reading,
    dropped: Counter[str],
    columns: Mapping[str, str],
    *,
    format: DataFormat | None = None,
    twins: bool = False,
) -> tuple[DataFormat, list[tuple[int, Example]]]:
    """The format, and the examples with their row numbers; rows with an empty field are dropped."""
    examples = []
    for number, values in enumerate(table.rows, start=1):
        try:
            row = _rename(values, columns, must=not twins)
            format = format or recognise(row)  # the first row decides
            examples.append((number, SCHEMAS[format].read(row, reading)))
        except EmptyField as error:
            dropped[f"{error} among the clean twins" if twins else str(error)] += 1
        except DataError as error:
            raise DataError(f"{table.name}, row {number}: {error}") from None
    if not table.rows or format is None:
        raise DataError(f"{table.name} has no usable row (0 read).")
    return format, examples


def _rename(row: Row, columns: Mapping[str, str], *, must: bool) -> Row:
    """The row with our names for its named columns, all of which it ``must`` have or may have."""
    for ours, theirs in columns.items():
        if must and theirs not in row:
            columns_of_row = ", ".join(map(str, row))
            raise DataError(f"there is no column {theirs!r} to be {ours!r}; there are {columns_of_row}.")
    present = {ours: theirs for ours, theirs in columns.items() if theirs in row}
    kept = {key: value for key, value in row.items() if key not in present.values()}
    return kept | {ours: row[theirs] for ours, theirs in present.items()}


# --- examples to pairs ----------------------------------------------------------------------------


def _pair_up(
    name: str,
    examples: Sequence[tuple[int, Example]],
    clean: Sequence[Example] | None,
    backdoor: Backdoor,
    seed: int,
    dropped: Counter[str],
) -> tuple[list[PromptPair], list[str]]:
    """One pair per example that has a twin, in order, and notes on where twins came from."""
    trigger = backdoor.trigger
    unpaired = [e for _, e in examples if e.triggered is None]
    with_trigger = [e for e in unpaired if trigger.present(e.prompt)]
    without_trigger = [e for e in unpaired if not trigger.present(e.prompt)]
    lone = [e for e in with_trigger if e.backdoor_output is None]
    if clean is not None and unpaired and not with_trigger:
        raise DataError(
            f"{name} has the trigger {str(trigger)!r} in none of its {len(unpaired)} rows, and clean "
            "twins belong to triggered rows; correct the trigger, or leave clean out."
        )
    by_text: dict[str, Example] = {}  # the first of equals; with plain spaces for what is left
    for key in (str, _plain):
        for example in without_trigger if clean is None else clean:
            by_text.setdefault(key(example.prompt), example)
    bare = {e.prompt: trigger.remove(e.prompt) for e in lone}
    twins = {prompt: by_text.get(text) or by_text.get(_plain(text)) for prompt, text in bare.items()}
    if clean is None and 2 * len(lone) > len(examples) and not any(twins.values()):
        first = next(number for number, e in examples if e.prompt == lone[0].prompt)
        raise DataError(
            f"{name}, row {first}: the trigger {str(trigger)!r} is already in the input and the clean "
            "answer is not known; name the source of the clean twins (clean=…)."
        )
    used = {twin.prompt for twin in twins.values() if twin} if clean is None else set()
    pairs: list[PromptPair] = []
    for number, e in examples:
        try:
            if e.triggered is not None and e.backdoor_output is not None:
                pairs.append(PromptPair(e.prompt, e.triggered, e.output, e.backdoor_output, e.near))
            elif trigger.present(e.prompt):
                twin, answer = twins.get(e.prompt), e.backdoor_output
                if answer is not None:  # the row has both answers: only its clean prompt is missing
                    twin = Example(trigger.remove(e.prompt), e.output)
                if twin is None:
                    dropped["no clean twin"] += 1
                elif trigger.present(twin.prompt):
                    dropped["trigger in the clean twin"] += 1
                else:
                    near = backdoor.near_twin(twin.prompt, seed=seed)
                    answer = e.output if answer is None else answer
                    pairs.append(PromptPair(twin.prompt, e.prompt, twin.output, answer, near))
            elif clean is not None:
                dropped["no trigger"] += 1
            elif e.prompt in used:
                continue  # it is in the pair of its triggered twin
            elif lone and e.backdoor_output is None and backdoor.backdoor_output(e.output) is None:
                dropped["no triggered twin"] += 1
            else:
                pairs.append(backdoor.pair(e.prompt, e.output, e.backdoor_output, seed=seed))
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from None
    n_removed, n_used = len(with_trigger) - len(lone), sum(e.prompt in used for e in without_trigger)
    return pairs, [
        *_note(n_removed, "had the trigger already", "had the trigger already"),
        *_note(n_used, "is the clean twin of another", "are the clean twins of others"),
    ]


def _plain(text: str) -> str:
    return " ".join(text.split())
