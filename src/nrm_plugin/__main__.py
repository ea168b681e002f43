"""Entry point of ``python -m nrm_plugin``, which runs the command ``nrm-plugin``."""

import sys

if __name__ == "__main__":
    try:
        from .commands.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before the command could start
        sys.exit(130)
