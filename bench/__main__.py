"""``python -m clr_optim.bench``: the throughput benchmark, as ``clr-optim bench``."""

import sys

from clr_optim.bench.throughput import main

if __name__ == "__main__":
    sys.exit(main())
