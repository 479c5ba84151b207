"""Make torch and Triton use the fake device; import before the first use of the device."""

from __future__ import annotations

import atexit
import ctypes
import gc
from collections.abc import Callable

from fake_gpu import device, kernels, operations


def undisturbed(run: Callable[..., None]) -> Callable[..., None]:
    """Keep the garbage collector away from a run: it frees tensors, and so calls the device."""

    def quiet(*args: int) -> None:
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            run(*args)
        finally:
            if was_collecting:
                gc.enable()

    return quiet


_run_kernel = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint64
)(undisturbed(kernels.install()))
_run_operation = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(undisturbed(operations.install()))
device.library.fake_set_runners(_run_kernel, _run_operation)
# torch frees memory while the process ends, after Python.
atexit.register(device.library.fake_set_runners, None, None)
