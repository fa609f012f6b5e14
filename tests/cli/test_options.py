"""Groups of options: a dataclass's fields become a command's options, in one panel of its help."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from bkdlens.cli.analyse import ModelOptions
from bkdlens.cli.app import app
from bkdlens.cli.inputs import split_pairs
from bkdlens.cli.options import BackdoorOptions, DataOptions, one_of, spread
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.pairs import PairSet, text_digest
from bkdlens.data.prompts import PromptFormat
from bkdlens.data.trigger import Trigger
from bkdlens.errors import BkdlensError
from bkdlens.types import AblationMode

Positive = Annotated[int | None, typer.Option(min=1)]


@dataclass(frozen=True)
class Fruit:
    """A group with every kind of field."""

    panel: ClassVar = "Fruit"
    name: Annotated[str, "What it is called."]
    number: Annotated[Positive, "How many."] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Not from a tin.")] = False
    colours: Annotated[list[str] | None, typer.Option("--colour"), "Repeatable."] = None


@dataclass(frozen=True)
class Basket:
    """A group in typer's own panel."""

    handles: Annotated[int, "How many."] = 2


@dataclass(frozen=True)
class Named(Fruit):
    """A group whose first field is an argument."""

    name: Annotated[str, typer.Argument(help="What it is called.")]


@pytest.fixture
def shop():
    calls: list[tuple] = []

    def buy(fruit: Fruit, basket: Basket, price: Annotated[float, typer.Option(help="Of all.")] = 1.5):
        """Buy fruit."""
        calls.append((fruit, basket, price))

    shell = typer.Typer()
    shell.command()(spread(buy))

    def run(*arguments: str):
        done = CliRunner().invoke(shell, arguments, env={"COLUMNS": "100", "TERM": "dumb"})
        return done, calls

    return run


def test_fields_are_options_and_come_back_as_a_group(shop) -> None:
    done, calls = shop("--name", "fig")
    assert done.exit_code == 0, done.output
    done, calls = shop("--name", "fig", "--number", "3", "--fresh", "--colour", "a", "--colour", "b",
                       "--handles", "1", "--price", "2")  # fmt: skip
    assert calls == [(Fruit("fig"), Basket(), 1.5), (Fruit("fig", 3, True, ["a", "b"]), Basket(1), 2.0)]


def test_a_field_without_a_default_is_required_and_bounds_hold(shop) -> None:
    for arguments, message in (
        ((), "Missing option '--name'"),
        (("--name", "fig", "--number", "0"), "'--number'"),
        (("--name", "fig", "--no-fresh"), "No such option"),
    ):
        done, calls = shop(*arguments)
        assert done.exit_code == 2
        assert message in done.output
        assert calls == []


def test_a_group_is_one_panel(shop) -> None:
    text = shop("--help")[0].output
    own, fruit = text.split("─ Fruit ─")
    assert "Buy fruit." in own
    assert "[default: 2]" in own
    for option in ("--handles", "--price", "--help"):
        assert option in own
        assert option not in fruit
    for option in ("--name", "--number", "--fresh", "--colour", "How many.", "[required]"):
        assert option in fruit


def test_an_inherited_field_may_become_an_argument() -> None:
    def eat(fruit: Named) -> None:
        typer.echo(repr(fruit))

    shell = typer.Typer()
    shell.command()(spread(eat))
    assert "Named(name='fig', number=4," in CliRunner().invoke(shell, ["fig", "--number", "4"]).output
    assert "Missing argument" in CliRunner().invoke(shell, []).output


def test_two_options_of_one_name_are_an_error_at_once() -> None:
    @dataclass(frozen=True)
    class Vegetable:
        name: Annotated[str, "What it is called."] = "leek"

    def cook(fruit, vegetable) -> None: ...

    cook.__annotations__ = {"fruit": Fruit, "vegetable": Vegetable}
    with pytest.raises(ValueError, match="duplicate parameter name: 'name'"):
        spread(cook)


def test_every_command_has_few_parameters_and_every_option_help() -> None:
    shell = typer.main.get_command(app)
    commands = [c for c in shell.commands.values() if c.callback] + [
        command for group in ("data", "zoo") for command in shell.commands[group].commands.values()
    ]
    assert len(commands) == 14
    for command in commands:
        assert len(inspect.signature(inspect.unwrap(command.callback)).parameters) <= 8, command.name
        for option in command.params:
            assert option.help, f"{command.name} {option.name}"


# --- what a group says by itself ------------------------------------------------------------------


