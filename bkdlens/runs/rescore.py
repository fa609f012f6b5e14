"""A study judged anew, by other criteria and without the model."""

from __future__ import annotations

from dataclasses import replace

from bkdlens.analyses.parts import PARTS
from bkdlens.data.backdoor import Backdoor
from bkdlens.errors import ResultError
from bkdlens.results import Result
from bkdlens.study import Study


def rescore(study: Study, backdoor: Backdoor) -> Study:
    """Judge every answer of a study by the criteria of ``backdoor``.

    What a fresh run would find, without the model: the answers are read from the study. The random
    controls' answers are among them where the run kept them
    (``StudySettings(keep_controls=True)``) or its own criteria needed them whole.

    Args:
        study: from :func:`bkdlens.run_study` or :func:`bkdlens.load_study`.
        backdoor: ``study.backdoor.judged_by(…)``; only its criteria may be others.

    Returns:
        The study with its counts by these criteria, and the same answers. Where these would choose
        another vector on the validation pairs, what was measured with the earlier one is left out.

    Raises:
        ResultError: if the study lacks answers, or the backdoor differs in more than its criteria.

    Examples:
        >>> parts = train.split(0.5, 0.25, 0.25)
        >>> study = bkdlens.run_study(model, *parts, steps=("behaviour",))
        >>> strict = bkdlens.rescore(study, backdoor.judged_by(success="equal"))
    """
    criteria = {name: getattr(backdoor, name) for name in ("success", "good", "against")}
    if replace(study.backdoor, **criteria) != backdoor:
        raise ResultError(
            "Only the criteria of a study's backdoor may be others; give study.backdoor.judged_by(…)."
        )
    pairs = {name: replace(kept, backdoor=backdoor) for name, kept in study.pairs.items()}
    results: dict[str, Result] = {}
    for name, result in study.results.items():
        judge = getattr(result, "judged_by", None)
        if judge is None:
            results[name] = result
            continue
        measured_on = replace(study, pairs=pairs).pairs_of(result)
        if measured_on is None:
            raise ResultError(
                f"The study does not hold the pairs that {name!r} was measured on; run it again."
            )
        results[name] = judge(measured_on)
    judged = replace(study, backdoor=backdoor, results=results, pairs=pairs)
    for part in PARTS:
        judged = part.rechoose(judged)
    return judged
