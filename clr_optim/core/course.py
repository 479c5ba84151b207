"""Course: the policy, position and bounds of an optimizer, to read and to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
from torch import Tensor

from clr_optim.checks import as_position, check_int
from clr_optim.core import edits
from clr_optim.core.shared import alone
from clr_optim.core.wrapper import OptimizerT, Wrapper
from clr_optim.schedule import Schedule

__all__ = ["Course", "Number"]

#: a bound: a number, one per group, or one for each name of a group
Number = float | Tensor | Sequence[float | Tensor] | npt.NDArray[Any] | Mapping[str, float | Tensor]


class Course(Wrapper[OptimizerT]):
    """A wrapper that knows where its schedule is, and which rates come next."""

    @property
    def schedule(self) -> Schedule:
        """The policy, as a schedule."""
        return self._shared.settings.schedule

    @property
    def policy(self) -> str:
        """The name of the policy; :attr:`schedule` has its settings too."""
        return self.schedule.name

    @property
    def iteration(self) -> int:
        """Steps taken, which is the number of the next ``step()``, counted from 0.

        If only the device knows the number, the host waits for the device: after steps that a
        GradScaler's fused path or ``skip_above`` may have skipped there, and after a capture into a
        CUDA graph.
        """
        shared = self._shared
        if shared.position.is_certain:
            shared.warn_of_skips()
            return shared.position.believed()
        with shared.lock:
            position: int = shared.position.ask()
            shared.warn_of_skips()
            return position

    @property
    def skipped(self) -> int:
        """Steps that ``skip_above`` has skipped, 0 without it; checkpoints carry the number.

        If only the device knows the number, the host waits for the device. An overflow under a
        GradScaler does not count.
        """
        skipped: int = self._shared.skipped()
        return skipped

    @property
    def base_lr(self) -> float | list[float]:
        """The ``base_lr`` that the next step uses, a number, or a list if the groups differ.

        If the phase of the next step brings bounds, this is the bound of that phase. A policy that
        decays takes its rates from the bounds and the decay: :meth:`lr_at` returns them.
        """
        return _one_or_each([base for base, _ in self._bounds()])

    @property
    def max_lr(self) -> float | list[float]:
        """The ``max_lr`` that the next step uses, as :attr:`base_lr`."""
        return _one_or_each([top for _, top in self._bounds()])

    def _bounds(self) -> list[tuple[float, float]]:
        """Return the bounds of each group at the next step."""
        self._shared.position.warn_unread_bounds()
        bounds = self._shared.mirror.bounds()
        phases = self.schedule.phases
        if any(phase.has_bounds for phase in phases):
            phase = phases[self.schedule.locate(self.iteration)[0]]
            if phase.base_lr is not None and phase.max_lr is not None:
                bounds = [(phase.base_lr, phase.max_lr)] * len(bounds)
        return bounds

    @property
    def cycle(self) -> float:
        """Cycles done; 2.5 is half-way through the third cycle."""
        return self.schedule.cycle(self.iteration)

    @property
    def steps_to_cycle_end(self) -> int | None:
        """Steps until the cycle is complete; ``None`` if there is no cycle."""
        return self.schedule.steps_to_cycle_end(self.iteration)

    def lr_at(self, step: int) -> list[float]:
        """Return the rates that a step uses.

        Args:
            step: the number of the step, an integer >= 0, counted from 0.

        Returns:
            One rate per group.

        Raises:
            TypeError, ValueError: naming the value and what would be right.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=2)
            >>> opt.lr_at(1), opt.lr_at(2)
            ([0.25], [0.4])
        """
        step = check_int("step", step, minimum=0)
        return self.schedule.rates(step, self._shared.mirror.bounds())

    def get_last_lr(self) -> list[float]:
        """Return the rates of the next step, one per group, as torch's schedulers do."""
        return self.lr_at(self.iteration)

    @alone
    def set_iteration(self, iteration: int) -> None:
        """Go to a step of the schedule, without calling cycle-end hooks.

        Averages start anew: the next one copies its parameter.

        Args:
            iteration: the number of the next step, an integer >= 0.

        Raises:
            TypeError, ValueError: naming the value and what would be right.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=3)
            >>> opt.set_iteration(9)
            >>> opt.cycle, opt.steps_to_cycle_end, opt.get_last_lr()
            (1.5, 3, [0.4])
        """
        iteration = as_position(iteration, "iteration")
        self._shared.in_backward.refuse_in_pass("set_iteration()")
        self._shared.position.settle()
        self._shared.mirror.look_ahead(iteration)  # a scale_fn may raise, before anything changes
        self._shared.averaging.begin_anew()
        self._shared.position.go_to(iteration)

    @alone
    def set_bounds(self, *, base_lr: Number | None = None, max_lr: Number | None = None) -> None:
        """Change the bounds, from the next step on.

        Args:
            base_lr, max_lr: a number or one per group, as in the constructor; ``None`` keeps the
                present bound.

        Raises:
            TypeError, ValueError: for impossible bounds, and if every phase of the schedule brings
                its bounds.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4))
            >>> opt.set_bounds(base_lr=0.2)
            >>> opt.get_last_lr(), opt.lr_at(2000)
            ([0.2], [0.4])
        """
        self._shared.in_backward.refuse_in_pass("set_bounds()")
        edits.set_bounds(self._shared, base_lr, max_lr)


def _one_or_each(values: list[float]) -> float | list[float]:
    """Return the number that all values equal, or the values."""
    return values[0] if len(set(values)) == 1 else values
