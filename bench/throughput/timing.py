"""Take steps in turns and time each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from random import Random
from time import perf_counter

__all__ = ["Step", "interleave", "orders"]

Step = Callable[[], object]

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 300


def orders(names: list[str], seconds: float) -> Iterator[list[str]]:
    """All of the names, in another order each round, until the time is up."""
    chance = Random(0)
    end = perf_counter() + seconds
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and perf_counter() > end:
            break
        yield chance.sample(names, len(names))  # nobody always comes after the same one


def interleave(steps: Mapping[str, Step], prepare: Step, seconds: float) -> dict[str, list[float]]:
    """Time the steps one by one in turn, in another order each round, each after ``prepare``."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 2:  # the first creates state
        prepare()
        steps[name]()
    gc.disable()
    try:
        for order in orders(names, seconds):
            for name in order:
                prepare()
                begin = perf_counter()
                steps[name]()
                times[name].append(perf_counter() - begin)
    finally:
        gc.enable()
    return times
