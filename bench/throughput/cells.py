"""Measure one cell: every variant of a rule's step on one workload in one dtype."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from clr_optim import CyclicalOptimizer
from clr_optim import rules as fused_rules
from clr_optim.bench.gpu import Gpu, Stopwatch
from clr_optim.bench.machine import Limit, last_level_cache
from clr_optim.bench.throughput.graphs import captured_steps
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step, interleave, orders, spread
from clr_optim.bench.throughput.variants import (
    ON_GPU,
    drop_failing_steps,
    our_optimizer,
    torch_steps,
    wrong_variants,
)
from clr_optim.bench.workloads import RULES, Rule

__all__ = ["Row", "bytes_per_element", "measure_cell", "measure_cell_on_gpu", "measure_each"]

Row = dict[str, Any]

#: A step is held against the memory's bandwidth only if it moves this many times the last cache's
#: size. A smaller step could find part of its data in the cache.
_CACHES_FULL = 4


def measure_each(
    workloads: Iterable[str], rules: Iterable[str], measure: Callable[[str, str], Row]
) -> list[Row]:
    """Return a row for each rule on each workload, with no memory of the row before."""
    rows = []
    for workload in workloads:
        for rule in rules:
            rows.append(measure(rule, workload))
            gc.collect()
    return rows


def bytes_per_element(rule: Rule, dtype: torch.dtype) -> int:
    """Count the bytes that a step must move per value of a parameter.

    The step reads and writes the parameter and each state tensor, and reads the gradient.
    """
    group = rule.optimizer([torch.zeros(1)], **rule.settings).param_groups[0]
    slots = len(fused_rules.RULES[rule.optimizer].slots(group))
    return (3 + 2 * slots) * dtype.itemsize


def measure_cell(
    rule: str,
    workload: str,
    dtype: str,
    tensors: Tensors,
    seconds: float,
    limit: Limit | None,
    compiled: bool = False,
    seed: int = 0,
) -> Row:
    """Measure a cell on the CPU.

    If the step moves more than the caches hold, the same rounds measure the memory's bandwidth. On
    a shared machine, other users can change the bandwidth by half within minutes. Without ``limit``
    the row has no share of the bandwidth.

    Returns:
        One row of the results.
    """
    own = our_optimizer(RULES[rule], tensors.params)
    steps: dict[str, Step] = {**torch_steps(RULES[rule], tensors.params, compiled)}
    steps["ours"] = own.step
    drop_failing_steps(steps, ["compile"], tensors.move_gradients, f"{rule}/{workload}/{dtype}")
    moved = _bytes_moved(RULES[rule], tensors)
    if moved < _CACHES_FULL * last_level_cache():
        limit = None
    probes = limit.operations if limit else {}
    times = interleave({**steps, **probes}, tensors.move_gradients, seconds, seed)
    median = {name: float(np.median(values)) for name, values in times.items()}
    wrong = _wrong(RULES[rule], tensors)
    best = min(median[name] for name in steps if name not in ("ours", *wrong))
    gbps = max(limit.gbps(median).values()) if limit else None
    return {
        **_described(rule, workload, dtype, tensors, own),
        "rounds": len(times["ours"]),
        "times": {name: spread(times[name]) for name in steps},
        "wrong": wrong,
        "ratio_vs_best_torch": best / median["ours"],
        "ratio_vs_default_torch": median["default"] / median["ours"],
        "limit_gbps": gbps,
        "fraction_of_limit": gbps and moved / median["ours"] / 1e9 / gbps,
    }


def _bytes_moved(rule: Rule, tensors: Tensors) -> int:
    return sum(size * bytes_per_element(rule, dtype) for dtype, size in tensors.sizes.items())


def _wrong(rule: Rule, tensors: Tensors, *where: Any) -> list[str]:
    """Return the variants that compute wrong values in one of the dtypes."""
    found = [wrong_variants(rule, dtype, *where) for dtype in tensors.sizes]
    return list(dict.fromkeys(name for names in found for name in names))


def _described(
    rule: str, workload: str, dtype: str, tensors: Tensors, own: CyclicalOptimizer[Any]
) -> Row:
    """Return the part of a row that describes the cell."""
    return {
        "rule": rule,
        "workload": workload,
        "dtype": dtype,
        "tensors": len(tensors.params),
        "params": tensors.size,
        "bytes": _bytes_moved(RULES[rule], tensors),
        "backend": own.explain().partition(":")[0],
    }


def measure_cell_on_gpu(
    gpu: Gpu,
    rule: str,
    workload: str,
    dtype: str,
    tensors: Tensors,
    seconds: float,
    limit: Limit,
    compiled: bool = False,
    backward: bool = False,
    seed: int = 0,
) -> Row:
    """Measure a cell on a GPU.

    Ratios and shares of the bandwidth are of the time on the device. If the caches can hold a good
    part of the step's data, the row has no share: the data may come from a cache, and launching
    such a step takes most of its time. ``waited`` is the share of the rounds in which the device
    may have waited for the host; in those rounds the device's time includes the host's.

    Returns:
        One row of the results.
    """
    kind, cell = RULES[rule], f"{rule}/{workload}/{dtype}"
    own = our_optimizer(kind, tensors.params, backend=gpu.backend)
    steps = torch_steps(kind, tensors.params, compiled, plain=ON_GPU)
    drop_failing_steps(steps, ["fused", "compile"], tensors.move_gradients, cell)
    torch_names = list(steps)
    steps["ours"] = own.step
    steps.update(captured_steps(gpu, kind, tensors, "fused" in torch_names, cell))
    moved = _bytes_moved(kind, tensors)
    from_memory = moved >= _CACHES_FULL * gpu.cache()
    timed = {**steps, **(limit.operations if from_memory else {})}
    busy = limit.operations["in_place"]
    watch = Stopwatch(gpu, busy, tensors.move_gradients, again=not backward)
    times = watch.interleave(timed, orders(list(timed), seconds, seed))
    device = {name: float(np.median(times[name].device)) for name in timed}
    host = {name: float(np.median(times[name].host)) for name in steps}
    checked = [name for name in steps if name in ("forloop", "fused", "ours", "ours_graph")]
    wrong = _wrong(kind, tensors, checked, gpu)
    right = [name for name in torch_names if name not in wrong]
    gbps = max(limit.gbps(device).values()) if from_memory else None
    graph = None if "ours_graph" in wrong else device.get("ours_graph")
    return {
        **_described(rule, workload, dtype, tensors, own),
        "rounds": len(times["ours"].device),
        "times": {
            name: {
                "device_median_s": device[name],
                "device_p10_s": float(np.percentile(times[name].device, 10)),
                "device_p90_s": float(np.percentile(times[name].device, 90)),
                "host_median_s": host[name],
                "waited": float(np.mean(times[name].waited)),
            }
            for name in steps
        },
        "wrong": wrong,
        "device_median_s": device["ours"],
        "host_median_s": host["ours"],
        "graph_median_s": graph,
        "ratio_vs_best_torch": min(device[name] for name in right) / device["ours"],
        "ratio_vs_default_torch": device["default"] / device["ours"],
        "host_ratio_vs_best_torch": min(host[name] for name in right) / host["ours"],
        "host_ratio_vs_default_torch": host["default"] / host["ours"],
        "graph_ratio_vs_best_torch": graph and min(device[name] for name in right) / graph,
        "limit_gbps": gbps,
        "fraction_of_limit": gbps and moved / device["ours"] / 1e9 / gbps,
        "graph_fraction_of_limit": graph and gbps and moved / graph / 1e9 / gbps,
    }
