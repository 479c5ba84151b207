"""GPU tests are collected everywhere and skipped, with a reason, where there is no GPU."""

import pytest
import torch

# The tests' tensors are tiny: more threads only cost time, and the more so beside other work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
