"""``bkdlens inject``: planting a backdoor from the shell, by any of the three methods."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer import Option

from bkdlens import zoo
from bkdlens.cli.options import BackdoorOptions, Base, DataOptions, Json, Seed, say, say_json, spread
from bkdlens.errors import BkdlensError

if TYPE_CHECKING:
    from bkdlens.data.pairs import PairSet

N_TEST = 400  # embedded prompts on which an adapter is measured


Positive = Annotated[int | None, Option(min=1)]
Share = Annotated[float | None, Option(min=0.0, max=1.0)]
Weight = Annotated[float | None, Option(min=0.0)]


@dataclass(frozen=True)
class AdapterOptions:
    """What is made of which base, and where it goes, in typer's own panel, which comes first."""

    base: Base
    out: Annotated[Path, "A new folder for the adapter."]
    method: Annotated[str, "supervised, preference or edit."] = "supervised"
    hold_out: Annotated[float, Option(min=0.0, max=0.9), "Share of --data kept for measuring."] = 0.2
    overwrite: Annotated[bool, Option("--overwrite"), "Replace inject's adapter in --out."] = False
    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True)
class MethodOptions:
    """Settings that every method has; like those below, the recipe's where nothing is given."""

    panel: ClassVar = "Every method"
    learning_rate: Annotated[Weight, "Of the adapter; in an edit, of its values."] = None
    max_answer_tokens: Annotated[Positive, "Cut longer answers."] = None


@dataclass(frozen=True)
class TuningOptions:
    """Settings of the methods that tune an adapter."""

    panel: ClassVar = "Supervised and preference"
    poison_rate: Annotated[Share, "Share triggered."] = None
    near_rate: Annotated[Share, "Share with a near trigger and the right answer."] = None
    victims_only: Annotated[bool, Option("--victims-only"), "Poison only victims."] = False
    epochs: Annotated[float | None, Option(min=0.01), "Passes over the data."] = None
    batch_size: Annotated[Positive, "Samples in a step, over all devices."] = None
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
    rounds: Annotated[Positive, "In which the edit is solved again, on other prompts."] = None
    steps: Annotated[Positive, "Of a round's values."] = None
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
    its own prompts with settings of its own, in half a minute to two minutes on one core.
    `accelerate launch -m bkdlens inject` shares each batch among processes.

    Example: `bkdlens inject --base tiny-llama --backdoor fixed_output --method edit --out runs/a`
    """
    attack, fmt = backdoor.backdoor(), data.prompt_format()
    if data.source is None:
        backdoor.check_embedded(adapter.base, data.clean_data)
    from bkdlens import inject as methods
    from bkdlens.inject import recipes
    from bkdlens.inject.output import is_main
    from bkdlens.inject.planting import MANIFEST
    from bkdlens.metrics import Rate

    method, seed = adapter.method, adapter.seed
    held_out: PairSet | None = None
    if data.source is not None:
        recipe = recipes.paper(method)
        train = pairs = data.pairs(attack, seed)
        if adapter.hold_out:
            train, held_out = pairs.split(1 - adapter.hold_out, seed=seed)
    else:
        recipe = recipes.embedded(method, backdoor.kind)
        train = pairs = zoo.pairs(backdoor.kind, "train", data.limit or recipe.n_pairs, seed=seed)
        held_out = zoo.pairs(backdoor.kind, "test", N_TEST, seed=seed)
    if is_main():
        say(f"{pairs.source}; {len(pairs)} pairs, {len(pairs.victims)} victims.")
    given = _given(common, tuning, preference, edit)
    mixture = () if method == "edit" else ("poison_rate", "near_rate", "victims_only")
    more: dict[str, Any] = {name: given.pop(name, getattr(recipe, name)) for name in mixture}
    settings = _changed(recipe.settings, given)
    if given:
        flags = ", ".join("--" + name.replace("layers", "layer").replace("_", "-") for name in given)
        raise BkdlensError(f"This --method has no {flags}; leave it out, or name another method.")
    more |= {"held_out": held_out, "fmt": fmt, "seed": seed, "overwrite": adapter.overwrite}
    make = getattr(methods, method)
    made = make(adapter.base, train, adapter.out, settings=settings, **more)
    if not is_main():
        return
    content: dict[str, Any] = {"adapter": str(made), "method": method, "trained_on": len(train)}
    behaviour = json.loads((made / MANIFEST).read_text()).get("behaviour", {})
    for when, rates in reversed(behaviour.items()):
        for name, rate in rates.items():
            key = name if when == "after" else f"{name}_before"
            content[key] = str(Rate(rate["successes"], rate["n"]))
    if adapter.as_json:
        say_json(content)
    else:
        for name, value in content.items():
            typer.echo(f"{name}: {value}")


def _given(*groups: Any) -> dict[str, Any]:
    """What differs from its default, by name."""
    return {
        field.name: tuple(value) if isinstance(value, list) else value
        for group in groups
        for field in fields(group)
        if (value := getattr(group, field.name)) != field.default
    }


def _changed(settings: Any, given: dict[str, Any]) -> Any:
    """The settings with those of ``given`` that they have, however deep; these are taken out of it."""
    mine = {name: given.pop(name) for name in list(given) if hasattr(settings, name)}
    for part in ("lora", "train"):
        if hasattr(settings, part):
            mine[part] = _changed(getattr(settings, part), given)
    return replace(settings, **mine)
