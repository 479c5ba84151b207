"""Train runs to the end, several in turns, with checkpoints by the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

from clr_optim.bench.paper.one_run import Run

__all__ = ["train"]


class _Training:
    """A run in training, with the clock of its training and its checkpoints."""

    def __init__(self, run: Run, save: Callable[[Run], None], save_every_s: float) -> None:
        self.run, self._save, self._every = run, save, save_every_s
        run.prepare()
        self._saved = self._since = perf_counter()

    def _pause(self) -> None:
        self.run.synchronize()
        self.run.training_s += perf_counter() - self._since

    def save(self) -> None:
        """Write a checkpoint."""
        self._pause()
        self._save(self.run)
        self._saved = self._since = perf_counter()

    def advance(self) -> None:
        """Do one iteration, evaluation or capture; before it, save a checkpoint if it is time."""
        run = self.run
        if perf_counter() - self._saved >= self._every:
            self.save()
        if run.iteration < run.next_evaluation and not run.can_capture:
            run.iterate()
            return
        self._pause()
        if run.can_capture:
            run.capture()
            run.synchronize()
        else:
            run.evaluate()
        self._since = perf_counter()


def train(
    runs: Iterable[Run],
    save: Callable[[Run], None],
    stopped: Callable[[], int],
    show: Callable[[Run], None],
    save_every_s: float,
    together: int = 1,
    finish: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Train runs to the end, and save each of them from time to time.

    Args:
        runs: an iterator may create each run late: the next one is requested when one has ended.
        save: writes a checkpoint.
        stopped: returns true when all runs are to be saved and left.
        show: called with a run after each of its iterations and evaluations.
        save_every_s: seconds between checkpoints of a run.
        together: how many runs train beside each other, one iteration each in turns.
        finish: called with each finished run.

    Returns:
        The unfinished runs, if training was stopped.
    """
    waiting = iter(runs)
    current: list[_Training] = []
    while True:
        while len(current) < together and (run := next(waiting, None)) is not None:
            with run.on_stream():
                current.append(_Training(run, save, save_every_s))
        if not current:
            return []
        if stopped():
            for training in current:
                with training.run.on_stream():
                    training.save()
            return [training.run for training in current]
        for training in tuple(current):
            run = training.run
            with run.on_stream():
                training.advance()
                show(run)
                if run.is_done:
                    finish(run)
                    current.remove(training)
