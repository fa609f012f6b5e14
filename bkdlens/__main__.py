"""``python -m bkdlens`` is the shell, as in ``accelerate launch -m bkdlens inject …``."""

from bkdlens.cli.app import main

main()
