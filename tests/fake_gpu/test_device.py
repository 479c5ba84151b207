"""The fake device itself: queues, captures, violations, the functions of the driver."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    "FAKE_ORDER" not in os.environ, reason="runs on the fake device: make fake-gpu"
)


@pytest.fixture(autouse=True)
def fake() -> Any:
    """Return the module of the device, whose operations wait until the host waits."""
    from fake_gpu import device

    device.set_order(device.Order.LATE)
    return device


def test_the_device_reads_pinned_memory_when_the_stream_reaches_the_copy():
    pinned, pageable = torch.ones(3).pin_memory(), torch.ones(3)
    late, early = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    late.copy_(pinned, non_blocking=True)
    early.copy_(pageable, non_blocking=True)
    pinned.fill_(5)
    pageable.fill_(5)
    assert late.tolist() == [5, 5, 5]
    assert early.tolist() == [1, 1, 1]


def test_only_events_order_streams():
    x = torch.zeros(3, device="cuda")
    y = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    x.add_(1)
    with torch.cuda.stream(side):
        assert (x * 2).tolist() == [0, 0, 0]  # overtakes the addition
        side.wait_stream(main)
        assert (x * 2).tolist() == [2, 2, 2]
        y.add_(1)
    assert not side.query()
    main.wait_stream(side)
    assert y.tolist() == [1, 1, 1]
    assert side.query()


def test_a_graph_replays_operations_on_new_values():
    x, y = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.fill_(1)
        y.add_(x * 2)
    assert y.tolist() == [0, 0, 0]
    for value in (3, 4):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [1 + 2 * value] * 3


def test_random_numbers_follow_from_the_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append((torch.randn(4, device="cuda").tolist(), torch.rand(2).tolist()))
        drawn[-1] += (torch.randn(4, device="cuda").tolist(),)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][2]


def test_a_capture_forbids_to_wait(fake):
    x = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()

    def wait_in_a_capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
            torch.cuda.synchronize()

    with pytest.raises(RuntimeError):
        wait_in_a_capture()
    assert fake.take_violations() == ["cudaDeviceSynchronize during a capture (1 times)"]


def test_a_kernel_finds_no_memory_of_another_device(fake):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs FAKE_DEVICES=2")
    from clr_optim.kernels.triton.gate import open_gate

    one, gate = (
        torch.ones((), device="cuda:0"),
        torch.empty(2, dtype=torch.float64, device="cuda:1"),
    )
    open_gate[(1,)](one, 0, one, one, one, one, gate, CLIPS=False, SKIPS=False, BLOCK=1024)
    assert fake.take_violations() == ["open_gate: receives memory of another device (1 times)"]


def test_threads_do_not_wait_for_one_another():
    from clr_optim.kernels.triton.gate import open_gate

    gates = torch.zeros(4, 2, dtype=torch.float64, device="cuda")
    one = torch.ones((), device="cuda")
    torch.cuda.synchronize()

    def launch(gate: torch.Tensor) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                open_gate[(1,)](
                    one, 0, one, one, one, one, gate, CLIPS=False, SKIPS=False, BLOCK=1024
                )
                gate.mul_(3)
                torch.cuda.synchronize()

    threads = [threading.Thread(target=launch, args=(gate,), daemon=True) for gate in gates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert gates.tolist() == [[3, 3]] * 4


def test_the_driver_copies_and_records_events(fake):
    """A launcher outside of torch and Triton finds these functions by their names."""
    driver = fake.library
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    context, event, pinned = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    status, text = ctypes.c_int(7), ctypes.c_char_p()
    assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
    assert context.value
    assert driver.cuStreamIsCapturing(stream, ctypes.byref(status)) == 0
    assert status.value == 0
    assert driver.cuMemHostAlloc(ctypes.byref(pinned), ctypes.c_size_t(8), 0) == 0
    assert driver.cuEventCreate(ctypes.byref(event), 0) == 0
    number = ctypes.c_int64.from_address(pinned.value or 0)
    there = torch.zeros((), dtype=torch.int64, device="cuda")
    to = ctypes.c_uint64(there.data_ptr())
    assert driver.cuMemcpyHtoDAsync_v2(to, pinned, ctypes.c_size_t(8), stream) == 0
    assert driver.cuEventRecord(event, stream) == 0
    number.value = 42
    not_ready = driver.cuEventQuery(event)
    assert driver.cuGetErrorString(not_ready, ctypes.byref(text)) == 0
    assert not_ready == 600
    assert driver.cuGetErrorName(not_ready, ctypes.byref(text)) == 0
    assert driver.cuEventSynchronize(event) == 0
    assert driver.cuEventQuery(event) == 0
    assert there.item() == 42
    assert driver.cuEventDestroy_v2(event) == 0
    assert driver.cuMemFreeHost(pinned) == 0
