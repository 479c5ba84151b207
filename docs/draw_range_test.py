"""Draw the picture of the README's range test: run the README's code, then draw its result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from clr_optim import plotting

DOCS = Path(__file__).parent


def main() -> None:
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", readme, flags=re.S | re.M):
        exec(block, space)
    figure = plotting.plot_range_test(
        space["result"], title="LR range test of the README's network"
    )
    plotting.save(figure, DOCS / "range-test.png")


if __name__ == "__main__":
    main()
