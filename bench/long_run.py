"""Take millions of steps: does the rate drift, does memory grow, does a step become slower?

Adam in float64 with epsilon 0 and a constant gradient of 1 moves each value by exactly the rate, up
to rounding. The distance that a value has moved is therefore the sum of all rates that the steps
used. The policy's formula gives the same sum. This file has its own copy of the formula: the
library's formula would only be compared with itself.

The load of the machine, and with it the time of a step, changes by the minute. After every fifth
thousand steps, a young optimizer therefore takes a thousand steps too. The result is the ratio of
the CPU time of the old optimizer to that of the young one.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch

from clr_optim import CyclicalOptimizer
from clr_optim.backends import BACKENDS
from clr_optim.bench.machine import describe_machine
from clr_optim.options import Parser, add_json, check_json, text_beside_json, write_json

__all__ = ["add_arguments", "main", "run"]

DESCRIPTION = (
    "Takes ten million steps of Adam on four values. Compares the learning rate, and the distance "
    "that the values moved, with the policy's formula. Prints the process's memory and the median "
    "time of a step for every million steps."
)
_BASE, _MAX, _UP = 1e-4, 1e-3, 2000
#: Steps that are timed together. The rate is checked after each chunk.
_CHUNK = 1000
#: Chunks of the old optimizer per chunk of a young one.
_TO_ONE = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``clr-optim bench long``."""
    add = parser.add_argument
    add("--steps", type=int, default=10_000_000, metavar="N", help="how many (10,000,000)")
    add("--rows", type=int, default=10, metavar="N", help="parts to report on (10)")
    add("--backend", choices=BACKENDS, default="auto", help="(auto)")
    add_json(parser)


def rate(step: int) -> float:
    """Return the rate of a step by the formula of ``"triangular"``."""
    return _BASE + (_MAX - _BASE) * (_UP - abs(step % (2 * _UP) - _UP)) / _UP


def way(steps: int) -> float:
    """Return the sum of the rates of the first ``steps`` steps."""
    cycles, rest = divmod(steps, 2 * _UP)
    return cycles * math.fsum(map(rate, range(2 * _UP))) + math.fsum(map(rate, range(rest)))


def resident_kib() -> int | None:
    """Return the resident memory of the process, or None if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Take the steps, print a line for each part, write the file.

    Returns:
        The contents of the file.

    Raises:
        ValueError: if the steps cannot be parted into rows of whole thousands.
        OSError: if the file cannot be written, before any step.
    """
    steps, rows = args.steps, args.rows
    if rows < 1 or steps < 1 or steps % (rows * _CHUNK):
        raise ValueError(
            f"--steps {steps} must be a positive multiple of {_CHUNK} times --rows {rows}, "
            "which must be at least 1"
        )
    check_json(args.json)
    torch.set_num_threads(1)
    opt, values = _optimizer(args.backend)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "steps": steps,
        "backend": args.backend,
        "rows": [],
    }
    print("      steps   µs a step   of it CPU   to a young one   resident KiB   load", flush=True)
    drift = 0.0
    for row in range(1, rows + 1):
        wall, cpu, to_young = [], [], []
        young, young_values = _optimizer(args.backend)
        for chunk in range(steps // rows // _CHUNK):
            took, of_it_cpu = _timed(opt, values)
            wall.append(took)
            cpu.append(of_it_cpu)
            if chunk % _TO_ONE == 0:
                to_young.append(of_it_cpu / _timed(young, young_values)[1])
            expected = rate(opt.iteration)
            drift = max(drift, abs(opt.param_groups[0]["lr"] - expected) / expected)
        line = {
            "until": steps // rows * row,
            "wall_us": round(statistics.median(wall), 3),
            "cpu_us": round(statistics.median(cpu), 3),
            "fastest_us": round(min(wall), 3),
            "to_young": round(statistics.median(to_young), 4),
            "resident_kib": resident_kib(),
            "load": round(os.getloadavg()[0], 2),
        }
        results["rows"].append(line)
        print(
            f"{line['until']:>11,} {line['wall_us']:>11.2f} {line['cpu_us']:>11.2f} "
            f"{line['to_young']:>16.3f} {line['resident_kib'] or 'unknown':>14} {line['load']:>6}",
            flush=True,
        )
    expected_way = way(steps)
    first, last = results["rows"][0], results["rows"][-1]
    results |= {
        "iteration": opt.iteration,
        "largest_error_of_rate": drift,
        "error_of_sum_of_rates": max(
            abs(-value / expected_way - 1) for value in values.detach().tolist()
        ),
        "grown_kib": None
        if first["resident_kib"] is None
        else last["resident_kib"] - first["resident_kib"],
        "last_over_first": {
            name: round(last[name] / first[name], 4)
            for name in ("wall_us", "cpu_us", "fastest_us", "to_young")
        },
    }
    print(
        f"rate: off by at most {drift:.1e} of itself; sum of rates: by "
        f"{results['error_of_sum_of_rates']:.1e}; memory grown by {results['grown_kib']} KiB"
    )
    ratios = results["last_over_first"]
    print(
        f"last part over first: {ratios['wall_us']:.3f} of the time, {ratios['cpu_us']:.3f} of the "
        f"CPU's time, {ratios['fastest_us']:.3f} of the fastest, {ratios['to_young']:.3f} of the "
        "ratio to a young optimizer"
    )
    if args.json != "-":
        write_json(args.json, results)
    return results


def _optimizer(backend: str) -> tuple[CyclicalOptimizer[torch.optim.Adam], torch.nn.Parameter]:
    values = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = CyclicalOptimizer(
        torch.optim.Adam([values], lr=_MAX, eps=0.0),
        base_lr=_BASE,
        step_size_up=_UP,
        backend=backend,
    )
    return opt, values


def _timed(
    opt: CyclicalOptimizer[torch.optim.Adam], values: torch.nn.Parameter
) -> tuple[float, float]:
    """Take a chunk of steps; return microseconds per step, and CPU microseconds per step."""
    # In training each gradient is new. Here two gradients take turns, new ones for each chunk.
    grads = [torch.ones_like(values) for _ in range(2)]
    begin, begin_cpu = perf_counter(), thread_time()
    for k in range(_CHUNK):
        values.grad = grads[k % 2]
        opt.step()
    cpu = thread_time() - begin_cpu
    return (perf_counter() - begin) / _CHUNK * 1e6, cpu / _CHUNK * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m clr_optim.bench.long_run``."""
    parser = Parser(prog="clr_optim.bench.long_run", description=DESCRIPTION)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        with text_beside_json(args.json):
            results = run(args)
        if args.json == "-":
            write_json(args.json, results)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
