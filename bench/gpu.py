"""A GPU as the benchmark sees it: what it is, what its work takes, and steps as graphs.

All of it by ``torch.cuda``, which on ROCm speaks for AMD's GPUs. Run as a module it prints a name
for files and the architecture to compile for: ``nvidia-h200 sm_90``.
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

#: Shorter steps are taken several times between two events, which tell half microseconds.
_SHORT_S, _MOST_REPEATS = 1e-4, 10
#: So long at most is the device kept busy ahead of a step.
_MOST_AHEAD_S = 0.02
_WARM_UP = 3

# AMD's Infinity Cache, which torch does not tell of; no GPU's is larger.
_INFINITY_CACHE = 256 * 2**20


class Times(NamedTuple):
    """Seconds that a step took, once per round: on the device, and on the host to launch it."""

    device: list[float]
    host: list[float]
    #: whether the device may have waited for the host meanwhile
    waited: list[bool]


class _Replay:
    """Launches a graph, and keeps alive what it reads from and writes to."""

    def __init__(self, graph: torch.cuda.CUDAGraph, *kept: object) -> None:
        self._graph, self._kept = graph, kept

    def __call__(self) -> None:
        self._graph.replay()


class Gpu:
    """The current device of ``torch.cuda``."""

    device = torch.device("cuda")
    #: that ours runs on
    backend = "triton"

    def synchronize(self) -> None:
        """Wait until all that was launched is done."""
        torch.cuda.synchronize()

    def event(self) -> Any:
        """One that knows when the device came to it."""
        make: Any = torch.cuda.Event  # which torch leaves without types
        return make(enable_timing=True)

    def stream(self) -> Any:
        """A stream of its own, for work beside other work."""
        make: Any = torch.cuda.Stream  # which torch leaves without types
        return make()

    def capture(self, step: Step, *kept: object, warm_up: int = _WARM_UP) -> Step:
        """A graph of ``step``, which is taken ``warm_up`` times before; ``kept`` lives as long.

        The gradients it is captured with are those that each replay reads. Graphs captured here may
        be replayed beside each other: each has its own stream, and with it cuBLAS's workspace.
        """
        side = self.stream()  # as torch would have it: what warms up is not for the graph
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step()
        return _Replay(graph, side, step, *kept)

    def cache(self) -> int:
        """Bytes of its last cache."""
        known = int(getattr(_properties(), "L2_cache_size", 0))
        return max(known, _INFINITY_CACHE) if torch.version.hip else known or 64 * 2**20

    def target(self) -> str:
        """The architecture, as compilers call it: ``sm_90``, ``gfx942``."""
        if torch.version.hip:
            return str(_properties().gcnArchName).partition(":")[0]
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def describe(self) -> dict[str, object]:
        """The device, its driver and clocks, as far as torch tells, and Triton's version."""
        import triton

        properties = _properties()
        clock = None
        with suppress(Exception):  # needs NVIDIA's or AMD's management library: many kinds
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
            "clock_mhz": clock,  # at that moment
            # Of which only newer versions of torch tell.
            "clock_rate_khz": getattr(properties, "clock_rate", None),
            "memory_clock_rate_khz": getattr(properties, "memory_clock_rate", None),
            "memory_bus_bits": getattr(properties, "memory_bus_width", None),
            "triton": triton.__version__,
        }


class Stopwatch:
    """Times steps on the device and on the host, apart.

    *On the device*: between two events. First other work keeps it busy for as long as the host
    takes to launch the step, so that nothing between the events waits for the host; that work is
    also larger than any cache, and leaves nothing of the step's there. Whether it was enough is
    seen: the device must not have come to the first event when the host has recorded the second.
    If it has, the step is taken again behind twice as much, up to 20 ms. Where a step is of more
    launches than a queue takes (about a thousand) the device may wait all the same, which is noted.
    A short step is taken several times between the events, and caches may serve all but the first.

    *On the host*: the call alone, on an idle device; nothing in it is waited for.

    Args:
        gpu: the device.
        busy: the other work, of a tenth of a millisecond or more.
        prepare: gives a step its gradients, untimed.
        again: whether to prepare is nothing that the device would notice, so that steps may
            follow each other between two events.
    """

    def __init__(self, gpu: Gpu, busy: Step, prepare: Step, *, again: bool = True) -> None:
        self._gpu, self._busy, self._prepare = gpu, busy, prepare
        self._most_repeats = _MOST_REPEATS if again else 1
        self._busy_s = min(self.by_device(busy) for _ in range(3))
        self._most_ahead = max(1, math.ceil(_MOST_AHEAD_S / self._busy_s))

    def by_device(self, step: Step) -> float:
        """Seconds of the device for one step, after a little other work."""
        return self._by_device(step, 1, 1)[0]

    def by_host(self, step: Step) -> float:
        """Seconds until the call returns."""
        self._prepare()
        self._gpu.synchronize()
        begin = perf_counter()
        step()
        return perf_counter() - begin

    def interleave(
        self, steps: Mapping[str, Step], orders: Iterable[Iterable[str]]
    ) -> dict[str, Times]:
        """Time the steps in turn, each both ways, in the orders given."""
        times = {name: Times([], [], []) for name in steps}
        chosen = {name: self._choose(step) for name, step in steps.items()}  # which warms up, too
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
        """How much other work goes ahead of a step, and how often it is taken."""
        for _ in range(2):  # the first of all may compile
            self.by_host(step)
        ahead, seconds, _ = self._covered(step, 1, 1)
        repeats = min(max(1, math.ceil(_SHORT_S / seconds)), self._most_repeats)
        return min(ahead * repeats, self._most_ahead), repeats

    def _covered(self, step: Step, ahead: int, repeats: int) -> tuple[int, float, bool]:
        """What it took of other work, the seconds of a step, and whether it was not enough."""
        while True:
            seconds, waited = self._by_device(step, ahead, repeats)
            if not waited or ahead >= self._most_ahead:
                return ahead, seconds, waited
            ahead = min(2 * ahead, self._most_ahead)

    def _by_device(self, step: Step, ahead: int, repeats: int) -> tuple[float, bool]:
        """Seconds of the device per step, taken so often after so much other work.

        And whether it may have waited for the host, by whose time gradients are prepared, too.
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
        # Comes in milliseconds.
        return max(float(begin.elapsed_time(end)), 1e-6) / 1e3 / repeats, waited


def why_no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here and what would help, or None."""
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU here; run this where there is one, with a "
            "torch built for CUDA or ROCm, or measure with --device cpu"
        )
    return why_no_triton()


def slug(name: str) -> str:
    """A device's name for a file: ``"NVIDIA H200"`` is ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def _properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


def _driver() -> str:
    """The kernel module's version, on Linux."""
    with suppress(OSError):
        found = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else "unknown"
    with suppress(OSError):
        return Path("/sys/module/amdgpu/version").read_text().strip()
    return "unknown"


def main() -> int:
    """Print the device's name for files and its architecture; returns the exit code."""
    if problem := why_no_gpu():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(slug(torch.cuda.get_device_name()), Gpu().target())
    return 0


if __name__ == "__main__":
    sys.exit(main())
