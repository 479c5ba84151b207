"""Show the progress of a range test on one line of a terminal."""

from __future__ import annotations

import time

import torch

from clr_optim.console import show_progress, shows_progress
from clr_optim.range_test.result import RangeTest

__all__ = ["ProgressLine"]


class ProgressLine:
    """Show the last measurement, ten times a second at most.

    Args:
        result: the result, which grows.
        wanted: whether to show; ``None``: on the first rank, if standard error is a terminal.
    """

    def __init__(self, result: RangeTest, wanted: bool | None) -> None:
        self._result = result
        self._next = 0.0
        if wanted is None:
            dist = torch.distributed
            first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
            wanted = first and shows_progress()
        self._wanted = wanted
        self._has_shown = False

    def show(self) -> None:
        result, now = self._result, time.monotonic()
        if not self._wanted or not result.lrs or now < self._next:
            return
        self._next, self._has_shown = now + 0.1, True
        done = f"{result.steps[-1] + 1}/{result.num_steps}"
        text = (
            f"range test {done}  lr {result.lrs[-1]:.3g}  {result.metric} {result.values[-1]:.4g}"
        )
        show_progress(f"\r{text:<70}")

    def close(self) -> None:
        """End the line."""
        if self._has_shown:
            show_progress("\n")
