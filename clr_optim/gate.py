"""The gate of the host: which steps ``skip_above`` skips, by the norm of all gradients.

:meth:`Gate.closes` is the one formula of the host, for every backend that computes the norm there.
The formula of the device is ``open_gate`` in ``kernels/triton/gate.py``; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clr_optim.checks import check_int, check_number, shown
from clr_optim.keys import SKIPS

__all__ = [
    "FLOOR", "LARGEST", "NO_STATISTICS", "Gate", "Spike", "Statistics", "are_held",
    "check_skip_above", "check_statistics", "put_statistics", "saved_statistics",
]  # fmt: skip

#: The statistics of a gate: the number of norms in them, their running mean and variance, the
#: spikes skipped in a row, and all steps skipped.
Statistics = tuple[float, float, float, float, float]
NO_STATISTICS: Statistics = (0.0, 0.0, 0.0, 0.0, 0.0)

#: A larger norm counts as infinite, since the square of a norm must be a finite float64.
LARGEST = 2.0**511

#: The least standard deviation, as a fraction of the mean: rounding of equal norms is no spike.
FLOOR = 2.0**-10

# The largest integer up to which float64 has every integer.
_LARGEST_COUNT = 2**53

# The host warns from this number of skipped steps on, and from this fraction of all tries.
_MANY, _MANY_OF = 10, 0.01


@dataclass(frozen=True)
class Spike:
    """A limit for ``skip_above`` that follows the run: ``mean + sigmas·deviation`` of recent norms.

    For each norm of a step that happens, in float64::

        n += 1;  w = max(1/n, 1/window);  d = norm − mean
        mean += w·d;  variance = (1 − w)·(variance + w·d²)

    From ``warmup`` norms on, a step is skipped if
    ``norm > mean + sigmas·max(√variance, mean/1024)``. After ``window`` skips in a row the step is
    taken, and the statistics start anew with its norm: a lasting rise must not end a run.

    Args:
        sigmas: how many standard deviations above the mean a norm may be, > 0.
        window: the number of steps that the mean looks back, an integer >= 2.
        warmup: the number of norms before the first skip, an integer >= 1; ``None`` is ``window``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> Spike(sigmas=4.0, window=64)
        Spike(sigmas=4.0, window=64, warmup=None)
    """

    sigmas: float = 6.0
    window: int = 128
    warmup: int | None = None

    def __post_init__(self) -> None:
        sigmas = check_number("sigmas", self.sigmas, open_minimum=True)
        window = check_int("window", self.window, minimum=2, maximum=_LARGEST_COUNT)
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "window", window)
        if self.warmup is not None:
            warmup = check_int("warmup", self.warmup, minimum=1, maximum=_LARGEST_COUNT)
            object.__setattr__(self, "warmup", warmup)


class Gate:
    """Decides which steps are skipped, and keeps the statistics of the norms.

    A caller holds the optimizer's lock.

    Args:
        skip_above: the largest norm of a step that happens, or a :class:`Spike`.
        statistics: those of a checkpoint.
    """

    def __init__(self, skip_above: float | Spike, statistics: Statistics = NO_STATISTICS) -> None:
        if isinstance(skip_above, Spike):
            limit, spike = math.inf, skip_above
            warmup = float(spike.window if spike.warmup is None else spike.warmup)
        else:
            limit, spike, warmup = skip_above, Spike(), math.inf  # no norm is a spike
        #: the limit, sigmas, window and warmup of the formula
        self.limits = (limit, spike.sigmas, float(spike.window), warmup)
        self._shown = f"skip_above={skip_above!r}"
        # The statistics before the last decision and after it.
        self._last = (statistics, statistics)
        self._has_warned = False
        self.begin(statistics)

    def begin(self, statistics: Statistics) -> None:
        """Go on from the statistics of a checkpoint."""
        #: what the host knows. After steps on a device, the position must ask the device first.
        # A new object, by which a device knows that it has not heard of them.
        self.statistics = (*statistics,)
        #: the statistics as the groups hold them
        self.held = [*statistics]

    # ---- a step

    @property
    def _spike_limit(self) -> float:
        """The norm above which a norm is a spike, by the statistics so far."""
        _, sigmas, _, warmup = self.limits
        count, mean, variance, *_ = self.statistics
        if count < warmup:
            return math.inf
        return mean + sigmas * max(math.sqrt(variance), mean * FLOOR)

    @property
    def threshold(self) -> float:
        """The largest norm of a step that happens."""
        limit, _, window, _ = self.limits
        spike = self._spike_limit if self.statistics[3] < window else math.inf
        return min(limit, LARGEST, spike)

    def closes(self, norm: float) -> bool:
        """Return whether the step of a norm is skipped, and take the norm into the statistics.

        Each call counts a norm, so that a step calls it once. A norm of 0 tells nothing: no
        gradient was there, or all were 0.
        """
        if norm == 0.0:
            return False
        limit, _, window, _ = self.limits
        count, mean, variance, in_a_row, skipped = self.statistics
        is_spike = self._spike_limit < norm <= min(limit, LARGEST)
        closes = not norm <= self.threshold
        after: Statistics
        if closes:
            after = (count, mean, variance, in_a_row + is_spike, skipped + 1.0)
        elif is_spike:  # the last of too many in a row
            after = (1.0, norm, 0.0, 0.0, skipped)
        else:
            count += 1.0
            weight = max(1.0 / count, 1.0 / window)
            distance = norm - mean
            mean += weight * distance
            variance = (1.0 - weight) * (variance + weight * (distance * distance))
            after = (count, mean, variance, 0.0, skipped)
        self.take(after)
        return closes

    def judge(self, norm: float) -> float:
        """Take the norm of a step into the statistics; return the threshold of the next step."""
        self.closes(norm)
        return self.threshold

    def take(self, statistics: Statistics) -> None:
        """Take in the statistics after a decision of the device."""
        # An interrupt between the two lines finds the old statistics.
        self._last = self.statistics, statistics
        self.statistics = statistics

    def take_back(self, before: Statistics) -> None:
        """Forget the decision about a step that did not happen after all.

        Args:
            before: the statistics before the step. If other code has replaced them, those stay.
        """
        known, after = self._last
        if known is before and self.statistics is after:
            self.statistics = before

    # ---- the groups

    def write(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write the statistics into groups, as a new list: a checkpoint holds the old one."""
        if self.held != [*self.statistics]:
            self.held = [*self.statistics]
        for group in groups:
            group[SKIPS] = self.held

    def adopt(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over the statistics that a load has written into groups; without any, start anew.

        A group that was taken away and came back has an old list beside ours, which does not count.
        """
        if not groups or any(group.get(SKIPS) is self.held for group in groups):
            return
        self.begin(saved_statistics(groups, "param_groups"))

    # ---- the user

    def warning(self, taken: int) -> str | None:
        """Return a warning if many steps were skipped, once.

        Args:
            taken: the number of steps that happened.
        """
        skipped = int(self.statistics[-1])
        tries = taken + skipped
        if self._has_warned or skipped < _MANY or skipped <= _MANY_OF * tries:
            return None
        self._has_warned = True
        return (
            f"{self._shown} has skipped {skipped} of {tries} steps: look at opt.grad_norm; if the "
            "run is healthy, raise the limit, else lower max_lr or mend the batches"
        )


def are_held(gate: Gate | None, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all groups hold the list that the gate wrote, if there is a gate."""
    return gate is None or all(group.get(SKIPS) is gate.held for group in groups)


def put_statistics(gate: Gate | None, group: dict[str, Any]) -> None:
    """Put the list of the gate into a group; without a gate, remove that of a checkpoint."""
    if gate is not None:
        group[SKIPS] = gate.held
    else:
        group.pop(SKIPS, None)


def check_skip_above(value: object) -> float | Spike | None:
    """Return the constructor's argument, checked.

    Raises:
        TypeError, ValueError: naming the value and what would be right.
    """
    if value is None or isinstance(value, Spike):
        return value
    if value is Spike:
        raise TypeError(f"skip_above must be a number or a Spike, got the class {value!r}: call it")
    try:
        return check_number("skip_above", value, open_minimum=True, finite=False)
    except TypeError as error:
        raise TypeError(f"{error}; give the largest norm, math.inf or Spike()") from None


def check_statistics(value: object, name: str) -> Statistics:
    """Return the statistics that a group of a checkpoint holds.

    Raises:
        TypeError, ValueError: for what no gate writes.
    """
    if not isinstance(value, (list, tuple)) or len(value) != len(NO_STATISTICS):
        raise TypeError(
            f"{name} must be a list of {len(NO_STATISTICS)} numbers, got {shown(value)}: delete "
            "that key from the groups to load the rest"
        )
    numbers = [check_number(f"{name}[{i}]", each) for i, each in enumerate(value)]
    count, mean, variance, in_a_row, skipped = numbers
    for i in (0, 3, 4):
        check_int(f"{name}[{i}]", numbers[i], minimum=0, maximum=_LARGEST_COUNT)
    check_number(f"{name}[1]", mean, maximum=LARGEST)
    check_number(f"{name}[2]", variance, maximum=LARGEST * LARGEST)
    return count, mean, variance, in_a_row, skipped


def saved_statistics(groups: Sequence[Mapping[str, Any]], name: str) -> Statistics:
    """Return the statistics of a checkpoint's groups; without any, those of a new gate.

    Raises:
        TypeError, ValueError: for what no gate writes, and if the groups disagree.
    """
    found = {
        i: check_statistics(group[SKIPS], f"{name}[{i}][{SKIPS!r}]")
        for i, group in enumerate(groups)
        if SKIPS in group
    }
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{name} disagree on {SKIPS}: {found} by group; all groups share one gate, so set them "
            "all to the same numbers"
        )
    return next(iter(found.values()), NO_STATISTICS)
