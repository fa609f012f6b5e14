"""bkdlens: mechanistic interpretability of backdoors in language models, on TransformerLens.

Everything public is a name of this package, listed in ``__init__.pyi``, and is imported when it is first
used, so that ``import bkdlens`` and ``bkdlens --help`` are quick.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
