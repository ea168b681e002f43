"""Entry point for ``python -m nrm_plugin``, equivalent to the command ``nrm-plugin``."""

import sys

if __name__ == "__main__":
    try:
        from .commands.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before the command could start
        sys.exit(130)
