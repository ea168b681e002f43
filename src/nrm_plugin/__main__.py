"""``python -m nrm_plugin`` is the command ``nrm-plugin``."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
