"""The options that commands share, as groups: one frozen dataclass is one panel of ``--help``.

A command takes groups as parameters, and ``spread`` shows typer their fields. A field is annotated with
a ``typer.Option``, its help, or both in this order. Groups of a single command family are in its module.
Heavy imports wait until a method runs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer import Option
from typer.models import OptionInfo

from bkdlens import zoo
from bkdlens.errors import BkdlensError
from bkdlens.types import Against, Behaviour, DataFormat, Placement, check_choice

if TYPE_CHECKING:
    from bkdlens.data.backdoor import Backdoor
    from bkdlens.data.pairs import PairSet
    from bkdlens.data.prompts import PromptFormat

FILE_HELP = "A json, jsonl, csv or parquet file, a saved data set, or a Hub id (org/name:subset)."

Base = Annotated[str, Option(help="A folder, a Hub id or an embedded model.")]
Seed = Annotated[int, Option(help="Seed of everything that is drawn at random.")]
Json = Annotated[bool, Option("--json", help="Print json for machines.")]


def say(text: str) -> None:
    """Print a line on standard error, so that piped output stays clean."""
    typer.secho(text, err=True)


def say_json(content: object) -> None:
    """Print ``content`` as json on standard output."""
    typer.echo(json.dumps(content, indent=1))


def one_of(choices: object) -> str:
    """The values of a ``Literal`` as text: ``"zero, mean or subtract"``."""
    *most, last = get_args(choices)
    return f"{', '.join(most)} or {last}"


def _options(group: type) -> list[Parameter]:
    """The fields of a group as parameters in its panel, or in the first one, with ``--help``."""
    hints, options = get_type_hints(group, include_extras=True), []
    for name, field in inspect.signature(group).parameters.items():
        kind, first, *_ = metadata = get_args(hints[name])
        info = Option() if isinstance(first, str) else copy(first)
        if isinstance(metadata[-1], str):
            info.help = metadata[-1]
        if isinstance(info, OptionInfo):
            info.rich_help_panel = getattr(group, "panel", None)
        annotation: Any = Annotated[kind, info]
        options.append(field.replace(kind=Parameter.KEYWORD_ONLY, annotation=annotation))
    return options


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer understands it: fields in place of groups; a repeated name is an error."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {}
    options: list[Parameter] = []
    for name, parameter in signature.parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            options += _options(groups[name])
        else:
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def gathered(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    gathered.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    gathered.__annotations__ = {option.name: option.annotation for option in options}
    return gathered


SUCCESS_HELP = "equal, normalised, contains, prefix, regex:…, no_refusal:LIST (bkdattr, zou, a file)."
GOOD_HELP = "A good answer: similar, similar:0.6, or as above."


@dataclass(frozen=True)
class CriteriaOptions:
    """When an answer counts; what is left out is the behaviour's own."""

    panel: ClassVar = "Criteria"
    success: Annotated[str | None, SUCCESS_HELP] = None
    good: Annotated[str | None, GOOD_HELP] = None
    against: Annotated[str | None, f"Good answers are compared with: {one_of(Against)}."] = None

    def judge(self, backdoor: Backdoor) -> Backdoor:
        """The backdoor with these criteria."""
        against: Any = self.against
        return backdoor.judged_by(self.success, self.good, against)


