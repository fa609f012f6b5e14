"""What every way of planting a backdoor shares: the base, the folder that is written, the manifest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from bkdlens import zoo
from bkdlens.analyses.behaviour.measure import BehaviourResult, measure_behaviour
from bkdlens.data.pairs import PairSet, text_digest
from bkdlens.data.prompts import PromptFormat, Tokenizer
from bkdlens.errors import BkdlensError
from bkdlens.inject.training import Diverged
from bkdlens.models.checkpoint import digest_files, find_folder, read_model, read_tokenizer
from bkdlens.models.load import load
from bkdlens.results import versions

MANIFEST = "bkdlens.json"


class Base(NamedTuple):
    """A base model in float32 with its tokenizer, and the name that an adapter of it carries."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    digest: str


def read_base(base: str | Path) -> Base:
    """Read an embedded model, a local folder or a Hub id.

    Raises:
        CheckpointError: for whatever cannot be found, read or trusted.
    """
    embedded = str(base) in zoo.MODELS
    folder = zoo.model_path(str(base)) if embedded else find_folder(str(base), zoo.MODELS)
    tokenizer = read_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model, files = read_model(folder)[1:3]
    with suppress(ValueError):  # of models that have no other than eager
        model.set_attn_implementation("sdpa")  # loading is eager, for exactness; training may be quick
    # A path of the machine where it was made is no use to anyone; a name is.
    name = str(base) if embedded or not Path(base).exists() else Path(base).name
    return Base(model, tokenizer, name, digest_files(files))


def is_main() -> bool:
    """Whether this process writes and prints: alone, or the first that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def check_free(out: str | Path, *, overwrite: bool = False) -> Path:
    """``out`` as a path that may be written to.

    Raises:
        BkdlensError: if something is there, unless it is an adapter of ours to be replaced.
    """
    out = Path(out)
    if out.is_dir():
        if any(out.iterdir()) and not (overwrite and (out / MANIFEST).is_file()):
            raise BkdlensError(
                f"The folder {str(out)!r} is not empty; name a new one for the adapter, or, if "
                "bkdlens inject wrote it, ask for it to be overwritten."
            )
    elif out.exists():
        raise BkdlensError(f"{str(out)!r} is a file; name a new folder for the adapter.")
    return out


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``out`` when the block ends well; else ``out`` stays as it was.

    Raises:
        BkdlensError: if the disk is full or not writable.
    """
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
    """Write a peft adapter so that the same weights give the same bytes; returns its digest."""
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a template with nothing in it
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order is chance
    file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return digest_files([file, folder / "adapter_model.safetensors"])


def manifest(
    method: str, base: Base, settings: Any, fmt: PromptFormat, seed: int, **more: Any
) -> dict[str, Any]:
    """Everything needed to make an adapter again."""
    return {
        "method": method,
        "base": base.name,
        "base_digest": base.digest,
        "settings": asdict(settings),
        "prompt_format": asdict(fmt),
        "seed": seed,
        **more,
        "versions": versions(),
    }


def data_note(pairs: PairSet) -> dict[str, Any]:
    """The backdoor and the data of a manifest; prompts as digests, so that none is stored."""
    return {
        "backdoor": pairs.backdoor.to_dict(),
        "data": pairs.source,
        "data_digest": pairs.digest,
        "trained_on": sorted({text_digest(pair.clean) for pair in pairs}),
    }


def write_manifest(folder: Path, note: dict[str, Any]) -> None:
    """Write the manifest into an adapter's folder."""
    (folder / MANIFEST).write_text(json.dumps(note, indent=1) + "\n")


def finish(
    out: Path,
    base: str | Path,
    note: dict[str, Any],
    save: Callable[[Path], str],
    *,
    held_out: PairSet | None,
    fmt: PromptFormat,
    stopped: Diverged | None = None,
) -> Path:
    """Write the adapter, measure it on held-out pairs, and put manifest and adapter at ``out``.

    ``save`` writes the adapter into a folder and returns its digest. With several processes only the
    first writes.

    Raises:
        BkdlensError: if the training had stopped (after writing what was learned before, if anything
            was), or the disk is full.
    """
    advice = "lower the learning rate"
    if stopped and not stopped.kept:
        raise BkdlensError(f"{stopped} before anything was learned, so nothing was written; {advice}.")
    if is_main():
        with replacing(out) as made:
            note["adapter_digest"] = save(made)
            if stopped:
                note["stopped"] = {"not_finite_at_step": stopped.step, "kept_step": stopped.kept}
            if held_out is not None:
                note["held_out"] = held_out.source
                note["behaviour"] = {
                    "before": behaviour_note(measure(base, None, held_out, fmt)),
                    "after": behaviour_note(measure(base, made, held_out, fmt)),
                }
            write_manifest(made, note)
    if stopped:
        raise BkdlensError(
            f"{stopped}; the last good state, of step {stopped.kept}, is in {str(out)!r}; {advice}."
        )
    return out


def measure(
    base: str | Path, adapter: Path | None, pairs: PairSet, fmt: PromptFormat
) -> BehaviourResult:
    """Attack success, false triggers and clean accuracy on held-out pairs."""
    model = load(str(base), str(adapter) if adapter else None)
    return measure_behaviour(model, pairs, label="after" if adapter else "before", fmt=fmt)


def behaviour_note(result: BehaviourResult) -> dict[str, Any]:
    """Rates with their counts and 95 % Wilson intervals, for a manifest."""
    rates = {"asr": result.asr, "ftr": result.ftr, "near": result.near,
             "clean_accuracy": result.clean_accuracy}  # fmt: skip
    return {
        name: {"value": rate.value, "successes": rate.successes, "n": rate.n,
               "interval": list(rate.interval)}
        for name, rate in rates.items() if rate is not None
    }  # fmt: skip
