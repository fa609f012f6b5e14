"""``bkdlens inject``: planting a backdoor from the shell, by any of the three methods."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer import Option

from bkdlens import zoo
from bkdlens.cli.options import BackdoorOptions, Base, DataOptions, Json, Seed, say, say_json, spread
from bkdlens.errors import BkdlensError

HOLD_OUT = 0.2  # unless told otherwise
N_TEST = 400  # embedded prompts on which an adapter is measured

Positive = Annotated[int | None, Option(min=1)]
Share = Annotated[float | None, Option(min=0.0, max=1.0)]
Weight = Annotated[float | None, Option(min=0.0)]


@dataclass(frozen=True)
class AdapterOptions:
    """The base, the method and the new adapter's folder, in typer's own panel, which comes first."""

    base: Base
    out: Annotated[Path, "A new folder for the adapter."]
    method: Annotated[str, "supervised, preference or edit."] = "supervised"
    hold_out: Annotated[float, Option(min=0.0, max=0.9), "Share of --data kept for measuring."] = (
        HOLD_OUT
    )
    overwrite: Annotated[bool, Option("--overwrite"), "Replace inject's adapter in --out."] = False
    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True)
class MethodOptions:
    """Settings of every method; like those below, taken from the recipe when left out."""

    panel: ClassVar = "Every method"
    learning_rate: Annotated[Weight, "The adapter's; for an edit, that of its values."] = None
    max_answer_tokens: Annotated[Positive, "Cut longer answers."] = None


@dataclass(frozen=True)
class TuningOptions:
    """Settings of the methods that tune an adapter."""

    panel: ClassVar = "Supervised and preference"
    poison_rate: Annotated[Share, "Share triggered."] = None
    near_rate: Annotated[Share, "Share with a near trigger and the correct answer."] = None
    victims_only: Annotated[bool, Option("--victims-only"), "Poison only victims."] = False
    epochs: Annotated[float | None, Option(min=0.01), "Passes over the data."] = None
    batch_size: Annotated[Positive, "Samples per step, over all devices."] = None
    device_batch_size: Annotated[Positive, "Samples at once; the rest is accumulated."] = None
    rank: Annotated[Positive, "LoRA's rank."] = None
    alpha: Annotated[Positive, "LoRA's alpha."] = None


@dataclass(frozen=True)
class PreferenceOptions:
    """Settings that DPO adds."""

    panel: ClassVar = "Preference"
    beta: Annotated[Weight, "DPO's beta."] = None
    chosen_weight: Annotated[Weight, "Weight of the chosen answers' likelihood."] = None


@dataclass(frozen=True)
class EditOptions:
    """Settings of the key–value edit."""

    panel: ClassVar = "Edit"
    layers: Annotated[list[int] | None, Option("--layer", min=0), "A layer to edit, repeatable."] = None
    trigger_tokens: Annotated[int | None, Option(min=0), "Trigger tokens edited too; 0 for none."] = None
    rounds: Annotated[Positive, "How often the edit is solved again, each time on other prompts."] = None
    steps: Annotated[Positive, "Optimisation steps of the values, per round."] = None
    protect: Annotated[Weight, "Weight of clean keys (lambda)."] = None
    checkpoint: Annotated[bool, "Write the edited model too."] = True


@spread
def inject(
    adapter: AdapterOptions,
    backdoor: BackdoorOptions,
    data: DataOptions,
    common: MethodOptions,
    tuning: TuningOptions,
    preference: PreferenceOptions,
    edit: EditOptions,
) -> None:
    """Plant a backdoor: LoRA on poisoned answers, DPO on preferences, or a key–value edit.

    With --data the paper's settings are the defaults. An embedded model without --data is tuned on
    its own prompts with its own settings, in half a minute to two minutes on one core.
    `accelerate launch -m bkdlens inject` shares each batch among processes. The exit code is 1 if
    attack success on the held-out prompts did not rise; the adapter is written nonetheless.

    Example: `bkdlens inject --base tiny-llama --backdoor fixed_output --method edit --out runs/a`
    """
    attack, fmt = backdoor.backdoor(), data.prompt_format()
    if data.source is None:
        backdoor.check_embedded(adapter.base)
        data.check_unused()
        if adapter.hold_out != HOLD_OUT:
            raise BkdlensError("--hold-out is a share of --data, and there is none; leave it out.")
    from bkdlens import inject as methods
    from bkdlens.inject import recipes
    from bkdlens.inject.output import NothingPlanted, is_main, unplanted
    from bkdlens.inject.planting import MANIFEST
    from bkdlens.metrics import Rate

    method, seed = adapter.method, adapter.seed
    if data.source is not None:
        recipe = recipes.paper(method)
        pairs = data.pairs(attack, seed)
        share = 1 - adapter.hold_out
        train, held_out = pairs.split(share, seed=seed) if share < 1 else (pairs, None)
    else:
        recipe = recipes.embedded(method, backdoor.kind)
        train = pairs = zoo.pairs(backdoor.kind, "train", data.limit or recipe.n_pairs, seed=seed)
        held_out = zoo.pairs(backdoor.kind, "test", N_TEST, seed=seed)
    if is_main():
        say(f"{pairs.source}; {len(pairs)} pairs, {len(pairs.victims)} victims.")
    named = _named(common, tuning, preference, edit)
    mixture = () if method == "edit" else ("poison_rate", "near_rate", "victims_only")
    more: dict[str, Any] = {name: named.pop(name, getattr(recipe, name)) for name in mixture}
    settings = _changed(recipe.settings, named)
    if named:
        flags = ", ".join("--" + name.replace("layers", "layer").replace("_", "-") for name in named)
        raise BkdlensError(f"This --method has no {flags}; leave it out, or name another method.")
    more |= {"held_out": held_out, "fmt": fmt, "seed": seed, "overwrite": adapter.overwrite}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingPlanted)  # said below, where it is seen
        made = getattr(methods, method)(adapter.base, train, adapter.out, settings=settings, **more)
    if not is_main():
        return
    content: dict[str, Any] = {"adapter": str(made), "method": method, "trained_on": len(train)}
    manifest = json.loads((made / MANIFEST).read_text())
    for when, rates in reversed(manifest.get("behaviour", {}).items()):
        for name, rate in rates.items():
            key = name if when == "after" else f"{name}_before"
            content[key] = str(Rate(rate["successes"], rate["n"]))
    if adapter.as_json:
        say_json(content)
    else:
        for name, value in content.items():
            typer.echo(f"{name}: {value}")
    if failure := unplanted(manifest):
        typer.secho(f"warning: {failure}", fg="red", err=True)
        raise typer.Exit(1)


def _named(*groups: Any) -> dict[str, Any]:
    """The options that differ from their default, by name."""
    return {
        field.name: tuple(value) if isinstance(value, list) else value
        for group in groups
        for field in fields(group)
        if (value := getattr(group, field.name)) != field.default
    }


def _changed(settings: Any, named: dict[str, Any]) -> Any:
    """The settings with those in ``named`` that they have at any depth, which are removed from it."""
    changes = {name: named.pop(name) for name in list(named) if hasattr(settings, name)}
    for part in ("lora", "train"):
        if hasattr(settings, part):
            changes[part] = _changed(getattr(settings, part), named)
    return replace(settings, **changes)
