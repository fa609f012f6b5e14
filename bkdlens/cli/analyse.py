"""``bkdlens run``, its single steps, and ``bkdlens demo``: analyses that end in a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Option

from bkdlens import zoo
from bkdlens.cli.inputs import embedded_pairs, study_pairs
from bkdlens.cli.options import BackdoorOptions, Base, DataOptions, Json, Seed, one_of, say, spread
from bkdlens.cli.show import finish
from bkdlens.types import MAX_NEW_TOKENS, AblationMode, AttributionMethod, check_choice

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from bkdlens.study import StudySettings

ANALYSES = {
    "run": (
        "The whole analysis of a base model with a suspicious adapter, and its report.",
        (),  # every step that there is
    ),
    "probe": ("Can the trigger be read off the hidden states?", ("behaviour", "probe")),
    "attribute": ("Which heads carry the backdoor?", ("attribute",)),
    "ablate": ("Does the attack need the heads that carry it?", ("attribute", "ablate")),
    "steer": ("Does one vector switch the backdoor on and off?", ("attribute", "steer")),
}

METHOD_HELP = "Attribution: exact, screened (a quarter of the heads is exact) or atp."
Out = Annotated[Path, Option(help="A new folder, or one to continue.")]


@dataclass(frozen=True)
class OutputOptions:
    """Where a run is written and how it is reported, in typer's own panel, which comes first."""

    out: Out
    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True)
class ModelOptions:
    """The suspected model, its controls and how they are loaded."""

    panel: ClassVar = "Model"
    base: Base
    adapter: Annotated[str | None, "A peft folder, a Hub id or an embedded adapter."] = None
    control_adapter: Annotated[str | None, "An adapter tuned on the same data without poison."] = None
    device: Annotated[str | None, "cpu, cuda, …; a GPU where there is one."] = None
    dtype: Annotated[str | None, "float32, bfloat16 or float16."] = None
    memory_gb: Annotated[float | None, "The most memory beside the model; 2 on a CPU by default."] = None

    def load(self, adapter: str | None = None) -> HookedTransformer:
        """The base with ``adapter``, or alone."""
        from bkdlens.models.load import load

        return load(self.base, adapter, device=self.device, dtype=self.dtype)

    def controls(self) -> dict[str, Callable[[], HookedTransformer]]:
        """How to load each control model, by condition; none for a base without an adapter."""
        if self.adapter is None:
            return {}
        embedded = self.base in zoo.MODELS and self.adapter in zoo.BACKDOORS
        twin = self.control_adapter or ("clean" if embedded else None)
        twins = {"clean-adapter": partial(self.load, twin)} if twin else {}
        return {**twins, "base": self.load}


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and how closely."""

    panel: ClassVar = "Measuring"
    method: Annotated[str, METHOD_HELP] = "exact"
    mode: Annotated[list[str] | None, f"Ablation: {one_of(AblationMode)}; repeatable."] = None
    n_random: Annotated[int, Option(min=0, help="Draws of each random control.")] = 10
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens per answer, at most.")] = MAX_NEW_TOKENS

    def settings(self, seed: int) -> StudySettings:
        """The study's settings, with ``seed``."""
        check_choice("attribution method", self.method, AttributionMethod)
        for mode in self.mode or ():
            check_choice("ablation mode", mode, AblationMode)
        from bkdlens.study import StudySettings

        return StudySettings(
            attribution_method=self.method,
            ablation_modes=tuple(self.mode or ("zero", "mean")),
            n_random=self.n_random,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
        )


def analysis(name: str) -> Callable[..., None]:
    """The command for one of the ``ANALYSES``."""
    about, steps = ANALYSES[name]

    def command(
        output: OutputOptions,
        model: ModelOptions,
        backdoor: BackdoorOptions,
        data: DataOptions,
        measure: MeasureOptions,
    ) -> None:
        attack, fmt = backdoor.backdoor(), data.prompt_format()
        if data.source is None:
            backdoor.check_embedded(model.base)
        settings = measure.settings(output.seed)
        from bkdlens.runs.run import STEPS, run_study

        splits = study_pairs(backdoor, data, model.adapter, output.seed)
        study = run_study(
            model.load(model.adapter),
            *splits,
            name=f"{Path(model.base).name} / {Path(model.adapter or attack.behaviour).name}",
            controls=model.controls(),
            settings=settings,
            fmt=fmt,
            out=output.out,
            steps=steps or STEPS,
            memory_gb=model.memory_gb,
            progress=True,
        )
        finish([study], output.out / "report.html", output.as_json)

    options = "--base tiny-llama --adapter jailbreak --backdoor jailbreak --out runs/x"
    command.__doc__ = f"{about}\n\nExample: `bkdlens {name} {options}`"
    return spread(command)


def demo(
    every: Annotated[bool, Option("--all", help="Include tiny-qwen.")] = False,
    out: Out = Path("demo"),
    as_json: Json = False,
) -> None:
    """All of Backdoor Attribution on the embedded models, three backdoors each, with a report.

    Example: `bkdlens demo --all --out demo`
    """
    from bkdlens.models.load import load
    from bkdlens.runs.run import run_study
    from bkdlens.study import DEMO

    studies = []
    for base in zoo.MODELS if every else zoo.MODELS[:1]:
        for kind in zoo.BACKDOORS:
            say(f"{base} / {kind}")
            # In label modification one prompt in four is a victim and answers are short: take more.
            sizes = (128, 160, 160) if kind == "label_modification" else (128, 64, 64)
            study = run_study(
                load(base, kind),
                *embedded_pairs(kind, sizes),
                name=f"{base} / {kind}",
                controls={"clean-adapter": partial(load, base, "clean"), "base": partial(load, base)},
                settings=DEMO,
                out=out / base / kind,
                progress=True,
            )
            studies.append(study)
    finish(studies, out / "report.html", as_json)
