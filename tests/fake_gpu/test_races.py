"""Faults that appear with several streams, or after many captures.

A program that orders its streams must find the same numbers in every order of the streams. On the
fake device (`make fake-gpu`) the order is random. On a GPU (`make gpu-check`) one stream is late.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clr_optim import CyclicalOptimizer

IS_FAKE = "FAKE_ORDER" in os.environ
pytestmark = pytest.mark.skipif(
    not IS_FAKE and not torch.cuda.is_available(),
    reason="needs a GPU, or the fake device: make fake-gpu",
)

Begin = Callable[[torch.cuda.Stream], None]


@pytest.fixture(autouse=True)
def operations_at_once() -> None:
    """Let each test choose when the random order begins."""
    if IS_FAKE:
        operations_at_once_again()


class Training:
    """Parameters with equal numbers in every run, and their wrapped optimizer."""

    def __init__(self, sizes: list[int], make: Callable[..., Any], **wrap: Any) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.params = [self.new(size) for size in sizes]
        self.opt = CyclicalOptimizer(make(self.params, lr=0.1), step_size_up=3, **wrap)

    def draw(self, size: int) -> Tensor:
        """Return random numbers on the device, without a wait for the device."""
        values = torch.randn(size, generator=self.generator).pin_memory()
        return values.to("cuda", non_blocking=True)

    def new(self, size: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.draw(size))

    def set_gradients(self) -> list[Tensor]:
        for param in self.params:
            param.grad = self.draw(param.numel())
        return [param.grad for param in self.params]

    def capture(self, stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
        """Return a graph of a step, whose gradients lie in memory that stays."""
        self.set_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.opt.step()
        return graph

    def values(self) -> list[list[float]]:
        torch.cuda.synchronize()
        return [param.tolist() for param in self.params]


def assert_no_order_matters(run: Callable[[Begin], Any]) -> Any:
    """Compare an orderly run with runs whose streams come in another order.

    The run calls its argument where the disorder begins, with the stream that should be late.
    Return the result of the orderly run.
    """
    expected = run(lambda late: None)
    different = {}
    for seed in range(8 if IS_FAKE else 2):
        found = run(disorder(seed))
        if IS_FAKE:
            operations_at_once_again()
        if found != expected:
            different[seed] = found
    assert not different, f"seeds {[*different]} differ; in order: {expected}"
    return expected


def disorder(seed: int) -> Begin:
    """Return a function that has a stream come late, or all streams come in a random order."""

    def begin(late: torch.cuda.Stream) -> None:
        if IS_FAKE:
            from fake_gpu import device

            device.set_order(device.Order.RANDOM, seed)
        else:
            with torch.cuda.stream(late):
                torch.cuda._sleep(200_000_000)  # about a tenth of a second

    return begin


def operations_at_once_again() -> None:
    from fake_gpu import device

    device.set_order(device.Order.AT_ONCE)


def test_a_replaced_table_waits_for_the_streams_that_read_it():
    def run(begin: Begin) -> list[list[float]]:
        training = Training([40] * 12, torch.optim.SGD)
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):  # warm up on a side stream, as torch's manual does
            warm = training.set_gradients()
            training.opt.step()
        main.wait_stream(side)
        torch.cuda.synchronize()
        del warm
        begin(main)
        training.set_gradients()
        training.opt.step()
        training.params.append(training.new(40))
        training.opt.add_param_group({"params": training.params[-1:]})
        training.set_gradients()
        training.opt.step()
        with torch.cuda.stream(side):  # other code takes memory there
            other = [torch.full((64,), 7, device="cuda") for _ in range(40)]
        values = training.values()
        del other
        return values

    assert_no_order_matters(run)


@pytest.mark.parametrize("call", ["set_bounds", "set_iteration", "iteration", "state_dict"])
def test_every_stream_finds_the_position_of_replays(call):
    def run(begin: Begin) -> tuple[Any, int, list[list[float]]]:
        training = Training([40], torch.optim.SGD)
        training.set_gradients()
        training.opt.step()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = training.capture(side)
        torch.cuda.synchronize()
        begin(side)
        with torch.cuda.stream(side):
            for _ in range(6):
                graph.replay()
        answer = None
        if call == "set_bounds":
            training.opt.set_bounds(base_lr=1.0, max_lr=2.0)
        elif call == "set_iteration":
            training.opt.set_iteration(2)
        elif call == "iteration":
            answer = training.opt.iteration
        else:
            answer = training.opt.state_dict()["param_groups"][0]["clr_step"]
        with torch.cuda.stream(side):
            for _ in range(3):
                graph.replay()
        values = training.values()
        return answer, training.opt.iteration, values

    _, position, _ = assert_no_order_matters(run)
    assert position == (5 if call == "set_iteration" else 10)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_captures_that_are_gone_keep_no_memory(max_grad_norm):
    gc.collect()
    torch.cuda.empty_cache()
    training = Training([40] * 6, torch.optim.AdamW, max_grad_norm=max_grad_norm)
    reserved = []
    for _ in range(3):
        for _ in range(3):
            training.set_gradients()
            training.opt.step()
            training.capture().replay()
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] == reserved[0]


@pytest.mark.skipif(not IS_FAKE, reason="asks the fake device for the launches of a graph")
def test_gradients_in_one_buffer_leave_no_trace():
    """Under DDP with ``gradient_as_bucket_view`` the first gradients are views of one buffer."""
    from fake_gpu import device

    launches = []
    for in_one_buffer in (False, True):
        training = Training([256, 33, 1024, 4096], torch.optim.SGD)
        if in_one_buffer:
            sizes = [param.numel() for param in training.params]
            parts = torch.zeros(sum(sizes), device="cuda").split(sizes)
            for param, part in zip(training.params, parts, strict=True):
                param.grad = part
            training.opt.step()
        for _ in range(3):
            training.set_gradients()
            training.opt.step()
        training.capture()
        launches.append([name for name in device.last_graph() if "copy" not in name])
    assert launches[1] == launches[0]
