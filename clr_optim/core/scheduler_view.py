"""CyclicalScheduler: a view of an optimizer, for frameworks that insist on a scheduler."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clr_optim.core.warn import callers_level

__all__ = ["CyclicalScheduler"]


class CyclicalScheduler(LRScheduler):
    """Show the rates of a :class:`CyclicalOptimizer` to a framework that logs a scheduler's rates.

    The optimizer's own step advances the cycle: :meth:`step` changes nothing but what
    :meth:`get_last_lr` shows. There is nothing to save, since the optimizer's checkpoint holds the
    position.

    Args:
        optimizer: the optimizer; its :attr:`CyclicalOptimizer.scheduler` is such a view.

    Raises:
        TypeError: if the optimizer is no CyclicalOptimizer, nor a framework's wrapper around one.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=3)
        >>> scheduler = CyclicalScheduler(opt)
        >>> opt.step()
        >>> scheduler.step()
        >>> scheduler.last_epoch, scheduler.get_last_lr(), scheduler.get_lr()
        (1, [0.2], [0.2])
        >>> scheduler.load_state_dict(scheduler.state_dict())
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not hasattr(optimizer, "lr_at"):
            raise TypeError(
                f"optimizer must be a CyclicalOptimizer, got {type(optimizer).__name__}: wrap it, "
                "as in CyclicalOptimizer(optimizer).scheduler"
            )
        # LRScheduler.__init__ would write rates and patch step().
        self.optimizer: Any = optimizer
        self._step_count = 1  # frameworks add to it

    @property
    def base_lrs(self) -> list[float | Tensor]:  # type: ignore[override]
        """The rates of step 0."""
        return list(self.optimizer.lr_at(0))

    @property
    def last_epoch(self) -> int:
        """The optimizer's iteration."""
        return int(self.optimizer.iteration)

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        pass  # frameworks write it while they restore; the optimizer knows the position

    @property
    def _last_lr(self) -> list[float | Tensor]:
        return self.get_last_lr()

    @_last_lr.setter
    def _last_lr(self, value: object) -> None:
        pass  # SequentialLR writes it, and reads it afterwards

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the rates of the last step until :meth:`step` is called, as torch's schedulers do.

        Frameworks log between the optimizer's step and the scheduler's, and mean the rate that was
        used.

        Returns:
            One rate per group, that of the optimizer's last step, or of the next step after
            :meth:`step` and after a change of course.
        """
        optimizer = self.optimizer
        iteration = optimizer.iteration
        if iteration in (0, optimizer._shared.position.viewed):
            return list(optimizer.get_last_lr())
        return list(optimizer.lr_at(iteration - 1))

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the next step, one per group: what ignite writes into groups."""
        return list(self.optimizer.get_last_lr())

    def step(self, epoch: int | None = None) -> None:
        """Make :meth:`get_last_lr` show the next step's rates; change nothing else.

        Args:
            epoch: ignored.
        """
        self.optimizer._shared.position.viewed = self.optimizer.iteration

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dictionary: the optimizer's state dict holds the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make :meth:`get_last_lr` show the next step's rates, as :meth:`step` does.

        Args:
            state_dict: empty, as :meth:`state_dict` returns it. The position in that of a torch
                scheduler is not taken over: if it differs from the optimizer's, there is a warning.
        """
        position = self.last_epoch
        saved = state_dict.get("last_epoch", position) if state_dict else position
        if saved != position:
            warnings.warn(
                f"state_dict has last_epoch={saved!r}, and the optimizer is at step {position}, "
                "which stays: load the optimizer's state dict, which holds the position, or call "
                "set_iteration(...) of the optimizer",
                UserWarning,
                stacklevel=callers_level(),
            )
        self.step()
