"""``bkdlens zoo``: the embedded models, what they are and how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bkdlens import zoo
from bkdlens.cli.options import Json, Seed, say, say_json

zoo_app = typer.Typer(no_args_is_help=True, help="The embedded models.")


@zoo_app.command("list")
def zoo_list(as_json: Json = False) -> None:
    """The embedded models, their adapters and where they are.

    Example: `bkdlens zoo list`
    """
    models = {
        model: {"path": str(zoo.model_path(model)), "adapters": list(zoo.ADAPTERS)}
        for model in zoo.MODELS
    }
    if as_json:
        say_json(models)
    else:
        for model, entry in models.items():
            typer.echo(f"{model}: {', '.join(entry['adapters'])}  ({entry['path']})")


@zoo_app.command("card")
def zoo_card() -> None:
    """The model card: how the embedded models were made and what they can do, measured.

    Example: `bkdlens zoo card`
    """
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown((zoo.WEIGHTS / "README.md").read_text()))


@zoo_app.command("build")
def zoo_build(
    out: Annotated[Path, typer.Option(help="A folder for the models.")] = Path("zoo"),
    model: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    seed: Seed = 0,
) -> None:
    """Make the embedded models again from seeds (about 20 minutes per model on one core).

    Example: `bkdlens zoo build --out zoo`
    """
    from bkdlens.inject.embedded import build, card

    if model is not None:
        zoo.model_path(model)  # raises for a name that is not one
    for name in (model,) if model else zoo.MODELS:
        say(f"Training {name} from scratch")
        build.build_model(name, out, seed=seed)
        for adapter in zoo.ADAPTERS:
            say(f"Tuning {name} / {adapter}")
            build.build_adapter(name, adapter, out, seed=seed)
    card.write_card(out)
    say(f"Model card: {out / 'README.md'}")
