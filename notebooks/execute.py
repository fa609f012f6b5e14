"""Run every notebook top to bottom in a fresh kernel, without network; fail on the first error.

With ``--write`` the outputs are kept in the file, as they are committed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ["HF_HUB_OFFLINE"] = "1"
here = Path(__file__).parent
for path in sorted(here.glob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(here)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times differ in every run
    if "--write" in sys.argv:
        nbformat.write(notebook, path)
    sys.stderr.write(f"{path.name}: {len(notebook.cells)} cells ran\n")
