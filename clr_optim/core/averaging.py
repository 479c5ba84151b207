"""Averaging: the averages that kernels leave to the host, and the exchange with the parameters."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clr_optim.averages import done, due, offsets
from clr_optim.core.position import Position
from clr_optim.core.settings import Settings
from clr_optim.keys import AVERAGE, AVERAGES
from clr_optim.masters import master_of
from clr_optim.rules import AverageSlot
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
        # The parameters that hold their averages now, see _exchange().
        self._places: list[list[Tensor]] = []

    @property
    def _state(self) -> Any:
        return self._settings.optimizer.state

    @property
    def is_exchanged(self) -> bool:
        """Whether parameters hold their averages, see :meth:`exchanged`."""
        return bool(self._places)

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

    def copy(self, params: Iterable[Tensor], copies: dict[Tensor, Tensor]) -> None:
        """Copy parameters that have a gradient and no average, before a step.

        Args:
            params: the parameters that the step updates by torch's own code.
            copies: a dictionary to which copies are added. A closure may give gradients to further
                parameters, so there may be a second call.

        Raises:
            RuntimeError: if the optimizer keeps state that is no dictionary.
        """
        slot = self._settings.extras.average_slot
        if slot is not None:
            found = self._without(params)
            copies.update({p: _copy(p, slot) for p in found if p not in copies})

    def put(self, params: Iterable[Tensor], copies: Mapping[Tensor, Tensor]) -> None:
        """Create averages after a step, in which the optimizer has made its own state.

        Args:
            params: the parameters that the step has updated by torch's own code.
            copies: what :meth:`copy` copied before the step.
        """
        slot = self._settings.extras.average_slot
        if slot is not None:
            for param in self._without(params):
                copy = copies[param] if param in copies else _copy(param, slot)
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
            if param.grad is not None and self._of(param) is None:
                found.append(param)
        return found

    @torch.no_grad()
    def take(self, position: int, moved: list[Any], only: Collection[int] | None = None) -> None:
        """Move the averages that fall due in a step, once its parameters are new.

        Args:
            position: the number of the step.
            moved: an empty list, to which something is added as soon as averages have moved.
            only: ids of the parameters whose averages no kernel moves; None if no kernel serves.
        """
        settings = self._settings
        groups = settings.optimizer.param_groups
        found, _ = due(settings.average, settings.schedule, position, groups)
        calls = [
            self._moving(pairs, weight)
            for group, weight in zip(groups, found, strict=False)
            if (pairs := self._pairs(group, only))
        ]
        # No Python code runs between the calls, so that an interrupt finds all or none.
        moved.extend(itertools.starmap(operator.call, calls))

    def _moving(self, pairs: Sequence[tuple[Tensor, Tensor]], weight: float) -> tuple[Any, ...]:
        """Return the call that moves averages toward their parameters by a weight; 1 copies."""
        averages = [local_part(average) for average, _ in pairs]
        params = [
            master_of(param, self._state[param]).to(average.dtype)
            for average, (_, param) in zip(averages, pairs, strict=True)
        ]
        if weight == 1.0:
            return torch._foreach_copy_, averages, params
        return torch._foreach_lerp_, averages, params, weight

    def _pairs(
        self, group: Mapping[str, Any], only: Collection[int] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the averages of a group's parameters, each with its parameter."""
        return [
            (average, param)
            for param in dict.fromkeys(group["params"])
            if (only is None or id(param) in only) and (average := self._of(param)) is not None
        ]

    def _of(self, param: Tensor) -> Tensor | None:
        """Return the average of a parameter, or None without one."""
        values, slot = self._state.get(param), self._settings.extras.average_slot
        if slot is None or not isinstance(values, dict):
            return None
        return slot.find(values, param)

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
            for average, param in self._pairs(group)
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

        This is a generator, which puts the parameters back when it is dropped, too: an interrupt
        in a line of the caller between entry and block loses nothing.

        Args:
            let_go: has native code forget the values of the coming steps.
        """
        self.refuse_exchanged("averaged()")
        pairs = self.averages()
        let_go()
        try:
            for pair in pairs:
                _exchange(pair, self._places)
            yield
        finally:
            _put_back(self._places)


def _copy(param: Tensor, slot: AverageSlot) -> Tensor:
    """Return a copy of a parameter in the dtype of its average."""
    return param.detach().to(slot.dtype_for(param), copy=True)


@torch.no_grad()
def _exchange(pair: tuple[Tensor, Tensor], places: list[list[Tensor]]) -> None:
    """Exchange the contents of a parameter and of its average.

    Args:
        pair: the parameter and its average.
        places: a list to which an entry is added: the parameter, the average, and the tensor that
            holds the parameter's own values. That is the average, if the average can hold them.
    """
    param, average = pair
    place = [param, average, param.detach().clone()]
    places.append(place)
    param.copy_(average)
    if average.dtype == param.dtype:
        # No Python code runs between the copy and its note: an interrupt finds both or none.
        place[2:] = map(average.copy_, place[2:])


def _put_back(places: list[list[Tensor]]) -> None:
    """Undo each :func:`_exchange`, the last first, as parameters may share memory."""
    try:
        while places:
            _restore(places[-1])
            places.pop()
    except KeyboardInterrupt:
        _put_back(places)
        raise


@torch.no_grad()
def _restore(place: list[Tensor]) -> None:
    """Undo an :func:`_exchange`. A second call changes nothing."""
    param, average, own, *_ = place
    if own is average:
        mean = param.detach().clone()
        place[2:] = map(Tensor.copy_, (param, average), (average, mean))
    else:
        param.copy_(own)
