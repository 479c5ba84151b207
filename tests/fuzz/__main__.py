"""``python -m fuzz``, with ``tests`` on the path."""

import sys

from fuzz.run import main

sys.exit(main())
