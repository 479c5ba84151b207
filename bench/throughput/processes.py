"""Measure in new processes: the first step of a process, and the peak memory of a step."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from os import environ
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step
from clr_optim.bench.throughput.variants import our_optimizer, torch_steps
from clr_optim.bench.user_model import load_model
from clr_optim.bench.workloads import RULES, WORKLOADS

__all__ = [
    "measure_first_step", "measure_iteration_memory", "measure_memory", "measure_model_memory",
    "probe_first_step", "probe_iteration_memory", "probe_memory", "probe_model_memory",
]  # fmt: skip

_CLEAR_REFS = Path("/proc/self/clear_refs")
_NOT_LINUX = {"skipped": "needs /proc/self/clear_refs, which is Linux's"}


def measure_first_step() -> dict[str, Any]:
    """Measure Adam's first step over the MLP, each time in a new process.

    Returns:
        Seconds: ``native_s``, which includes loading the extension, and ``torch_s`` by torch's own
        step. If the native kernels cannot serve, ``skipped`` with the reason.
    """
    result: dict[str, Any] = {}
    for backend in ("native", "torch"):
        taken = _in_process("probe_first_step", environment={"CLR_OPTIM_BACKEND": backend})
        if "skipped" in taken:
            return taken
        if taken["backend"] != backend:
            return {"skipped": "the native kernels do not serve here"}
        result[f"{backend}_s"] = taken["seconds"]
    return result


def probe_first_step() -> dict[str, Any]:
    """Measure the first step of this process."""
    tensors = Tensors(WORKLOADS["mlp"], torch.float32)
    tensors.move_gradients()
    optimizer = our_optimizer(RULES["adam"], tensors.params)
    begin = perf_counter()
    optimizer.step()
    seconds = perf_counter() - begin
    return {"seconds": seconds, "backend": optimizer.explain().partition(":")[0]}


def measure_memory(workload: str) -> dict[str, Any]:
    """Measure the memory that an Adam step takes beyond parameters, gradients and state.

    The figure is the growth of the process's peak resident memory during its third step, in a new
    process. Linux resets that peak on demand. The figure is accurate to about a megabyte.

    Returns:
        Bytes by variant, or ``skipped`` with the reason.
    """
    if not _CLEAR_REFS.exists():
        return dict(_NOT_LINUX)
    return _in_process("probe_memory", workload)


def measure_model_memory(model: str, rule: str, seed: int) -> dict[str, Any]:
    """Measure as :func:`measure_memory` does, for the user's parameters.

    Args:
        model: the option ``--model``.
        rule: the update rule.
        seed: of the first weights.
    """
    if not _CLEAR_REFS.exists():
        return dict(_NOT_LINUX)
    return _in_process("probe_model_memory", model, rule, seed)


def measure_iteration_memory(model: str, variant: str, seed: int) -> dict[str, Any]:
    """Measure the memory that an iteration takes beyond parameters and state, in a new process.

    Args:
        model: a model of :data:`clr_optim.bench.workloads.IN_BACKWARD`.
        variant: a variant of its iterations.
        seed: of the first weights.

    Returns:
        ``peak_bytes``, the growth of the peak resident memory, or ``skipped`` with the reason.
    """
    if not _CLEAR_REFS.exists():
        return dict(_NOT_LINUX)
    return _in_process("probe_iteration_memory", model, variant, seed)


def probe_iteration_memory(model: str, variant: str, seed: int) -> dict[str, Any]:
    """Measure in this process, which must have done nothing else before."""
    from clr_optim.bench.throughput.step_in_backward import make_variants

    params, variants = make_variants(model, seed)
    alive = 0

    def count(_: Any) -> None:
        nonlocal alive
        present = sum(p.numel() * p.element_size() for p in params if p.grad is not None)
        alive = max(alive, present)

    with variants[variant]() as iterate:
        for _ in range(2):
            iterate()
        for param in params:
            param.grad = None
        peak = _peak_of(iterate)
        for param in params:
            add: Any = param.register_post_accumulate_grad_hook
            add(count)
        iterate()
    return {**peak, "gradients_alive_bytes": alive}


def probe_memory(workload: str) -> dict[str, Any]:
    """Measure in this process, which must have done nothing else before."""
    tensors = Tensors(WORKLOADS[workload], torch.float32)
    described = {"workload": workload, "rule": "adam", "dtype": "float32"}
    return {**described, **_probe_memory(tensors, "adam")}


def probe_model_memory(model: str, rule: str, seed: int) -> dict[str, Any]:
    """Measure in this process, which must have done nothing else before."""
    with redirect_stdout(sys.stderr):  # the user's function may print
        params = load_model(model, seed).params
    return _probe_memory(Tensors.of(params), rule)


def _probe_memory(tensors: Tensors, rule: str) -> dict[str, Any]:
    kind = RULES[rule]
    steps: dict[str, Step] = {**torch_steps(kind, tensors.params)}
    steps["ours"] = our_optimizer(kind, tensors.params).step
    result: dict[str, Any] = {}
    for name in list(steps):
        step = steps.pop(name)  # the next variant frees the state of this one
        for _ in range(2):
            tensors.move_gradients()
            step()
        tensors.move_gradients()
        peak = _peak_of(step)
        if "peak_bytes" not in peak:
            return peak
        result[f"{name}_bytes"] = peak["peak_bytes"]
    return result


def _peak_of(step: Step) -> dict[str, Any]:
    """Return by how many bytes the peak resident memory grows, as ``peak_bytes``."""
    gc.collect()
    # glibc keeps freed memory. A step that reuses such memory would seem to take none.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    try:
        _CLEAR_REFS.write_text("5")
    except OSError as error:
        return {"skipped": f"/proc/self/clear_refs cannot be written ({error.strerror})"}
    step()
    return {"peak_bytes": max(0, _resident("VmHWM") - before)}


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _in_process(
    function: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Call a function of this module in a new Python with as many threads; return its result."""
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
