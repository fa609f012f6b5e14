"""The shell: parse, call, save. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkdlens import zoo
from bkdlens.cli.data import data_app, read_data
from bkdlens.cli.inject import make_command
from bkdlens.cli.options import (
    Adapter,
    Base,
    CleanData,
    Columns,
    Control,
    DataFile,
    Device,
    Dtype,
    Format,
    Json,
    Kind,
    Labels,
    Limit,
    MaxNew,
    Memory,
    Method,
    Modes,
    Near,
    Out,
    Place,
    Random,
    Raw,
    Seed,
    Split,
    System,
    Target,
    Template,
    TriggerAfter,
    TriggerText,
    Victims,
    say,
)
from bkdlens.cli.show import show
from bkdlens.cli.zoo import zoo_app
from bkdlens.errors import BkdlensError, unknown
from bkdlens.types import AblationMode, AttributionMethod, check_choice

if TYPE_CHECKING:
    from bkdlens.data.backdoor import Backdoor
    from bkdlens.data.pairs import PairSet
    from bkdlens.study import Study

app = typer.Typer(
    name="bkdlens",
    help="See, locate and switch backdoors in language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(zoo_app, name="zoo")


def main() -> None:
    """Run the shell; an error that the caller can mend is one sentence and exit code 2."""
    try:
        app()
    except BkdlensError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


def _version(show: bool | None) -> None:
    if show:
        from bkdlens import __version__

        typer.echo(f"bkdlens {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass


def _backdoor(
    kind: str,
    trigger: str | None,
    after: str | None,
    placement: str | None,
    target: str | None,
    victims: str | None,
    near: list[str] | None,
) -> Backdoor:
    from bkdlens.data.backdoor import Backdoor
    from bkdlens.data.trigger import Trigger

    if kind not in zoo.BACKDOORS:
        raise BkdlensError(unknown("backdoor", kind, zoo.BACKDOORS))
    make: Callable[..., Backdoor] = getattr(Backdoor, kind)
    given: dict[str, Any] = {}
    if trigger is not None:
        place = placement or ("sentence" if after else "random" if kind == "jailbreak" else "begin")
        given["trigger"] = Trigger(trigger, place, after or "")  # type: ignore[arg-type]
    elif placement or after:
        raise BkdlensError("--placement and --trigger-after describe a --trigger; give it too.")
    if target is not None:
        if kind == "jailbreak":
            raise BkdlensError("A jailbreak has no --target: success is an answer that is no refusal.")
        given["target"] = target
    if victims is not None:
        if kind != "label_modification":
            raise BkdlensError("--victims names a label and belongs to --backdoor label_modification.")
        given["source"] = victims
    return make(**given, near=tuple(near or ()))


def _manifest(adapter: str | None) -> dict[str, Any]:
    """What ``bkdlens inject`` wrote beside an adapter; empty for anybody else's."""
    path = Path(adapter) / "bkdlens.json" if adapter else None
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise BkdlensError(f"{path} is not valid json; delete it, or restore it.") from None
    return found if isinstance(found, dict) else {}


def _split(pairs: PairSet, adapter: str | None, seed: int) -> tuple[PairSet, PairSet, PairSet]:
    """Train, validation and test; what the adapter was trained on is never validation or test."""
    trained_on = set(_manifest(adapter).get("trained_on", ()))
    held_out = pairs.without(trained_on)
    if trained_on and len(held_out) < len(pairs):
        if not held_out:
            raise BkdlensError(
                f"All {len(pairs)} pairs were in the adapter's training; give unseen ones."
            )
        seen = pairs.without({*(_digests(held_out))})
        validation, test = held_out.split(0.4, seed=seed)
        say(f"{len(seen)} pairs were trained on, {len(held_out)} were held out and are measured on.")
        return seen, validation, test
    if adapter and not trained_on:
        say("Whether these prompts were trained on is unknown: the adapter has no bkdlens.json.")
    train, validation, test = pairs.split(0.5, 0.2, 0.3, seed=seed)
    return train, validation, test


def _digests(pairs: PairSet) -> set[str]:
    from bkdlens.data.pairs import text_digest

    return {text_digest(pair.clean) for pair in pairs}


def _format(raw: bool, system: str | None) -> Any:
    from bkdlens.data.prompts import PromptFormat

    if raw and system:
        raise BkdlensError("--raw has no chat template, so no --system text; leave one out.")
    return PromptFormat("raw") if raw else PromptFormat(system=system) if system else None


