"""Averaging: the averages that kernels leave to the host, and the exchange with the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clr_optim.averages import Average, done, due, offsets
from clr_optim.core.position import Position
from clr_optim.core.settings import Settings
from clr_optim.keys import AVERAGE, AVERAGES
from clr_optim.sharding import local_part

__all__ = ["Averaging"]


class Averaging:
    """The averages of one optimizer's parameters.

    A caller holds the optimizer's lock.

    Args:
        settings: the optimizer, its policy and its average.
        position: the position, and who knows it.
    """

    def __init__(self, settings: Settings, position: Position) -> None:
        self._settings = settings
        self._position = position
        #: whether the parameters hold their averages, see :meth:`exchanged`
        self.is_exchanged = False

    @property
    def _state(self) -> Any:
        return self._settings.optimizer.state

    def refuse_exchanged(self, what: str) -> None:
        """Raise if the parameters hold their averages.

        Args:
            what: what cannot be done meanwhile.

        Raises:
            RuntimeError: naming the remedy.
        """
        if self.is_exchanged:
            raise RuntimeError(
                f"{what} cannot run within averaged(), where the parameters hold their averages: "
                "call it after the with block"
            )

    # ---- steps that torch takes

    def left_to_host(self, params: Iterable[Tensor]) -> bool:
        """Return whether one of these parameters has an average."""
        return any(self._of(param) is not None for param in params)

    def copies(self, params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return copies of parameters that have no average, from before a step.

        Args:
            params: the parameters that the step updates by torch's own code.

        Raises:
            RuntimeError: if the optimizer keeps state that is no dictionary.
        """
        average = self._settings.average
        return {} if average is None else {p: _copy(p, average) for p in self._without(params)}

    def put(self, params: Iterable[Tensor], copies: Mapping[Tensor, Tensor]) -> None:
        """Create averages after a step, in which the optimizer has made its own state.

        Args:
            params: the parameters that the step has updated by torch's own code.
            copies: what :meth:`copies` returned before the step. A closure may have given gradients
                to further parameters.
        """
        average = self._settings.average
        if average is not None:
            for param in self._without(params):
                copy = copies[param] if param in copies else _copy(param, average)
                self._state.setdefault(param, {})[AVERAGE] = copy

    def _without(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters that have a gradient, and no average."""
        found = []
        for param in params:
            values = self._state.get(param, {})
            if not isinstance(values, dict):
                raise RuntimeError(
                    f"average={self._settings.average!r} needs a dictionary as the state of a "
                    f"parameter, and {type(self._settings.optimizer).__name__} keeps a "
                    f"{type(values).__name__}: leave average out"
                )
            if param.grad is not None and AVERAGE not in values:
                found.append(param)
        return found

    def take(self, position: int, only: Collection[int] | None = None) -> None:
        """Move the averages that fall due in a step, once its parameters are new.

        Args:
            position: the number of the step.
            only: ids of the parameters whose averages no kernel moves; None if no kernel serves.
        """
        settings = self._settings
        groups = settings.optimizer.param_groups
        found, _ = due(settings.average, settings.schedule, position, groups)
        for group, weight in zip(groups, found, strict=False):
            pairs = [
                (average, param)
                for param in group["params"]
                if (only is None or id(param) in only) and (average := self._of(param)) is not None
            ]
            _move(pairs, weight)

    def _of(self, param: Tensor) -> Tensor | None:
        """Return the average of a parameter, or None without one."""
        values = self._state.get(param)
        average = values.get(AVERAGE) if isinstance(values, dict) else None
        return average if isinstance(average, Tensor) else None

    # ---- counts

    def begin_anew(self) -> None:
        """Forget the averages taken: the next one copies its parameter."""
        for group in self._settings.optimizer.param_groups:
            group.pop(AVERAGES, None)

    def note(self) -> None:
        """Write the number of averages taken into the groups, for a checkpoint."""
        settings, position = self._settings, self._position.number
        if settings.average is None:
            return
        groups = settings.optimizer.param_groups
        number = done(settings.average, settings.schedule, position)
        lacks = offsets(settings.average, settings.schedule, groups)
        for group, lack in zip(groups, lacks, strict=True):
            if group[AVERAGES][1] != position:
                group[AVERAGES] = [number - lack, position]

    # ---- the user's view

    def averages(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter that has an average, and its average.

        Raises:
            RuntimeError: if no step has taken an average yet, or if the optimizer keeps none.
        """
        settings = self._settings
        if settings.average is None:
            raise RuntimeError(
                "this optimizer keeps no averages: construct it with average='cycle_end' or "
                "average=Ema(decay)"
            )
        self._position.settle()
        self.note()
        found = [
            (param, average)
            for group in settings.optimizer.param_groups
            if group[AVERAGES][0] > 0
            for param in group["params"]
            if (average := self._of(param)) is not None
        ]
        if not found:
            raise RuntimeError(
                f"no step has taken an average yet, at position {self._position.number}: "
                f"{settings.average!r} decides which step takes the first one"
            )
        return found

    @contextmanager
    def exchanged(self, let_go: Callable[[], None]) -> Iterator[None]:
        """Have the parameters hold their averages for the length of a block.

        Args:
            let_go: has native code forget the values of the coming steps.
        """
        self.refuse_exchanged("averaged()")
        pairs = self.averages()
        let_go()
        done: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.is_exchanged = True
        try:
            for param, average in pairs:
                done.append((param, average, _exchange(param, average)))
            yield
        finally:
            for param, average, own in done:
                _restore(param, average, own)
            self.is_exchanged = False


def _copy(param: Tensor, average: Average) -> Tensor:
    """Return a copy of a parameter in the dtype of its average."""
    return param.detach().to(average._slot.dtype_for(param), copy=True)


@torch.no_grad()
def _move(pairs: Sequence[tuple[Tensor, Tensor]], weight: float) -> None:
    """Move averages toward their parameters by a weight; 1 copies."""
    averages = [local_part(average) for average, _ in pairs]
    params = [
        local_part(p).to(average.dtype) for average, (_, p) in zip(averages, pairs, strict=True)
    ]
    if not pairs:
        return
    if weight == 1.0:
        torch._foreach_copy_(averages, params)
    else:
        torch._foreach_lerp_(averages, params, weight)


@torch.no_grad()
def _exchange(param: Tensor, average: Tensor) -> Tensor | None:
    """Exchange the contents of a parameter and of its average.

    Returns:
        The parameter's own values, if the average cannot hold them beside its own precision.
    """
    own = param.detach().clone()
    param.copy_(average)
    if average.dtype != param.dtype:
        return own
    average.copy_(own)
    return None


@torch.no_grad()
def _restore(param: Tensor, average: Tensor, own: Tensor | None) -> None:
    """Undo :func:`_exchange`."""
    if own is None:
        _exchange(param, average)
    else:
        param.copy_(own)
