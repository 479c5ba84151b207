"""Run the command ``clr-optim`` as ``python -m clr_optim``."""

import sys

from clr_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
