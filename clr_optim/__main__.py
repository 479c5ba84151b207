"""``python -m clr_optim``: the same as the command ``clr-optim``."""

import sys

from clr_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
