"""Tests that the fake device cannot run, with the reason for each."""

from __future__ import annotations

__all__ = ["CANNOT"]

#: part of a test's name -> why the fake device cannot run the test
CANNOT: dict[str, str] = {
    "test_gpu.py::test_bit_identical_to_plain_torch_fed_our_rates[sparse-adam]": (
        "sparse tensors, whose operations are kernels of torch"
    ),
    "test_triton_graphs.py::test_beside_other_users_of_graphs": (
        "torch.compile, whose kernels are torch's"
    ),
}
