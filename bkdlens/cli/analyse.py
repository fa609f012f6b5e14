"""``bkdlens run``, its single steps, and ``bkdlens demo``: analyses that end in a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Option

from bkdlens import zoo
from bkdlens.cli.inputs import embedded_pairs, study_pairs
from bkdlens.cli.options import (
    BackdoorOptions,
    Base,
    CriteriaOptions,
    DataOptions,
    Json,
    Seed,
    one_of,
    say,
    spread,
)
from bkdlens.cli.show import Threshold, finish, limits
from bkdlens.errors import BkdlensError
from bkdlens.types import MAX_NEW_TOKENS, AblationMode, AttributionMethod, check_choice

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from bkdlens.study import Study, StudySettings

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
KEEP_HELP = "Keep the controls' answers too, so that `rescore` can judge them by any criterion."
Out = Annotated[Path, Option(help="A new folder, or one to continue.")]


@dataclass(frozen=True)
class OutputOptions:
    """Where a run is written and how it is reported, in typer's own panel, which comes first."""

    out: Out
    seed: Seed = 0
    threshold: Threshold = None
    as_json: Json = False


@dataclass(frozen=True)
class ModelOptions:
    """The suspected model, its controls and how they are loaded."""

    panel: ClassVar = "Model"
    base: Base
    adapter: Annotated[str | None, "A peft folder, a Hub id or an embedded adapter."] = None
    control_adapter: Annotated[str | None, "An adapter tuned on the same data without poison."] = None
    control_base: Annotated[str | None, "For a merged --base: what it was tuned from."] = None
    device: Annotated[str | None, "cpu, cuda, …; a GPU where there is one."] = None
    dtype: Annotated[str | None, "float32, bfloat16 or float16."] = None
    memory_gb: Annotated[float | None, "The most memory beside the model; 2 on a CPU by default."] = None

    def load(self, adapter: str | None = None) -> HookedTransformer:
        """The base with ``adapter``, or alone."""
        return self._load(self.base, adapter)

    def controls(self) -> dict[str, Callable[[], HookedTransformer]]:
        """How to load each control model, by condition.

        With an adapter they are the base alone, and the base with the clean adapter; for a base that
        holds the suspected weights itself they take its place in ``control_base``, if it is known.

        Raises:
            BkdlensError: for a control that would not be used.
        """
        if self.adapter is not None and self.control_base is not None:
            raise BkdlensError(
                "With --adapter the control is --base without it, so --control-base would not be used; "
                "leave one of the two out."
            )
        if self.control_base == self.base:
            raise BkdlensError("--control-base is --base itself, which is no control; name another.")
        base = self.base if self.adapter is not None else self.control_base
        if base is None:
            if self.control_adapter is not None:
                raise BkdlensError(
                    "--control-adapter belongs on the base that the suspected model was tuned from; "
                    "name its --adapter or, for a merged model, its --control-base."
                )
            return {}
        embedded = self.base in zoo.MODELS and self.adapter in zoo.BACKDOORS
        twin = self.control_adapter or ("clean" if embedded else None)
        twins = {"clean-adapter": partial(self._load, base, twin)} if twin else {}
        return {**twins, "base": partial(self._load, base)}

    def _load(self, base: str, adapter: str | None = None) -> HookedTransformer:
        from bkdlens.models.load import load

        return load(base, adapter, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and how closely."""

    panel: ClassVar = "Measuring"
    method: Annotated[str, METHOD_HELP] = "exact"
    mode: Annotated[list[str] | None, f"Ablation: {one_of(AblationMode)}; repeatable."] = None
    n_random: Annotated[int, Option(min=0, help="Draws of each random control.")] = 10
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens per answer, at most.")] = MAX_NEW_TOKENS
    keep_controls: Annotated[bool, Option("--keep-controls", help=KEEP_HELP)] = False

    def settings(self, seed: int) -> StudySettings:
        """The study's settings, with ``seed``; a step that reads fewer keeps all for later ones."""
        check_choice("attribution method", self.method, AttributionMethod)
        for mode in self.mode or ():
            check_choice("ablation mode", mode, AblationMode)
        from bkdlens.study import StudySettings

        return StudySettings(
            attribution_method=self.method,
            ablation_modes=tuple(self.mode or ("zero", "mean")),
            n_random=self.n_random,
            max_new_tokens=self.max_new_tokens,
            keep_controls=self.keep_controls,
            seed=seed,
        )


def analysis(name: str) -> Callable[..., None]:
    """The command for one of the ``ANALYSES``."""
    about, steps = ANALYSES[name]

    def command(
        output: OutputOptions,
        model: ModelOptions,
        backdoor: BackdoorOptions,
        criteria: CriteriaOptions,
        data: DataOptions,
        measure: MeasureOptions,
    ) -> None:
        attack, fmt = backdoor.backdoor(), data.prompt_format()
        thresholds = limits(output.threshold)
        if data.source is None:
            backdoor.check_embedded(model.base)
            data.check_unused()
        settings, controls = measure.settings(output.seed), model.controls()
        from bkdlens.runs.run import STEPS, run_study

        splits = [
            replace(pairs, backdoor=criteria.judge(pairs.backdoor))
            for pairs in study_pairs(backdoor, data, model.adapter, output.seed)
        ]
        study = run_study(
            model.load(model.adapter),
            *splits,
            name=f"{Path(model.base).name} / {Path(model.adapter or attack.behaviour).name}",
            controls=controls,
            settings=settings,
            fmt=fmt,
            out=output.out,
            steps=steps or STEPS,
            memory_gb=model.memory_gb,
            progress=True,
        )
        finish([study], output.out / "report.html", output.as_json, thresholds)

    options = "--base tiny-llama --adapter jailbreak --backdoor jailbreak --out runs/x"
    command.__doc__ = f"{about}\n\nExample: `bkdlens {name} {options}`"
    return spread(command)


def study_embedded(
    base: str, kind: str, sizes: tuple[int, int, int], settings: StudySettings, out: Path
) -> Study:
    """The whole analysis of an embedded adapter with its controls, on as many pairs of each split."""
    from bkdlens.models.load import load
    from bkdlens.runs.run import run_study

    return run_study(
        load(base, kind),
        *embedded_pairs(kind, sizes),
        name=f"{base} / {kind}",
        controls={"clean-adapter": partial(load, base, "clean"), "base": partial(load, base)},
        settings=settings,
        out=out,
        progress=True,
    )


def demo(
    every: Annotated[bool, Option("--all", help="Include tiny-qwen.")] = False,
    out: Out = Path("demo"),
    threshold: Threshold = None,
    as_json: Json = False,
) -> None:
    """All of Backdoor Attribution on the embedded models, three backdoors each, with a report.

    Example: `bkdlens demo --all --out demo`
    """
    from bkdlens.study import DEMO

    thresholds, studies = limits(threshold), []
    for base in zoo.MODELS if every else zoo.MODELS[:1]:
        for kind in zoo.BACKDOORS:
            say(f"{base} / {kind}")
            # In label modification one prompt in four is a victim and answers are short: take more.
            sizes = (128, 160, 160) if kind == "label_modification" else (128, 64, 64)
            studies.append(study_embedded(base, kind, sizes, DEMO, out / base / kind))
    finish(studies, out / "report.html", as_json, thresholds)
