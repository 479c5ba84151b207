"""Make torch and Triton use the fake device; import before the first use of the device."""

from __future__ import annotations

import atexit
import ctypes

from fake_gpu import device, kernels, operations

_run_kernel = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint64
)(kernels.install())
_run_operation = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(operations.install())
device.library.fake_set_runners(_run_kernel, _run_operation)
# torch frees memory while the process ends, after Python.
atexit.register(device.library.fake_set_runners, None, None)
