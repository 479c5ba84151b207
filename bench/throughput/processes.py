"""Processes."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from os import environ
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step
from clr_optim.bench.throughput.variants import ours, torch_steps
from clr_optim.bench.workloads import RULES, WORKLOADS

__all__ = ["measure_first_step", "measure_memory", "probe_first_step", "probe_memory"]


def measure_first_step() -> dict[str, Any]:
    """Seconds of an Adam's first step over the MLP, each in a process of its own.

    ``compiled_s`` with an empty cache, so with the compilation; ``cached_s`` with what that left
    behind; ``torch_s`` by the wrapped optimizer's own step.
    """
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, backend in (
            ("compiled_s", "native"),
            ("cached_s", "native"),
            ("torch_s", "torch"),
        ):
            settings = {"CLR_OPTIM_CACHE_DIR": cache, "CLR_OPTIM_BACKEND": backend}
            taken = _in_process("probe_first_step", environment=settings)
            if "skipped" in taken:
                return taken
            if taken["backend"] != backend:
                return {"skipped": "the native kernels do not serve here"}
            result[name] = taken["seconds"]
    return result


def probe_first_step() -> dict[str, Any]:
    """The first step of this process."""
    tensors = Tensors(WORKLOADS["mlp"], torch.float32)
    tensors.move_gradients()
    optimizer = ours(RULES["adam"], tensors.params)
    begin = perf_counter()
    optimizer.step()
    seconds = perf_counter() - begin
    return {"seconds": seconds, "backend": optimizer.explain().partition(":")[0]}


def measure_memory(workload: str) -> dict[str, Any]:
    """Bytes that an Adam step takes beyond parameters, gradients and state, at its peak.

    Of the third step, in a process of its own: the growth of the resident memory's high-water
    mark, which Linux resets on demand. Accurate to about a megabyte.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {"skipped": "needs /proc/self/clear_refs, which is Linux's"}
    return _in_process("probe_memory", workload)


def probe_memory(workload: str) -> dict[str, Any]:
    """The measurement, which would count whatever else a process holds and frees."""
    tensors = Tensors(WORKLOADS[workload], torch.float32)
    adam = RULES["adam"]
    steps: dict[str, Step] = {**torch_steps(adam, tensors.params)}
    steps["ours"] = ours(adam, tensors.params).step
    result: dict[str, Any] = {"workload": workload, "rule": "adam", "dtype": "float32"}
    for name in list(steps):
        step = steps.pop(name)  # and its state goes when the next one comes
        for _ in range(2):
            tensors.move_gradients()
            step()
        tensors.move_gradients()
        gc.collect()
        with suppress(AttributeError):  # freed memory that glibc kept would hide what is taken
            ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            return {"skipped": f"/proc/self/clear_refs cannot be written ({error.strerror})"}
        step()
        result[f"{name}_bytes"] = max(0, _resident("VmHWM") - before)
    return result


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _in_process(
    function: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a function of this module returns in a new Python with as many threads."""
    code = (
        f"import json, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        f"from clr_optim.bench.throughput import processes\n"
        f"print(json.dumps(processes.{function}(*{arguments!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"skipped": f"{function} exited with {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))
