"""GPU tests are collected everywhere and skipped, with a reason, where there is no GPU."""

import signal
import sys

import hypothesis
import pytest
import torch
from distributed_helpers import Ranks

# The tests' tensors are tiny. More threads would only cost time.
torch.set_num_threads(1)

# A busy machine takes its time for an example, and no test judges how long.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


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
    """Start processes for tests of several ranks: ``ranks.run(world, function, *args)``."""
    processes = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


@pytest.fixture
def ctrl_c():
    """Handle Ctrl-C as a terminal does.

    A shell's background processes ignore the signal otherwise.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_environment(monkeypatch):
    """Have "auto" mean the backend that the library itself chooses."""
    monkeypatch.delenv("CLR_OPTIM_BACKEND", raising=False)


@pytest.fixture(params=["torch", "native"])
def each_backend(request, monkeypatch):
    """Have "auto" mean one backend after the other."""
    monkeypatch.setenv("CLR_OPTIM_BACKEND", request.param)


@pytest.fixture
def native_kernels(monkeypatch):
    """Have "auto" mean the native backend, whose kernels must load."""
    from clr_optim.kernels.native import load

    load()
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")
