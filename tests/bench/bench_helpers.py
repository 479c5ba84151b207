"""Helpers of the benchmark's tests: tiny runs, and a fake GPU on the CPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from clr_optim.backends.triton import is_interpreted
from clr_optim.bench import gpu, machine, throughput
from clr_optim.bench.throughput import command, timing
from clr_optim.bench.workloads import WORKLOADS

TINY = ["--seconds-per-cell", "0", "--cells-only", "--threads", "1"]


def shrink(monkeypatch):
    """Make the benchmark small: few rounds, small arrays."""
    real = machine.Limit
    monkeypatch.setattr(command, "Limit", lambda *args: real(2**12))
    monkeypatch.setattr(timing, "_LEAST_ROUNDS", 2)
    monkeypatch.setitem(WORKLOADS, "1000x256", [(3,)] * 4)


def run_tiny(tmp_path, *options):
    path = tmp_path / "results.json"
    assert throughput.main([*TINY, "--json", str(path), *options]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def error(capsys, *options):
    with pytest.raises(SystemExit) as exit_:
        throughput.main([*TINY, *options])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()  # no usage text
    return line


def row_of(
    rule="adam", workload="mlp", ours=1e-3, fused=2e-3, fraction=None, backend="native", wrong=()
):
    times = {"default": 8e-3, "foreach": 4e-3, "fused": fused, "ours": ours}
    return {
        "rule": rule,
        "workload": workload,
        "dtype": "float32",
        "tensors": 6,
        "params": 1000,
        "bytes": 28_000,
        "backend": backend,
        "times": {k: {"median_s": v, "p10_s": v / 2, "p90_s": 2 * v} for k, v in times.items()},
        "wrong": list(wrong),
        "ratio_vs_best_torch": fused / ours,
        "ratio_vs_default_torch": 8e-3 / ours,
        "limit_gbps": None if fraction is None else 50.0,
        "fraction_of_limit": fraction,
    }


class FakeEvent:
    """Records the time; the fake device has then finished all earlier work."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)

    def query(self):
        return True


class FakeGraph:
    """Holds a captured step of one optimizer; a replay takes the step."""

    step: Any

    def replay(self):
        params = [p for group in self.step.param_groups for p in group["params"]]
        now = [p.grad for p in params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        self.step.step()
        for param, grad in zip(params, now, strict=True):
            param.grad = grad


@contextmanager
def fake_capture(graph: FakeGraph, stream: object) -> Iterator[None]:
    """Capture without effect, as CUDA does. Here the step runs, and is then undone."""
    before = {}

    def note(optimizer, args, kwargs):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before.update(params=params, values=[p.detach().clone() for p in params])
        before.update(state=copy.deepcopy(optimizer.state_dict()))
        graph.step, graph.grads = optimizer, [p.grad for p in params]

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
    graph.step.load_state_dict(before["state"])
    for param, value in zip(before["params"], before["values"], strict=True):
        param.data.copy_(value)


H200 = SimpleNamespace(
    L2_cache_size=60 * 2**20, total_memory=140 * 2**30, multi_processor_count=132
)


def play_h200(monkeypatch):
    """Replace the parts of ``torch.cuda`` that the benchmark calls, as if a GPU were present."""
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def unknown_clock():
        raise ModuleNotFoundError("pynvml")

    fakes = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda: "NVIDIA H200",
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda device: H200,
        "clock_rate": unknown_clock,
        "synchronize": lambda: None,
        "Event": FakeEvent,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
    }
    # Only the benchmark's module sees the fake: torch itself would try to use the GPU.
    cuda = SimpleNamespace(**fakes)
    fake_torch = SimpleNamespace(
        cuda=cuda, version=SimpleNamespace(cuda="12.8", hip=None), __version__="2.11.0"
    )
    if is_interpreted():
        import triton_helpers  # noqa: F401  (repairs the interpreter)
    monkeypatch.setattr(gpu, "torch", fake_torch)
    monkeypatch.setattr(gpu.Gpu, "device", torch.device("cpu"))
    monkeypatch.setattr(gpu.Gpu, "backend", "triton" if is_interpreted() else "torch")
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 1e-5)
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    return fake_torch
