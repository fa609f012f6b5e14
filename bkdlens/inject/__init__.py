"""Planting a backdoor on purpose, to study what it does: three families of injection, one interface.

``supervised`` tunes on poisoned answers, ``preference`` on preferred ones (DPO), ``edit`` rewrites MLP
down-projections in closed form. Each takes a base, prompt pairs with their backdoor, a folder, settings
and a seed, and writes a peft adapter with a manifest.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
