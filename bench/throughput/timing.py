"""Take steps in turns, in a new order each round, and time each of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from random import Random
from time import perf_counter

import numpy as np

__all__ = ["Step", "interleave", "orders", "spread"]

Step = Callable[[], object]

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 300


def orders(
    names: list[str], seconds: float, seed: int = 0, least: int | None = None
) -> Iterator[list[str]]:
    """Yield the names in a new random order, round after round, until the time is up.

    Args:
        names: the names.
        seconds: the time.
        seed: of the order.
        least: the least number of rounds; ``None`` is 5.
    """
    # A random order keeps a variant from always running after the same neighbour.
    chance = Random(seed)
    end = perf_counter() + seconds
    least = _LEAST_ROUNDS if least is None else least
    for number in range(_MOST_ROUNDS):
        if number >= least and perf_counter() > end:
            break
        yield chance.sample(names, len(names))


def interleave(
    steps: Mapping[str, Step], prepare: Step, seconds: float, seed: int = 0
) -> dict[str, list[float]]:
    """Time the steps in turns, and call ``prepare`` before each step, untimed.

    Returns:
        The seconds of each step, one per round, by name.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 2:  # two untimed steps each: the first one creates state
        prepare()
        steps[name]()
    gc.disable()
    try:
        for order in orders(names, seconds, seed):
            for name in order:
                prepare()
                begin = perf_counter()
                steps[name]()
                times[name].append(perf_counter() - begin)
    finally:
        gc.enable()
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile of the seconds."""
    return {
        "median_s": float(np.median(times)),
        "p10_s": float(np.percentile(times, 10)),
        "p90_s": float(np.percentile(times, 90)),
    }