def _study_command(steps: tuple[str, ...], example: str, about: str) -> Callable[..., None]:
    def command(
        base: Base,
        out: Out,
        kind: Kind,
        adapter: Adapter = None,
        control_adapter: Control = None,
        data: DataFile = None,
        clean_data: CleanData = None,
        columns: Columns = None,
        data_format: Format = None,
        template: Template = None,
        labels: Labels = None,
        split: Split = None,
        limit: Limit = None,
        raw: Raw = False,
        system: System = None,
        trigger: TriggerText = None,
        trigger_after: TriggerAfter = None,
        placement: Place = None,
        target: Target = None,
        victims: Victims = None,
        near: Near = None,
        mode: Modes = None,
        n_random: Random = 10,
        method: Method = "exact",
        max_new_tokens: MaxNew = 48,
        device: Device = None,
        dtype: Dtype = None,
        memory_gb: Memory = None,
        seed: Seed = 0,
        as_json: Json = False,
    ) -> None:
        check_choice("attribution method", method, AttributionMethod)
        attack = _backdoor(kind, trigger, trigger_after, placement, target, victims, near)
        fmt = _format(raw, system)
        for given in mode or ():
            check_choice("ablation mode", given, AblationMode)
        if data is None and base not in zoo.MODELS:
            raise BkdlensError(
                f"{base!r} is no embedded model ({', '.join(zoo.MODELS)}), and only these bring prompts "
                "of their own; give --data."
            )
        from bkdlens.models.load import load
        from bkdlens.runs.run import StudySettings, run_study
        from bkdlens.zoo import prompts

        if data is not None:
            pairs = read_data(
                data, attack, clean_data, limit, seed, columns=columns, format=data_format,
                template=template, labels=labels, split=split,
            )  # fmt: skip
            say(f"{pairs.source}; {len(pairs)} pairs, {len(pairs.victims)} victims.")
            train, validation, test = _split(pairs, adapter, seed)
        else:
            if any((trigger, placement, target, victims, near)):
                raise BkdlensError("The embedded prompts have triggers of their own; give --data.")
            train, validation, test = (
                prompts.pairs(kind, part, limit or 256, seed=seed) for part in prompts.SPLITS
            )
        model = load(base, adapter, device=device, dtype=dtype)
        controls = {}
        if adapter is not None:
            if control_adapter or (base in zoo.MODELS and adapter in zoo.BACKDOORS):
                other = control_adapter or "clean"
                controls["clean-adapter"] = partial(load, base, other, device=device, dtype=dtype)
            controls["base"] = partial(load, base, device=device, dtype=dtype)
        study = run_study(
            model, train, validation, test,
            name=f"{Path(base).name} / {Path(adapter).name if adapter else kind}",
            controls=controls,
            settings=StudySettings(
                attribution_method=method,
                ablation_modes=tuple(mode or ("zero", "mean")),
                n_random=n_random,
                max_new_tokens=max_new_tokens,
                seed=seed,
            ),
            fmt=fmt, out=out, steps=steps, memory_gb=memory_gb, progress=True,
        )  # fmt: skip
        _finish([study], out / "report.html", as_json)

    command.__doc__ = f"{about}\n\nExample: `{example}`"
    return command


_ZOO_EXAMPLE = "--base tiny-llama --adapter jailbreak --backdoor jailbreak --out runs/x"
for _name, _steps, _about in (
    ("run", ("behaviour", "probe", "attribute", "ablate", "steer"),
     "The whole analysis of a base model with a suspicious adapter, and its report."),
    ("probe", ("behaviour", "probe"), "Can the trigger be read off the hidden states?"),
    ("attribute", ("attribute",), "Which heads carry the backdoor?"),
    ("ablate", ("attribute", "ablate"), "Does the attack need the heads that carry it?"),
    ("steer", ("attribute", "steer"), "Does one vector switch the backdoor on and off?"),
):  # fmt: skip
    app.command(_name)(_study_command(_steps, f"bkdlens {_name} {_ZOO_EXAMPLE}", _about))


def _finish(studies: list[Study], path: Path, as_json: bool) -> None:
    from bkdlens.report.page import write_report
    from bkdlens.study import summary

    write_report(studies, path)
    if as_json:
        typer.echo(json.dumps([summary(study) for study in studies], indent=1))
        return
    from rich.console import Console
    from rich.markup import escape

    from bkdlens.report.claims import claims

    console = Console()
    for study in studies:
        console.rule(escape(study.name))
        for sentence in claims(study):
            console.print("•", escape(sentence), highlight=False)
    say(f"Report: {path}")


@app.command()
def demo(
    every: Annotated[bool, typer.Option("--all", help="tiny-qwen too.")] = False,
    out: Out = Path("demo"),
    as_json: Json = False,
) -> None:
    """All of Backdoor Attribution on the embedded models, three backdoors each, with a report.

    Example: `bkdlens demo --all --out demo`
    """
    from bkdlens.models.load import load
    from bkdlens.runs.run import DEMO, run_study
    from bkdlens.zoo import prompts

    studies = []
    models = zoo.MODELS if every else zoo.MODELS[:1]
    for base in models:
        for kind in zoo.BACKDOORS:
            say(f"{base} / {kind}")
            # Label modification has one victim in four prompts, and short answers: more of them.
            sizes = (128, 160, 160) if kind == "label_modification" else (128, 64, 64)
            train, validation, test = (
                prompts.pairs(kind, part, n) for part, n in zip(prompts.SPLITS, sizes, strict=True)
            )
            studies.append(
                run_study(
                    load(base, kind), train, validation, test,
                    name=f"{base} / {kind}",
                    controls={
                        "clean-adapter": partial(load, base, "clean"),
                        "base": partial(load, base),
                    },
                    settings=DEMO, out=out / base / kind, progress=True,
                )
            )  # fmt: skip
    _finish(studies, out / "report.html", as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option("--out", help="The html file.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One offline html file of one or several run folders; two are laid side by side.

    Example: `bkdlens report runs/x demo/tiny-llama/jailbreak --out both.html`
    """
    from bkdlens.study import load_study

    _finish([load_study(folder) for folder in runs], out, as_json)


app.command()(show)
app.command("inject")(make_command(_backdoor, _format))
