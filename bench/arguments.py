"""Types and checks of command-line arguments that several measurements share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from clr_optim.bench.gpu import why_no_gpu
from clr_optim.options import flag

__all__ = ["device", "duration", "refuse_options"]


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


def refuse_options(
    args: argparse.Namespace,
    names: Iterable[str],
    words: str,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raise if one of these options was given: it has no effect with the mode that words name.

    Args:
        args: the options.
        names: of those that have no effect.
        words: the mode, and why they have none.
        defaults: those other than None, False and an empty text.

    Raises:
        argparse.ArgumentError: naming both.
    """
    for name in names:
        value = getattr(args, name)
        # Not `in`, for which 0.0 is False: a time of 0 was given.
        is_given = value is not None and value is not False and value != ""
        if is_given and value != (defaults or {}).get(name):
            raise argparse.ArgumentError(None, f"{flag(name)} has no effect with {words}")
