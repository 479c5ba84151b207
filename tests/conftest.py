"""GPU tests are collected everywhere and skipped, with a reason, where there is no GPU."""

import signal
import sys

import pytest
import torch
from distributed_helpers import Ranks

# The tests' tensors are tiny: more threads only cost time, and the more so beside other work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    if "triton_memory" in sys.modules:
        sys.modules["triton_memory"].freeze()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Processes for what runs on several: ``ranks.run(world, function, *args)``."""
    processes = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


@pytest.fixture
def ctrl_c():
    """As in a terminal: what a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def native_kernels(monkeypatch):
    """Have "auto" mean the native backend, whose kernels must compile."""
    from clr_optim.kernels.native import build

    build.load()
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")
