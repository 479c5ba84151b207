"""Types of command-line arguments that several measurements share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress

from clr_optim.bench.gpu import why_no_gpu

__all__ = ["device", "duration"]


def duration(unit: str) -> Callable[[str], float]:
    """Make a type for a finite time of at least 0 in ``unit``, which the message names."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if 0 <= float(text) < math.inf:
                return float(text)
        raise argparse.ArgumentTypeError(f"must be a number of {unit} >= 0, got {text!r}")

    return convert


def device(text: str) -> str:
    """Accept ``cpu``, and ``cuda`` if a GPU can be used here."""
    if text not in ("cpu", "cuda"):
        hint = "; CUDA_VISIBLE_DEVICES chooses among GPUs" if text.startswith("cuda:") else ""
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}{hint}")
    if text == "cuda" and (problem := why_no_gpu()):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return text
