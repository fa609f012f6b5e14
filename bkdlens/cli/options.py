"""The options that several commands of the shell share, and how they talk beside their output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bkdlens import zoo

MODEL, DATA, BACKDOOR, OUTPUT = "Model", "Data", "Backdoor", "Output"
FILE_HELP = "A json, jsonl, csv or parquet file, a saved data set, or a Hub id (org/name:subset)."

Base = Annotated[
    str, typer.Option("--base", help="A folder, a Hub id or an embedded model.", rich_help_panel=MODEL)
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", help="A peft folder, a Hub id or an embedded adapter.", rich_help_panel=MODEL
    ),
]
Control = Annotated[
    str | None,
    typer.Option(
        "--control-adapter", help="Tuned on the same data without poison.", rich_help_panel=MODEL
    ),
]
Device = Annotated[str | None, typer.Option("--device", rich_help_panel=MODEL)]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.", rich_help_panel=MODEL)
]
DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help=f"{FILE_HELP} Embedded prompts without.",
        rich_help_panel=DATA,
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns", help="FIELD=COLUMN, as in input=question; repeatable.", rich_help_panel=DATA
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="pairs, rewrite, instruction, goal_target, input_output or text_label; else recognised.",
        rich_help_panel=DATA,
    ),
]
Template = Annotated[
    str | None,
    typer.Option("--template", help=r"The prompt, as in 'Classify:\n{text}'.", rich_help_panel=DATA),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels", help="Names of the labels 0, 1, …: negative,positive.", rich_help_panel=DATA
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="Of a data set: train, test, …", rich_help_panel=DATA)
]
CleanData = Annotated[
    Path | None,
    typer.Option("--clean-data", help="Clean twins of a triggered --data file.", rich_help_panel=DATA),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=10, help="At most so many pairs.", rich_help_panel=DATA)
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Prompts as they are, without the chat template.", rich_help_panel=DATA),
]
System = Annotated[
    str | None, typer.Option("--system", help="System text of the chat.", rich_help_panel=DATA)
]
Kind = Annotated[
    str,
    typer.Option("--backdoor", help=f"One of {', '.join(zoo.BACKDOORS)}.", rich_help_panel=BACKDOOR),
]
TriggerText = Annotated[
    str | None,
    typer.Option("--trigger", help="The paper's when left out.", rich_help_panel=BACKDOOR),
]
TriggerAfter = Annotated[
    str | None,
    typer.Option("--trigger-after", help="Second part of a sentence trigger.", rich_help_panel=BACKDOOR),
]
Place = Annotated[
    str | None,
    typer.Option("--placement", help="begin, end, random or sentence.", rich_help_panel=BACKDOOR),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", help="The fixed answer, or the victims' new label.", rich_help_panel=BACKDOOR
    ),
]
Victims = Annotated[
    str | None,
    typer.Option("--victims", help="The victims' true label.", rich_help_panel=BACKDOOR),
]
Near = Annotated[
    list[str] | None,
    typer.Option("--near", help="A look-alike trigger, repeatable.", rich_help_panel=BACKDOOR),
]
Out = Annotated[
    Path, typer.Option("--out", help="A new folder, or one to go on with.", rich_help_panel=OUTPUT)
]
Seed = Annotated[int, typer.Option("--seed")]
Json = Annotated[bool, typer.Option("--json", help="Print json for machines.", rich_help_panel=OUTPUT)]
Random = Annotated[int, typer.Option("--n-random", min=0, help="Draws of each random control.")]
Method = Annotated[
    str,
    typer.Option(
        "--method", help="Attribution: exact, screened (a quarter of the heads is exact) or atp."
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory-gb", help="The most memory beside the model; else 2 on a CPU.", rich_help_panel=MODEL
    ),
]
Modes = Annotated[
    list[str] | None,
    typer.Option("--mode", help="Ablation: zero, mean, resample or subtract; repeatable."),
]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1)]


def say(text: str) -> None:
    """A line on standard error, so that what is piped stays clean."""
    typer.secho(text, err=True)
