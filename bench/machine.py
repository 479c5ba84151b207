"""Describe the machine of a measurement, and measure the bandwidth of its memory."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch

from clr_optim._version import __version__
from clr_optim.kernels.native import describe

__all__ = ["Limit", "describe_machine", "last_level_cache"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_machine() -> dict[str, object]:
    """Return CPU, memory, versions and kernels, without host name or paths."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "caches": _caches(),
        "governor": _read(_GOVERNOR) or "unknown",
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "clr_optim": __version__,
        "kernels": describe()["kernels"],
    }


def last_level_cache() -> int:
    """Return the size of the last cache in bytes; 64 MiB if the system does not report it."""
    unit = {"K": 2**10, "M": 2**20}
    sizes = [int(s[:-1]) * unit[s[-1]] for s in _caches().values() if s[-1:] in unit]
    return max(sizes, default=64 * 2**20)


class Limit:
    """Measure the memory's bandwidth, in GB/s of moved bytes, by three operations.

    A CPU reads memory into the cache before it writes there (write-allocate); these reads count.
    ``copy``, a = b, moves 12 bytes per float; ``triad``, a = b + s·c, 16; ``in_place``, a = a + s,
    8. If a CPU skips the reads for whole cache lines, the figures of copy and triad are too high,
    and the shares of the limit too low. A GPU writes whole sectors without reading: 8, 12 and 8.

    Args:
        floats: the length of the arrays, far more than the caches hold.
        device: of the arrays.
    """

    def __init__(self, floats: int = 2**26, device: torch.device | str = "cpu") -> None:
        a, b, c = (torch.full((floats,), value, device=device) for value in (1.0, 0.5, 0.25))
        read_first = 4 * floats if a.device.type == "cpu" else 0
        self._bytes = {
            "copy": 8 * floats + read_first,
            "triad": 12 * floats + read_first,
            "in_place": 8 * floats,
        }
        #: the operations to time, by name
        self.operations: dict[str, Callable[[], object]] = {
            "copy": lambda: a.copy_(b),
            "triad": lambda: torch.add(b, c, alpha=0.5, out=a),
            "in_place": lambda: a.add_(0.5),
        }

    def gbps(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return each operation's bandwidth, given the seconds that it took."""
        return {name: self._bytes[name] / seconds[name] / 1e9 for name in self.operations}

    def best(
        self, repeats: int = 7, timed: Callable[[Callable[[], object]], float] | None = None
    ) -> dict[str, float]:
        """Return each operation's best bandwidth over several runs in turns.

        Args:
            repeats: how many runs.
            timed: calls an operation and returns its seconds; ``None`` times until it returns.
        """
        timed = timed or _timed
        fastest = dict.fromkeys(self.operations, math.inf)
        for _ in range(repeats):
            for name, operation in self.operations.items():
                fastest[name] = min(fastest[name], timed(operation))
        return self.gbps(fastest)


def _timed(operation: Callable[[], object]) -> float:
    begin = perf_counter()
    operation()
    return perf_counter() - begin


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def _cpu() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    with suppress(AttributeError, ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _caches() -> dict[str, str]:
    """Return sizes by level, as ``{"L1d": "32K", ...}``; empty if the system reports none."""
    caches = {}
    for index in sorted(_CACHES.glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(_read(index / "type"), "")
        caches[f"L{_read(index / 'level')}{kind}"] = _read(index / "size")
    return caches
