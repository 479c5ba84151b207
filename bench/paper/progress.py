"""Show the progress of the runs on stderr."""

from __future__ import annotations

import sys
from time import perf_counter

from clr_optim.bench.paper.one_run import Run

__all__ = ["Progress", "duration"]


class Progress:
    """Write a line on stderr: in place on a terminal, else at most every half a minute.

    Args:
        runs: how many runs there are.
        iterations: of all runs together.
    """

    def __init__(self, runs: int, iterations: int) -> None:
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else 30.0
        self._runs, self._left = runs, iterations
        self._done = 0
        self._at: dict[tuple[str, int], tuple[int, int]] = {}  # number and iteration of each run
        self._begin = self._shown = perf_counter()

    def begin(self, run: Run) -> None:
        """Count a new run; the iterations in its checkpoint are done already."""
        self._left -= run.iteration
        self._at[run.row.name, run.seed] = (len(self._at) + 1, run.iteration)

    def show(self, run: Run) -> None:
        """Write the run's progress, if it is time."""
        which = run.row.name, run.seed
        number, at = self._at[which]
        self._done += run.iteration - at
        self._left -= run.iteration - at
        self._at[which] = (number, run.iteration)
        now = perf_counter()
        if now - self._shown < self._every and not run.is_done:
            return
        self._shown = now
        rate = max(self._done, 1) / (now - self._begin)  # the time includes evaluations
        last = f"{run.curve[-1][1]:.2f} %" if run.curve else "not evaluated yet"
        line = (
            f"[{number}/{self._runs}] {run.row.name}, seed {run.seed}: "
            f"{run.iteration:,}/{run.iterations:,}, {rate:.1f} it/s in all, {last}; left: "
            f"{duration(self._left / rate)}"
        )
        ending = "\n" if run.is_done or not self._terminal else ""
        print(
            f"\r\033[K{line}" if self._terminal else line, end=ending, file=sys.stderr, flush=True
        )


def duration(seconds: float) -> str:
    """Format seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
