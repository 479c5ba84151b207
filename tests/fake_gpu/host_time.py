"""The host's time of a step: ours beside torch's fused step with its scheduler, in turns.

    make fake-gpu-host

On the fake device no kernel and no operation runs here, so the device takes no time. What a real
driver takes is missing: about 9 µs for a step of two launches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clr_optim import CyclicalOptimizer
from fake_gpu import device

MAKERS: dict[str, Callable[..., Any]] = {
    "sgd_momentum": lambda params, **more: torch.optim.SGD(params, lr=0.1, momentum=0.9, **more),
    "adamw": lambda params, **more: torch.optim.AdamW(params, lr=0.1, **more),
}


def parameters(count: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.empty(64, device="cuda")) for _ in range(count)]


def time_of(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - begin)


def measure(rule: str, count: int, *, moving: bool) -> dict[str, Any]:
    """Return the medians of both steps, in microseconds."""
    ours, twins = parameters(count), parameters(count)
    wrapped = CyclicalOptimizer(MAKERS[rule](ours), "triangular", backend="triton")
    fused = MAKERS[rule](twins, fused=True)
    scheduler = torch.optim.lr_scheduler.CyclicLR(fused, 0.1, 0.4, cycle_momentum=False)
    sets: list[list[Tensor]] = [[torch.empty_like(p) for p in ours] for _ in range(2)]
    times: dict[str, list[float]] = {"clr_optim": [], "torch_fused": []}
    for k in range(300 if count < 500 else 100):
        for params in (ours, twins):
            for param, grad in zip(params, sets[k % 2 if moving else 0], strict=True):
                param.grad = grad
        times["clr_optim"].append(time_of(wrapped.step))
        times["torch_fused"].append(time_of(lambda: (fused.step(), scheduler.step())))
    found = {name: round(statistics.median(each[10:]), 1) for name, each in times.items()}
    return {"rule": rule, "tensors": count, "gradients": "move" if moving else "stay", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device.library.fake_set_runners(None, None)  # nothing runs
    rows = []
    for count in (6, 161, 1000):
        for rule in MAKERS:
            for moving in (False, True):
                rows.append(measure(rule, count, moving=moving))
                print(*rows[-1].values(), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
