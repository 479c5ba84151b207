"""Run the throughput benchmark: ``python -m clr_optim.bench``, the same as ``clr-optim bench``."""

import sys

from clr_optim.bench.throughput import main

if __name__ == "__main__":
    sys.exit(main())
