"""``bkdlens rescore``: a run folder judged anew, without its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bkdlens.cli.options import CriteriaOptions, Json, say, spread
from bkdlens.cli.show import Threshold, finish, limits


@spread
def rescore(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    criteria: CriteriaOptions,
    threshold: Threshold = None,
    as_json: Json = False,
) -> None:
    """Judge every answer of a run by other criteria, without running the model again.

    Example: `bkdlens rescore runs/x --success contains --out runs/x-contains`
    """
    from bkdlens.runs.reading import load_study
    from bkdlens.runs.rescore import rescore as judge_anew

    thresholds = limits(threshold)
    study = load_study(run)
    judged = judge_anew(study, criteria.judge(study.backdoor))
    judged.save(out)
    if dropped := sorted(study.results.keys() - judged.results.keys()):
        say(f"These criteria choose another vector; not measured with it: {', '.join(dropped)}.")
    finish([judged], out / "report.html", as_json, thresholds)