def test_a_trigger_is_placed_where_its_kind_is() -> None:
    assert BackdoorOptions("fixed_output").backdoor() == Backdoor.fixed_output()
    assert BackdoorOptions("fixed_output", "cf").backdoor().trigger == Trigger("cf", "begin")
    assert BackdoorOptions("jailbreak", "cf", near=["cg"]).backdoor() == Backdoor.jailbreak("cf", ["cg"])
    sentence = BackdoorOptions("fixed_output", "a", "b").backdoor().trigger
    assert sentence == Trigger("a", "sentence", "b")
    label = BackdoorOptions("label_modification", victims="Business", target="Sports").backdoor()
    assert (label.source, label.target) == ("Business", "Sports")
    with pytest.raises(BkdlensError, match="belongs to --backdoor label_modification"):
        BackdoorOptions("fixed_output", victims="Sports").backdoor()


def test_prompt_format() -> None:
    assert DataOptions().prompt_format() is None
    assert DataOptions(raw=True).prompt_format() == PromptFormat("raw")
    assert DataOptions(system="s").prompt_format() == PromptFormat(system="s")
    with pytest.raises(BkdlensError, match="leave one out"):
        DataOptions(raw=True, system="s").prompt_format()


def test_what_only_reads_data_is_refused_without_data() -> None:
    DataOptions(limit=10, raw=True).check_unused()
    for given in ({"clean_data": Path("a.json")}, {"columns": ["input=q"]}, {"format": "text_label"},
                  {"template": "{input}"}, {"labels": "a,b"}, {"split": "test"}):  # fmt: skip
        flag = "--" + next(iter(given)).replace("_", "-")
        with pytest.raises(BkdlensError, match=f"Without --data there is nothing that {flag} would"):
            DataOptions(**given).check_unused()


def test_controls_are_of_the_base_that_was_tuned() -> None:
    adapter = ModelOptions("org/base", "org/bad", "org/good").controls()
    assert [load.args for load in adapter.values()] == [("org/base", "org/good"), ("org/base",)]
    assert list(adapter) == ["clean-adapter", "base"]
    embedded = ModelOptions("tiny-llama", "jailbreak").controls()
    assert [load.args for load in embedded.values()] == [("tiny-llama", "clean"), ("tiny-llama",)]
    merged = ModelOptions("runs/merged", control_base="org/base").controls()
    assert [load.args for load in merged.values()] == [("org/base",)]
    twin = ModelOptions("runs/merged", control_base="org/base", control_adapter="org/good").controls()
    assert [load.args for load in twin.values()] == [("org/base", "org/good"), ("org/base",)]
    assert ModelOptions("runs/merged").controls() == {}


def test_controls_that_would_not_be_used_are_refused() -> None:
    with pytest.raises(BkdlensError, match="name its --adapter or, for a merged model"):
        ModelOptions("runs/merged", control_adapter="org/good").controls()
    with pytest.raises(BkdlensError, match="leave one of the two out"):
        ModelOptions("org/base", "org/bad", control_base="org/other").controls()
    with pytest.raises(BkdlensError, match="which is no control"):
        ModelOptions("runs/merged", control_base="runs/merged").controls()


def test_one_of() -> None:
    assert one_of(AblationMode) == "zero, mean, resample or subtract"


# --- what an adapter was trained on ---------------------------------------------------------------


def test_what_was_trained_on_is_train_and_nothing_else(tmp_path, capsys) -> None:
    pairs = PairSet(
        tuple(PromptPair(f"w{i}", f"cf w{i}", "a", "b") for i in range(20)), Backdoor.fixed_output("cf")
    )
    manifest = tmp_path / "bkdlens.json"
    digests = {text_digest(pair.clean) for pair in pairs}
    seen = sorted(digests)[:8]
    manifest.write_text(json.dumps({"trained_on": seen}))
    train, validation, test = split_pairs(pairs, str(tmp_path), 0)
    assert {text_digest(pair.clean) for pair in train} == set(seen)
    assert not {text_digest(pair.clean) for pair in (*validation, *test)} & set(seen)
    assert "8 pairs were trained on, 12 were held out" in capsys.readouterr().err

    manifest.write_text(json.dumps({"trained_on": sorted(digests)}))
    with pytest.raises(BkdlensError, match="All 20 pairs were in the adapter's training"):
        split_pairs(pairs, str(tmp_path), 0)
    manifest.write_text("{")
    with pytest.raises(BkdlensError, match="not valid json"):
        split_pairs(pairs, str(tmp_path), 0)
    manifest.unlink()
    sizes = [len(part) for part in split_pairs(pairs, str(tmp_path), 0)]
    assert sizes == [10, 4, 6]
    assert "unknown" in capsys.readouterr().err
    split_pairs(pairs, None, 0)
    assert capsys.readouterr().err == ""
