"""``bkdlens inject``: planting a backdoor from the shell, by any of the three methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkdlens import zoo
from bkdlens.cli.data import read_data
from bkdlens.cli.options import (
    Base,
    CleanData,
    Columns,
    DataFile,
    Format,
    Json,
    Kind,
    Labels,
    Limit,
    Near,
    Place,
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
from bkdlens.errors import BkdlensError

if TYPE_CHECKING:
    from bkdlens.data.backdoor import Backdoor
    from bkdlens.data.pairs import PairSet
    from bkdlens.inject.recipes import Recipe

TUNING, PREFERENCE, EDIT = "Tuning (supervised, preference)", "Preference", "Edit"
N_TEST = 400  # embedded prompts on which an adapter is measured


def _option(flag: str, text: str, panel: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=panel, **more)


def make_command(
    backdoor: Callable[..., Backdoor], prompt_format: Callable[..., Any]
) -> Callable[..., None]:
    """The command; what it shares with the others is handed down by ``cli``."""

    def inject(
        base: Base,
        out: Annotated[Path, typer.Option("--out", help="A new folder for the adapter.")],
        kind: Kind,
        method: Annotated[
            str, typer.Option("--method", help="supervised, preference or edit.")
        ] = "supervised",
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
        hold_out: Annotated[
            float,
            typer.Option("--hold-out", min=0.0, max=0.9, help="Share of --data kept for measuring."),
        ] = 0.2,
        poison_rate: Annotated[
            float | None, _option("--poison-rate", "Share triggered.", TUNING, min=0.0, max=1.0)
        ] = None,
        near_rate: Annotated[
            float | None,
            _option(
                "--near-rate",
                "Share with a near trigger and the right answer.",
                TUNING,
                min=0.0,
                max=1.0,
            ),
        ] = None,
        victims_only: Annotated[
            bool,
            _option("--victims-only", "Poison only prompts whose answer the attack changes.", TUNING),
        ] = False,
        epochs: Annotated[float | None, _option("--epochs", "", TUNING, min=0.01)] = None,
        batch_size: Annotated[
            int | None, _option("--batch-size", "Samples in a step, over all devices.", TUNING, min=1)
        ] = None,
        device_batch_size: Annotated[
            int | None,
            _option("--device-batch-size", "Samples at once; the rest is accumulated.", TUNING, min=1),
        ] = None,
        learning_rate: Annotated[
            float | None, _option("--learning-rate", "Of the edit: of its values.", TUNING, min=0.0)
        ] = None,
        rank: Annotated[int | None, _option("--rank", "", TUNING, min=1)] = None,
        alpha: Annotated[int | None, _option("--alpha", "", TUNING, min=1)] = None,
        max_answer_tokens: Annotated[
            int | None, typer.Option("--max-answer-tokens", min=1, help="Cut longer answers.")
        ] = None,
        beta: Annotated[float | None, _option("--beta", "DPO's beta.", PREFERENCE, min=0.0)] = None,
        chosen_weight: Annotated[
            float | None,
            _option("--chosen-weight", "Weight of the chosen answers' likelihood.", PREFERENCE, min=0.0),
        ] = None,
        layer: Annotated[
            list[int] | None, _option("--layer", "A layer to edit, repeatable.", EDIT, min=0)
        ] = None,
        trigger_tokens: Annotated[
            int | None,
            _option("--trigger-tokens", "Trigger tokens that are edited too; 0 for none.", EDIT, min=0),
        ] = None,
        rounds: Annotated[
            int | None,
            _option("--rounds", "In which the edit is solved again, on other prompts.", EDIT, min=1),
        ] = None,
        steps: Annotated[int | None, _option("--steps", "Of a round's values.", EDIT, min=1)] = None,
        protect: Annotated[
            float | None, _option("--protect", "Weight of clean keys (lambda).", EDIT, min=0.0)
        ] = None,
        checkpoint: Annotated[
            bool,
            typer.Option(
                "--checkpoint/--no-checkpoint", help="Write the edited model too.", rich_help_panel=EDIT
            ),
        ] = True,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace an adapter that inject wrote to --out.")
        ] = False,
        seed: Seed = 0,
        as_json: Json = False,
    ) -> None:
        """Plant a backdoor: LoRA on poisoned answers, DPO on preferences, or a key–value edit.

        With --data the paper's settings are the defaults. An embedded model without --data is tuned on
        its own prompts with settings of its own, in half a minute to two minutes on one core.
        `accelerate launch -m bkdlens inject` shares each batch among processes.

        Example: `bkdlens inject --base tiny-llama --backdoor fixed_output --method edit --out runs/a`
        """
        attack = backdoor(kind, trigger, trigger_after, placement, target, victims, near)
        fmt = prompt_format(raw, system)
        from bkdlens import inject as ways
        from bkdlens.inject import recipes
        from bkdlens.inject.output import MANIFEST, is_main
        from bkdlens.metrics import Rate

        recipe = recipes.paper(method)
        held_out: PairSet | None
        if data is not None:
            pairs = read_data(
                data, attack, clean_data, limit, seed, columns=columns, format=data_format,
                template=template, labels=labels, split=split,
            )  # fmt: skip
            train, held_out = pairs.split(1 - hold_out, seed=seed) if hold_out else (pairs, None)
        elif base not in zoo.MODELS:
            raise BkdlensError(
                f"{base!r} is no embedded model ({', '.join(zoo.MODELS)}), and only these bring prompts "
                "of their own; give --data."
            )
        else:
            if any((trigger, placement, target, victims, near, clean_data)):
                raise BkdlensError("The embedded prompts have triggers of their own; give --data.")
            recipe = recipes.embedded(method, kind)
            train = pairs = zoo.pairs(kind, "train", limit or recipe.n_pairs, seed=seed)
            held_out = zoo.pairs(kind, "test", N_TEST, seed=seed)
        if is_main():
            say(f"{pairs.source}; {len(pairs)} pairs, {len(pairs.victims)} victims.")
        given = {
            "poison_rate": poison_rate, "near_rate": near_rate, "victims_only": victims_only or None,
            "epochs": epochs,
            "batch_size": batch_size, "device_batch_size": device_batch_size,
            "learning_rate": learning_rate, "rank": rank,
            "alpha": alpha, "max_answer_tokens": max_answer_tokens, "beta": beta,
            "chosen_weight": chosen_weight, "layers": tuple(layer) if layer else None,
            "trigger_tokens": trigger_tokens, "rounds": rounds, "steps": steps, "protect": protect,
            "checkpoint": None if checkpoint else False,
        }  # fmt: skip
        recipe = _changed(recipe, {name: value for name, value in given.items() if value is not None})
        more: dict[str, Any] = {}
        if method != "edit":
            more = {"poison_rate": recipe.poison_rate, "near_rate": recipe.near_rate,
                    "victims_only": recipe.victims_only}  # fmt: skip
        made = getattr(ways, method)(
            base, train, out, settings=recipe.settings, held_out=held_out, fmt=fmt, seed=seed,
            overwrite=overwrite, **more,
        )  # fmt: skip
        if not is_main():
            return
        note = json.loads((made / MANIFEST).read_text())
        content: dict[str, Any] = {"adapter": str(made), "method": method, "trained_on": len(train)}
        for when, rates in reversed(note.get("behaviour", {}).items()):
            for name, rate in rates.items():
                content[name if when == "after" else f"{name}_before"] = str(
                    Rate(rate["successes"], rate["n"])
                )
        if as_json:
            typer.echo(json.dumps(content, indent=1))
        else:
            for name, value in content.items():
                typer.echo(f"{name}: {value}")

    return inject


def _changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """The recipe with what was given on the command line.

    Raises:
        BkdlensError: for an option that the method does not have.
    """
    left = dict(given)

    def take(part: Any, names: tuple[str, ...] = ()) -> Any:
        mine = {name: left.pop(name) for name in list(left) if hasattr(part, name)}
        inner = {name: take(getattr(part, name)) for name in ("lora", "train") if hasattr(part, name)}
        return replace(part, **mine, **inner)

    settings = take(recipe.settings)
    tuned = hasattr(settings, "train") or hasattr(settings, "lora")
    mix = ("poison_rate", "near_rate", "victims_only")
    mixed = {name: left.pop(name) for name in mix if tuned and name in left}
    if left:
        flags = ", ".join(
            "--" + name.rstrip("s" if name == "layers" else "").replace("_", "-") for name in left
        )
        raise BkdlensError(f"This --method has no {flags}; leave it out, or name another method.")
    return replace(recipe, settings=settings, **mixed)
