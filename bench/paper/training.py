"""Train runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

from clr_optim.bench.paper.one_run import WARM_UP, Run

__all__ = ["train"]


class _Training:
    """A run on its way, and the clock of its training and its checkpoints."""

    def __init__(self, run: Run, save: Callable[[Run], None], save_every_s: float) -> None:
        self.run, self._save, self._every = run, save, save_every_s
        if run.on_kernels and run.iterations - run.iteration > WARM_UP:
            run.capture()
            run.synchronize()
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
        """One iteration, or one evaluation; a checkpoint before it, if it is time."""
        run = self.run
        if perf_counter() - self._saved >= self._every:
            self.save()
        if run.iteration < run.next_evaluation:
            run.iterate()
        else:
            self._pause()
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
    """Train runs to the end, saving now and then.

    Args:
        runs: each is asked for when there is room for it.
        save: writes a checkpoint.
        stopped: true as soon as all are to be saved and left.
        show: called with a run after each of its iterations and evaluations.
        save_every_s: seconds between checkpoints of a run.
        together: how many are trained beside each other, an iteration each in turn.
        finish: called with a run that came to its end.

    Returns:
        The runs that were under way when it was stopped.
    """
    waiting = iter(runs)
    under_way: list[_Training] = []
    while True:
        while len(under_way) < together and (run := next(waiting, None)) is not None:
            with run.apart():
                under_way.append(_Training(run, save, save_every_s))
        if not under_way:
            return []
        if stopped():
            for training in under_way:
                with training.run.apart():
                    training.save()
            return [training.run for training in under_way]
        for training in tuple(under_way):
            run = training.run
            with run.apart():
                training.advance()
                show(run)
                if run.is_done:
                    finish(run)
                    under_way.remove(training)
