"""The schedulers of torch that can be read, and their positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import lr_scheduler as torchs
from torch.optim.lr_scheduler import LRScheduler

from clr_optim.checks import check_int

__all__ = ["check_methods", "known_class", "leaves", "position_of"]

_KNOWN: tuple[type[LRScheduler], ...] = (
    torchs.LinearLR,
    torchs.ConstantLR,
    torchs.StepLR,
    torchs.MultiStepLR,
    torchs.ExponentialLR,
    torchs.PolynomialLR,
    torchs.CosineAnnealingLR,
    torchs.CosineAnnealingWarmRestarts,
    torchs.CyclicLR,
    torchs.OneCycleLR,
    torchs.SequentialLR,
    torchs.ChainedScheduler,
    torchs.LambdaLR,
    torchs.MultiplicativeLR,
)

# The methods that decide on the rates. If other code replaced one, the rates are unknown.
_RATE_METHODS = (
    "step", "get_lr", "_get_closed_form_lr", "_update_lr", "scale_fn", "_anneal_func",
)  # fmt: skip

_OTHERWISE = (
    "construct CyclicalOptimizer(optimizer, policy) with a policy or a scale_fn that gives these "
    "rates, then call set_iteration with the run's step"
)


def known_class(scheduler: object) -> type[LRScheduler]:
    """Return the class of torch that a scheduler is of.

    Raises:
        TypeError: for any other class, and if other code replaced a method that decides on rates.
    """
    if isinstance(scheduler, torchs.ReduceLROnPlateau):
        raise TypeError(
            "scheduler is a ReduceLROnPlateau, whose rates depend on the loss, and a schedule is a "
            "function of the step: construct CyclicalOptimizer(optimizer, policy), and call "
            "set_bounds(max_lr=...) where the loss stands still"
        )
    for cls in _KNOWN:
        if isinstance(scheduler, cls):
            check_methods(scheduler, cls)
            return cls
    raise TypeError(
        "scheduler must be one of torch.optim.lr_scheduler whose rate is a function of the step "
        f"({', '.join(each.__name__ for each in _KNOWN)}), got an object of type "
        f"{type(scheduler).__name__}: {_OTHERWISE}"
    )


def check_methods(scheduler: LRScheduler, cls: type[LRScheduler]) -> None:
    """Raise if a scheduler has another method than torch's class that decides on its rates."""
    for method in _RATE_METHODS:
        present = getattr(scheduler, method, None)
        if getattr(present, "__func__", present) is not getattr(cls, method, None):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__} with another {method} than "
                f"{cls.__name__}'s, so its rates are not known: {_OTHERWISE}"
            )


def leaves(scheduler: Any) -> Iterator[Any]:
    """Yield the schedulers that a scheduler is made of, or the scheduler itself."""
    if isinstance(scheduler, (torchs.SequentialLR, torchs.ChainedScheduler)):
        for each in scheduler._schedulers:
            yield from leaves(each)
    else:
        yield scheduler


def position_of(scheduler: Any) -> int:
    """Return the number of steps that a scheduler has taken.

    Raises:
        TypeError, ValueError: if the number is no number of steps, or if the schedulers of a chain
            disagree.
    """
    if not isinstance(scheduler, torchs.ChainedScheduler):
        return check_int("scheduler.last_epoch", scheduler.last_epoch, minimum=0)
    positions = [position_of(each) for each in scheduler._schedulers]
    if len(set(positions)) > 1:
        raise ValueError(
            f"scheduler: the schedulers of its chain have taken {positions} steps, and a chain "
            "steps them together: take over a chain whose schedulers only the chain has stepped"
        )
    return positions[0]
