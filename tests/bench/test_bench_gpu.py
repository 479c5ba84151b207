"""The benchmark's view of a GPU: names, driver, and times by the stopwatch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_helpers import error

from clr_optim.bench import gpu


class Clocked:
    """A fake device with a queue, and a fake host, each with a clock in milliseconds.

    Args:
        patch: pytest's monkeypatch.
        cuda: the fake ``torch.cuda``.
        launches: by name, the times of a call on the host and on the device.
    """

    def __init__(self, patch, cuda, launches):
        self.launches, self.host, self.device = launches, 0.0, 0.0
        self.calls = []
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                clock.calls.append("|")
                self.at = max(clock.device, clock.host)

            def query(self):
                return self.at <= clock.host

            def elapsed_time(self, other):
                return other.at - self.at

        patch.setattr(cuda, "Event", Event)
        patch.setattr(cuda, "synchronize", self.synchronize)
        patch.setattr(gpu, "perf_counter", lambda: self.host / 1e3)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def __getitem__(self, name):
        def call():
            self.calls.append(name)
            on_host, on_device = self.launches[name]
            self.host += on_host
            if on_device:
                self.device = max(self.device, self.host) + on_device

        return call


def _time(clock, name, again=True, rounds=2):
    watch = gpu.Stopwatch(gpu.Gpu(), clock["busy"], clock["prepare"], again=again)
    clock.calls.clear()
    return watch.interleave({name: clock[name]}, [[name]] * rounds)[name]


@pytest.mark.parametrize(
    ("prepare", "host", "device", "repeats"),
    [
        (0.001, 0.01, 0.5, 1),  # a large model: the device takes longer than the host
        (0.001, 0.4, 0.15, 1),
        (0.001, 0.2, 0.01, 10),
        (0.15, 0.007, 0.02, 5),  # a graph of a thousand tensors; preparing them takes the host long
        (0.15, 4.0, 0.03, 4),
    ],
)
def test_a_device_that_is_busy_ahead_does_not_wait_for_the_host(
    prepare, host, device, repeats, h200, monkeypatch
):
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 0.1)
    launches = {"busy": (0.005, 0.1), "prepare": (prepare, 0), "step": (host, device)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    times = _time(clock, "step")
    assert times.device == pytest.approx([device / 1e3] * 2)
    assert times.host == pytest.approx([host / 1e3] * 2)
    assert times.waited == [False, False]
    first = clock.calls.index("|", -clock.calls[::-1].index("busy"))
    begin = ["|", "step", *["prepare", "step"] * (repeats - 1), "|"]
    assert clock.calls[first:] == [*begin, "prepare", "step"]


def test_where_the_queue_is_too_short_it_is_said_that_the_device_waited(h200, monkeypatch):
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 0.005)
    launches = {"busy": (0.0, 1.0), "prepare": (0.0, 0), "step": (7.0, 0.1)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    times = _time(clock, "step")
    assert times.waited == [True, True]
    assert times.device == pytest.approx([2.1e-3] * 2)  # the other work covers 5 of the host's 7 ms
    assert clock.calls[:-2].count("busy") <= 1 + 2 + 4 + 5 + 2 * 5


def test_a_step_that_tells_of_its_gradients_is_taken_once(h200, monkeypatch):
    launches = {"busy": (0.0, 1.0), "prepare": (0.0, 0.2), "step": (0.01, 0.01)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    times = _time(clock, "step", again=False, rounds=1)
    assert times.device == pytest.approx([1e-5])
    assert clock.calls[-7:] == ["busy", "prepare", "|", "step", "|", "prepare", "step"]


def test_a_host_that_falls_behind_once_has_more_ahead_from_then_on(h200, monkeypatch):
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 0.1)
    launches = {"busy": (0.0, 0.1), "prepare": (0.0, 0), "step": (0.05, 0.2)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    watch = gpu.Stopwatch(gpu.Gpu(), clock["busy"], clock["prepare"])

    def rounds():
        yield ["step"]
        launches["step"] = (1.0, 0.2)
        yield ["step"]
        yield ["step"]

    times = watch.interleave({"step": clock["step"]}, rounds())["step"]
    assert times.device == pytest.approx([2e-4] * 3)
    assert times.waited == [False] * 3
    assert times.host == pytest.approx([5e-5, 1e-3, 1e-3])


def test_without_a_gpu_it_says_what_to_do(capsys, h200, monkeypatch):
    assert gpu.why_no_gpu() is None
    monkeypatch.setattr(gpu, "why_no_triton", lambda: "Triton is not installed")
    assert "Triton is not installed" in error(capsys, "--device", "cuda")
    monkeypatch.setattr(h200.cuda, "is_available", lambda: False)
    said = error(capsys, "--device", "cuda")
    assert "--device: 'cuda': torch 2.11.0 finds no GPU here; use a machine with a GPU" in said
    assert "--device cpu" in said
    assert gpu.main() == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_names_for_files_and_compilers(capsys, h200, monkeypatch):
    assert gpu.main() == 0
    assert capsys.readouterr().out == "nvidia-h200 sm_90\n"
    assert gpu.slug("AMD Instinct™ MI300X") == "amd-instinct-mi300x"
    assert gpu.slug("™") == "gpu"
    assert gpu.Gpu().cache() == 60 * 2**20
    monkeypatch.setattr(h200.version, "hip", "6.4")
    amd = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", L2_cache_size=4 * 2**20)
    monkeypatch.setattr(h200.cuda, "get_device_properties", lambda device: amd)
    assert gpu.Gpu().target() == "gfx942"
    assert gpu.Gpu().cache() == 256 * 2**20  # the Infinity Cache
    monkeypatch.setattr(h200.version, "hip", None)
    monkeypatch.setattr(h200.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert gpu.Gpu().cache() == 64 * 2**20


@pytest.mark.parametrize(
    ("files", "version"),
    [
        (
            {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Module  570.86.15 T"},
            "570.86.15",
        ),
        ({"/proc/driver/nvidia/version": "NVRM"}, "unknown"),
        ({"/sys/module/amdgpu/version": "6.12.12\n"}, "6.12.12"),
        ({}, "unknown"),
    ],
)
def test_driver(files, version, monkeypatch):
    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert gpu._driver() == version


def test_real_graph_and_event_are_called_as_torch_has_them():
    """The fakes take the arguments that torch's functions take."""
    import inspect

    inspect.signature(torch.cuda.graph).bind("graph")
    inspect.signature(torch.cuda.stream).bind("stream")
    inspect.signature(torch.cuda.Event.__new__).bind(torch.cuda.Event, enable_timing=True)
    for name in ("get_device_name", "get_device_capability", "clock_rate", "synchronize"):
        inspect.signature(getattr(torch.cuda, name)).bind()
    inspect.signature(torch.cuda.get_device_properties).bind(0)
    assert callable(torch.cuda.CUDAGraph.replay)
    assert callable(torch.cuda.Event.elapsed_time)
