"""Run every notebook top to bottom in a fresh kernel, without network; fail on the first error.

With ``--write`` the outputs are kept in the file, as they are committed: figures with a still image
beside them where a Chrome or Chromium is there to draw it, for pages that run no scripts. Names of
notebooks, or beginnings of them, run these alone.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kaleido
import nbformat
import plotly.io as pio
from nbclient import NotebookClient
from PIL import Image

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
COLOURS = 200  # of a still image: a quarter of the size, and no difference to be seen
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HERE = Path(__file__).parent


def bundles(notebook: Any) -> Iterator[dict[str, Any]]:
    """What every cell displayed, by media type."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "data" in output:
                yield output["data"]


def settle(notebook: Any) -> None:
    """Take out what differs in every run: times, where a printed text was cut, and widgets' numbers.

    A widget is nothing without its kernel; what stands beside it for other pages stays.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept: list[Any] = []
        for output in cell.get("outputs", []):
            if "data" in output:
                output["data"].pop(WIDGET, None)
            same = kept and kept[-1].get("name") == output.get("name")
            if same and output.output_type == kept[-1].output_type == "stream":
                kept[-1].text += output.text
            elif output.get("data", True):
                kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept


def draw(notebook: Any) -> None:
    """A still image beside every figure."""
    for data in bundles(notebook):
        if PLOTLY in data:
            figure = {key: data[PLOTLY][key] for key in ("data", "layout")}
            drawn = pio.to_image(figure, format="png", width=760, validate=False)
            small = io.BytesIO()
            image = Image.open(io.BytesIO(drawn)).convert("RGB")
            image.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
            data["image/png"] = base64.b64encode(small.getvalue()).decode()


def main(*arguments: str) -> None:
    """Run the notebooks."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    names = tuple(a for a in arguments if not a.startswith("--"))
    drawing = "--write" in arguments and any(map(shutil.which, BROWSERS))
    if drawing:
        kaleido.start_sync_server(silence_warnings=True)  # one browser for all figures
    for path in sorted(HERE.glob("*.ipynb")):
        if names and not path.name.startswith(names):
            continue
        notebook, start = nbformat.read(path, as_version=4), time.monotonic()
        NotebookClient(
            notebook, timeout=600, store_widget_state=False, resources={"metadata": {"path": str(HERE)}}
        ).execute()
        seconds = time.monotonic() - start
        settle(notebook)
        if "--write" in arguments:
            if drawing:
                draw(notebook)
            nbformat.write(notebook, path)
        sys.stderr.write(f"{path.name}: {len(notebook.cells)} cells ran in {seconds:.0f} s\n")
    if drawing:
        kaleido.stop_sync_server(silence_warnings=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
