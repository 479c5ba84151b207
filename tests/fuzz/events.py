"""Declare what may happen to the two optimizers, with the values of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """How often an event happens, and the values that its arguments may take."""

    weight: float
    arguments: dict[str, Sequence[Any]]


WHICH = range(64)
SEEDS = range(2**16)
FLAG = (False, True)


def event(weight: float, **arguments: Sequence[Any]) -> Callable[[Any], Any]:
    """Declare a method as an event. The method returns False if it changed nothing.

    Args:
        weight: how often the event happens, relative to the others.
        **arguments: the values that each argument may take.
    """

    def declare(method: Any) -> Any:
        method.event = Event(weight, arguments)
        return method

    return declare


def declared_in(part: type) -> Iterator[tuple[str, Event]]:
    """Return name and event of each method that a class declares, in the order of its text."""
    for name, method in vars(part).items():
        if hasattr(method, "event"):
            yield name, method.event


class BoomError(Exception):
    """A closure or a hook raises this."""


def boom(*args: object) -> None:
    raise BoomError
