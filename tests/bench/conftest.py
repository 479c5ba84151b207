"""Fixtures of the benchmarks' tests: a slice of CIFAR-10 on disk, tiny workloads, a fake H200."""

import pytest
from bench_helpers import play_h200, shrink
from paper_helpers import SMALL_BATCH, write_slice

from clr_optim.bench.paper import data as images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar10") / "bin"
    write_slice(path)
    return path


@pytest.fixture
def small(monkeypatch):
    """Make batches small: a tenth of the time."""
    monkeypatch.setattr(images, "BATCH_SIZE", SMALL_BATCH)


@pytest.fixture
def data(folder, small):
    return images.read(folder)


@pytest.fixture
def tiny(monkeypatch):
    """Shrink the workloads of the benchmarks."""
    shrink(monkeypatch)


@pytest.fixture
def h200(monkeypatch):
    """Play an H200 on a machine without a GPU."""
    return play_h200(monkeypatch)
