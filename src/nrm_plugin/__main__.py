"""Runs the command ``nrm-plugin`` as ``python -m nrm_plugin``."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
