"""Describe a GPU, time steps on it, and capture steps as graphs.

The module uses ``torch.cuda``, which on ROCm serves AMD's GPUs. Run as a program, it prints the
GPU's name for files and the architecture to compile for: ``nvidia-h200 sm_90``.
"""

from __future__ import annotations

import gc
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from clr_optim.backends.triton import why_no_triton

__all__ = ["Gpu", "Stopwatch", "Times", "slug", "why_no_gpu"]

Step = Callable[[], object]

#: A shorter step runs several times between two events: events have steps of half a microsecond.
_SHORT_S, _MOST_REPEATS = 1e-4, 10
#: The longest time for which other work keeps the device busy ahead of a step.
_MOST_AHEAD_S = 0.02
_WARM_UP = 3

# AMD's largest Infinity Cache. torch does not report it.
_INFINITY_CACHE = 256 * 2**20


class Times(NamedTuple):
    """The seconds of a step, one per round: on the device, and on the host to launch the step."""

    device: list[float]
    host: list[float]
    #: whether the device may have waited for the host in between
    waited: list[bool]


class _Replay:
    """Launch a graph, and keep alive the objects that the graph reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, *owners: object) -> None:
        self._graph, self._owners = graph, owners

    def __call__(self) -> None:
        self._graph.replay()


class Gpu:
    """The current device of ``torch.cuda``."""

    device = torch.device("cuda")
    #: of our optimizer
    backend = "triton"

    def synchronize(self) -> None:
        """Wait until the device has finished all launched work."""
        torch.cuda.synchronize()

    def event(self) -> Any:
        """Make an event that records when the device reaches it."""
        make: Any = torch.cuda.Event  # torch gives it no types
        return make(enable_timing=True)

    def stream(self) -> Any:
        """Make a new stream, for work beside other work."""
        make: Any = torch.cuda.Stream  # torch gives it no types
        return make()

    def capture(self, step: Step, *owners: object, warm_up: int = _WARM_UP) -> Step:
        """Capture a step as a graph, and return a function that replays it.

        Each replay reads the gradients of the capture. Graphs may be replayed beside each other:
        each has its own stream, and with it its own workspace of cuBLAS.

        Args:
            step: the step to capture.
            owners: objects to keep alive as long as the graph.
            warm_up: how many eager steps to take first.
        """
        side = self.stream()  # torch asks for a side stream, so that the warm-up is not captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step()
        return _Replay(graph, side, step, *owners)

    def cache(self) -> int:
        """Return the size of the last cache in bytes."""
        known = int(getattr(_properties(), "L2_cache_size", 0))
        return max(known, _INFINITY_CACHE) if torch.version.hip else known or 64 * 2**20

    def target(self) -> str:
        """Return the architecture's name for compilers: ``sm_90``, ``gfx942``."""
        if torch.version.hip:
            return str(_properties().gcnArchName).partition(":")[0]
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def describe(self) -> dict[str, object]:
        """Return name, driver and clocks, as far as torch reports them, and Triton's version."""
        import triton

        properties = _properties()
        clock = None
        with suppress(Exception):  # of many kinds, without the vendor's management library
            clock = torch.cuda.clock_rate()
        return {
            "gpu": torch.cuda.get_device_name(),
            "target": self.target(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "gpu_cache_mib": round(self.cache() / 2**20, 1),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _driver(),
            "clock_mhz": clock,  # at this moment
            # Only newer versions of torch report the next three.
            "clock_rate_khz": getattr(properties, "clock_rate", None),
            "memory_clock_rate_khz": getattr(properties, "memory_clock_rate", None),
            "memory_bus_bits": getattr(properties, "memory_bus_width", None),
            "triton": triton.__version__,
        }


class Stopwatch:
    """Time steps on the device and on the host, apart.

    *On the device*: the time between two events. Other work first keeps the device busy while the
    host launches the step. The step then does not wait for the host. The other work exceeds every
    cache, so that the caches hold none of the step's data. It lasted long enough if the device had
    not reached the first event when the host recorded the second one. Otherwise the step is
    repeated behind twice as much work, up to 20 ms. A queue takes about a thousand launches. If a
    step has more launches, the device may still wait; the result records this. A short step runs
    several times between the events; caches may serve all but its first run.

    *On the host*: the time of the call alone, on an idle device.

    Args:
        gpu: the device.
        busy: the other work, of 0.1 ms or more.
        prepare: gives a step its gradients, untimed.
        again: whether ``prepare`` costs the device no time, so that a step may run several times
            between two events.
    """

    def __init__(self, gpu: Gpu, busy: Step, prepare: Step, *, again: bool = True) -> None:
        self._gpu, self._busy, self._prepare = gpu, busy, prepare
        self._most_repeats = _MOST_REPEATS if again else 1
        self._busy_s = min(self.by_device(busy) for _ in range(3))
        self._most_ahead = max(1, math.ceil(_MOST_AHEAD_S / self._busy_s))

    def by_device(self, step: Step) -> float:
        """Return the device's seconds for one step, after a little other work."""
        return self._by_device(step, 1, 1)[0]

    def by_host(self, step: Step) -> float:
        """Return the host's seconds for one call."""
        self._prepare()
        self._gpu.synchronize()
        begin = perf_counter()
        step()
        return perf_counter() - begin

    def interleave(
        self, steps: Mapping[str, Step], orders: Iterable[Iterable[str]]
    ) -> dict[str, Times]:
        """Time the steps in turns, on device and host, in the given orders."""
        times = {name: Times([], [], []) for name in steps}
        chosen = {name: self._choose(step) for name, step in steps.items()}  # warms up too
        gc.disable()
        try:
            for order in orders:
                for name in order:
                    ahead, repeats = chosen[name]
                    ahead, seconds, waited = self._covered(steps[name], ahead, repeats)
                    chosen[name] = ahead, repeats
                    times[name].device.append(seconds)
                    times[name].waited.append(waited)
                    times[name].host.append(self.by_host(steps[name]))
        finally:
            gc.enable()
        return times

    def _choose(self, step: Step) -> tuple[int, int]:
        """Choose how much other work goes ahead of a step, and how often the step runs."""
        for _ in range(2):  # the first call may compile
            self.by_host(step)
        ahead, seconds, _ = self._covered(step, 1, 1)
        repeats = min(max(1, math.ceil(_SHORT_S / seconds)), self._most_repeats)
        return min(ahead * repeats, self._most_ahead), repeats

    def _covered(self, step: Step, ahead: int, repeats: int) -> tuple[int, float, bool]:
        """Time a step behind enough other work.

        Returns:
            The amount of other work, the seconds of a step, and whether the device still waited.
        """
        while True:
            seconds, waited = self._by_device(step, ahead, repeats)
            if not waited or ahead >= self._most_ahead:
                return ahead, seconds, waited
            ahead = min(2 * ahead, self._most_ahead)

    def _by_device(self, step: Step, ahead: int, repeats: int) -> tuple[float, bool]:
        """Time ``repeats`` steps on the device, behind ``ahead`` calls of the other work.

        Returns:
            The device's seconds per step, and whether the device may have waited for the host.
        """
        self._gpu.synchronize()
        begin, end = self._gpu.event(), self._gpu.event()
        for _ in range(ahead):
            self._busy()
        self._prepare()
        begin.record()
        step()
        for _ in range(repeats - 1):
            self._prepare()
            step()
        end.record()
        waited = bool(begin.query())
        self._gpu.synchronize()
        # elapsed_time() is in milliseconds.
        return max(float(begin.elapsed_time(end)), 1e-6) / 1e3 / repeats, waited


def why_no_gpu() -> str | None:
    """Return why no GPU can be measured here and what helps, or None."""
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU here; use a machine with a GPU and a torch "
            "for CUDA or ROCm, or measure with --device cpu"
        )
    return why_no_triton()


def slug(name: str) -> str:
    """Turn a device's name into a name for files: ``"NVIDIA H200"`` into ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def _properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


def _driver() -> str:
    """Return the version of the kernel module, on Linux."""
    with suppress(OSError):
        found = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else "unknown"
    with suppress(OSError):
        return Path("/sys/module/amdgpu/version").read_text().strip()
    return "unknown"


def main() -> int:
    """Print the device's name for files and its architecture; return the exit code."""
    if problem := why_no_gpu():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(slug(torch.cuda.get_device_name()), Gpu().target())
    return 0


if __name__ == "__main__":
    sys.exit(main())