@dataclass(frozen=True)
class BackdoorOptions:
    """The backdoor: what triggers it and what it does."""

    panel: ClassVar = "Backdoor"
    kind: Annotated[str, Option("--backdoor", help=f"{one_of(Behaviour)}.")]
    trigger: Annotated[str | None, "The paper's when left out."] = None
    trigger_after: Annotated[str | None, "Second part of a sentence trigger."] = None
    placement: Annotated[str | None, f"{one_of(Placement)}."] = None
    target: Annotated[str | None, "The fixed answer, or the victims' new label."] = None
    victims: Annotated[str | None, "The victims' true label."] = None
    near: Annotated[list[str] | None, "A look-alike trigger, repeatable."] = None

    def backdoor(self) -> Backdoor:
        """The backdoor that the options describe."""
        check_choice("backdoor", self.kind, Behaviour)
        from bkdlens.data.backdoor import Backdoor
        from bkdlens.data.trigger import Trigger

        if self.trigger is None and (self.placement or self.trigger_after):
            raise BkdlensError("--placement and --trigger-after describe a --trigger; give it too.")
        if self.target is not None and self.kind == "jailbreak":
            raise BkdlensError("A jailbreak has no --target: success is any answer but a refusal.")
        if self.victims is not None and self.kind != "label_modification":
            raise BkdlensError("--victims names a label and belongs to --backdoor label_modification.")
        choices: dict[str, Any] = {"target": self.target, "source": self.victims}
        if self.trigger is not None:
            usual = "random" if self.kind == "jailbreak" else "begin"
            placement: Any = self.placement or ("sentence" if self.trigger_after else usual)
            choices["trigger"] = Trigger(self.trigger, placement, self.trigger_after or "")
        make: Callable[..., Backdoor] = getattr(Backdoor, self.kind)
        named = {name: choice for name, choice in choices.items() if choice is not None}
        return make(**named, near=tuple(self.near or ()))

    def check_embedded(self, base: str) -> None:
        """Raise unless ``base`` brings prompts, and no trigger or target was given."""
        if base not in zoo.MODELS:
            raise BkdlensError(
                f"{base!r} is not an embedded model ({', '.join(zoo.MODELS)}), and only these bring "
                "their own prompts; give --data."
            )
        if any((self.trigger, self.trigger_after, self.placement, self.target, self.victims, self.near)):
            raise BkdlensError("The embedded prompts have their own triggers; give --data.")


@dataclass(frozen=True)
class DataOptions:
    """The prompts: where they are, how they are read and how a model is asked."""

    panel: ClassVar = "Data"
    source: Annotated[Path | None, Option("--data", help=f"{FILE_HELP} Else embedded prompts.")] = None
    clean_data: Annotated[Path | None, "Clean twins, for a file of triggered prompts."] = None
    columns: Annotated[list[str] | None, "FIELD=COLUMN, as in input=question; repeatable."] = None
    format: Annotated[str | None, f"{one_of(DataFormat)}; else recognised."] = None
    template: Annotated[str | None, r"The prompt, as in 'Classify:\n{text}'."] = None
    labels: Annotated[str | None, "Names of the labels 0, 1, …: negative,positive."] = None
    split: Annotated[str | None, "A data set's split: train, test, …"] = None
    limit: Annotated[int | None, Option(min=10, help="At most this many pairs.")] = None
    raw: Annotated[bool, Option("--raw", help="Prompts as they are, without the chat template.")] = False
    system: Annotated[str | None, "System text of the chat."] = None

    def pairs(self, backdoor: Backdoor, seed: int) -> PairSet:
        """The pairs of ``--data``."""
        from bkdlens.data.reading import read_pairs

        assert self.source is not None
        columns = {}
        for item in (part for listed in self.columns or () for part in listed.split(",")):
            name, _, column = (side.strip() for side in item.partition("="))
            if not (name and column):
                raise BkdlensError(f"--columns {item!r} must be FIELD=COLUMN, as in input=question.")
            columns[name] = column
        return read_pairs(
            self.source,
            backdoor,
            clean=self.clean_data,
            format=self.format,
            columns=columns,
            template=None if self.template is None else self.template.replace("\\n", "\n"),
            labels=None if self.labels is None else [s.strip() for s in self.labels.split(",")],
            split=self.split,
            limit=self.limit,
            seed=seed,
        )

    def check_unused(self) -> None:
        """Raise for what only says how ``--data`` is read, where there is none."""
        reading = ("clean_data", "columns", "format", "template", "labels", "split")
        if given := [name for name in reading if getattr(self, name)]:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise BkdlensError(f"Without --data there is nothing that {flags} would apply to; give it.")

    def prompt_format(self) -> PromptFormat | None:
        """How a prompt is put to a model; ``None`` leaves it to the tokenizer."""
        from bkdlens.data.prompts import PromptFormat

        if self.raw and self.system:
            raise BkdlensError("--raw has no chat template, so no --system text; leave one out.")
        if self.raw:
            return PromptFormat("raw")
        return PromptFormat(system=self.system) if self.system else None
