"""The Triton backend: kernels for tensors on a GPU."""

from clr_optim.backends.device import is_capturing
from clr_optim.backends.native import NoKernelsError
from clr_optim.backends.triton.backend import TritonBackend
from clr_optim.backends.triton.here import (
    DEVICES,
    is_interpreted,
    try_out,
    why_no_triton,
    why_not_unasked,
)

__all__ = [
    "DEVICES", "NoKernelsError", "TritonBackend", "is_capturing", "is_interpreted", "try_out",
    "why_no_triton", "why_not_unasked",
]  # fmt: skip
