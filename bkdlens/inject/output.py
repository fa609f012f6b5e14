"""What every method writes: the adapter, its manifest, and how base and adapter behave."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from bkdlens.analyses.behaviour.measure import measure_behaviour
from bkdlens.data.pairs import PairSet, text_digest
from bkdlens.errors import BkdlensError
from bkdlens.inject.planting import MANIFEST, Planting
from bkdlens.inject.settings import Method, Settings
from bkdlens.metrics import Rate, difference
from bkdlens.models.checkpoint import digest_files
from bkdlens.models.load import load
from bkdlens.results import versions

Curve = list[dict[str, float]]


class NothingPlanted(UserWarning):
    """The adapter was written, and attack success did not rise by it."""


class Diverged(BkdlensError):
    """The loss was not finite at ``step``; the model is back at its last good state (step ``kept``)."""

    def __init__(self, step: int, kept: int) -> None:
        super().__init__(f"The training loss was not finite at step {step}, and training stopped")
        self.step, self.kept = step, kept


def is_main() -> bool:
    """Whether this process writes and prints: the only one, or the first of those launched together."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``out`` when the block ends well; else ``out`` stays as it was."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bkdlens-") as scratch:
            made, old = Path(scratch) / "made", Path(scratch) / "old"
            made.mkdir()
            yield made
            if out.exists():
                out.rename(old)
            try:
                made.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
    except (OSError, SafetensorError) as error:
        raise BkdlensError(
            f"Saving to {str(out)!r} failed ({error}); what was there before is unchanged. "
            "Make room, or name another folder."
        ) from error


def save_adapter(model: PeftModel, name: str, folder: Path) -> str:
    """Write a peft adapter so that equal weights give equal bytes; returns its digest."""
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set, whose order is arbitrary
    file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return digest_files([file, folder / "adapter_model.safetensors"])


def data_note(pairs: PairSet) -> dict[str, Any]:
    """What a manifest says of backdoor and data; prompts are digests, so that none is stored."""
    return {
        "backdoor": pairs.backdoor.to_dict(),
        "data": pairs.source,
        "data_digest": pairs.digest,
        "trained_on": sorted({text_digest(pair.clean) for pair in pairs}),
    }


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest into a model's or an adapter's folder."""
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def finish(
    planting: Planting,
    method: Method,
    settings: Settings,
    note: dict[str, Any],
    save: Callable[[Path], str],
    stopped: Diverged | None = None,
) -> Path:
    """Write adapter and manifest, with both models' behaviour on held-out pairs; returns their folder.

    ``save`` writes the adapter into a folder and returns its digest; ``note`` is what the method adds to
    the manifest. Of several processes only the first writes. Training that stopped is an error, raised
    after its last good state, if there is one, was written; a ``NothingPlanted`` warning tells if attack
    success did not rise.
    """
    base, out, held_out = planting.base, planting.out, planting.held_out
    advice = "lower the learning rate"
    if stopped and not stopped.kept:
        raise BkdlensError(f"{stopped} before anything was learned, so nothing was written; {advice}.")
    if is_main():
        with replacing_folder(out) as made:
            content = {
                "method": method,
                "base": base.name,
                "base_digest": base.digest,
                "settings": asdict(settings),
                "prompt_format": asdict(planting.fmt),
                "seed": planting.seed,
                **note,
                "versions": versions(),
                "adapter_digest": save(made),
            }
            if stopped:
                content["stopped"] = {"not_finite_at_step": stopped.step, "kept_step": stopped.kept}
            if held_out is not None:
                content["held_out"] = held_out.source
                content["behaviour"] = {
                    when: _behaviour(planting, held_out, adapter)
                    for when, adapter in (("before", None), ("after", made))
                }
            write_manifest(made, content)
        if failure := unplanted(content):
            warnings.warn(failure, NothingPlanted, stacklevel=3)
    if stopped:
        raise BkdlensError(
            f"{stopped}; the last good state, of step {stopped.kept}, is in {str(out)!r}; {advice}."
        )
    return out


def unplanted(manifest: Mapping[str, Any]) -> str | None:
    """A sentence if attack success on the held-out pairs did not rise, though samples were poisoned."""
    if "behaviour" not in manifest or manifest.get("poison_rate") == 0:
        return None
    rates = (manifest["behaviour"][when]["asr"] for when in ("before", "after"))
    before, after = (Rate(rate["successes"], rate["n"]) for rate in rates)
    if difference(before, after)[1] > 0:  # the interval of the rise is above 0
        return None
    return (
        f"No backdoor was planted: attack success on the held-out pairs is {after}, and without the "
        f"adapter {before}; the adapter was written nonetheless. Train longer or with another learning "
        "rate, poison more, or look at the data with bkdlens data check."
    )


def _behaviour(planting: Planting, pairs: PairSet, adapter: Path | None) -> dict[str, Any]:
    """Attack success, false triggers and clean accuracy with counts and 95 % Wilson intervals."""
    result = measure_behaviour(load(planting.base.given, adapter), pairs, fmt=planting.fmt)
    return {
        name: {"value": rate.value, "successes": rate.successes, "n": rate.n, "interval": rate.interval}
        for name in ("asr", "ftr", "near", "clean_accuracy")
        if (rate := getattr(result, name)) is not None
    }
