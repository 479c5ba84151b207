"""The stub driver in a process: built from ``stub_driver.cpp``, loaded before Triton, read back."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("stub_driver.cpp")

#: The variable of the environment that names the folder of the stub driver.
FOLDER = "CLR_STUB_DRIVER"

#: The stream that torch would name.
STREAM = 0x5000


def headers() -> Path:
    """Return the folder of the ``cuda.h`` that Triton brings."""
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends/nvidia/include"


def why_not_built() -> str | None:
    """Return why the stub driver cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "the stub driver reads and is an ELF file"
    if shutil.which("c++") is None:
        return "needs a C++ compiler"
    if find_spec("triton") is None:
        return "needs Triton, which brings cuda.h"
    return None


def build(folder: Path) -> None:
    """Build the stub driver into a folder."""
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wl,-soname,libcuda.so.1", "-I", str(headers()), str(SOURCE)]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True)


class _Record(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 40),
        ("object", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("holds_gil", ctypes.c_int32),
        ("size", ctypes.c_uint32),
        ("bytes", ctypes.c_ubyte * 1024),
    )


class State(ctypes.Structure):
    """What the driver pretends, see ``stub_driver.cpp``."""

    _fields_ = (
        ("context", ctypes.c_uint64),
        ("capture", ctypes.c_int32),
        ("lags", ctypes.c_int32),
        ("overwritten", ctypes.c_int32),
        ("is_old", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("unrelaxed", ctypes.c_int32),
        ("is_silent", ctypes.c_int32),
    )


class Record(NamedTuple):
    """A call of the driver."""

    name: str
    object: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    holds_gil: bool
    bytes: bytes


class Stub:
    """The stub driver of this process."""

    def __init__(self) -> None:
        # Its name in the process is that of NVIDIA's driver, so Triton and native code find it.
        folder = os.environ.get(FOLDER)
        if folder is None:
            raise RuntimeError(f"{FOLDER} names no stub driver: run test_prebound.py instead")
        path = Path(folder) / "libcuda.so.1"
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_state.restype = ctypes.POINTER(State)
        self._library.stub_count.restype = ctypes.c_size_t
        self._library.stub_record.restype = ctypes.POINTER(_Record)
        self._library.stub_record.argtypes = [ctypes.c_size_t]
        self._library.stub_function.restype = ctypes.c_void_p
        #: what the driver pretends
        self.state: Any = self._library.stub_state().contents

    def reset(self) -> None:
        """Forget all records, let all copies end, and pretend nothing."""
        self.catch_up()
        for name, _ in State._fields_:
            setattr(self.state, name, 0)
        self.state.context = 0xC0
        self.fail("", 0)
        self._library.stub_clear()

    def catch_up(self) -> None:
        """End all copies and events."""
        self._library.stub_catch_up()

    def fail(self, name: str, error: int, after: int = 0) -> None:
        """Have a call of a function fail that follows ``after`` more of its calls."""
        self._library.stub_fail(name.encode(), error, after)

    def function(self, sizes: Sequence[int]) -> int:
        """Return a new kernel that takes parameters of these sizes."""
        array = (ctypes.c_size_t * len(sizes))(*sizes)
        return int(self._library.stub_function(array, len(sizes)))

    def take(self, name: str = "") -> list[Record]:
        """Return the calls since the last time, of functions whose name begins so."""
        found = []
        for i in range(self._library.stub_count()):
            r = self._library.stub_record(i).contents
            record = Record(
                r.name.decode(), r.object, r.stream, tuple(r.grid), tuple(r.block), r.shared,
                r.attributes, bool(r.holds_gil), bytes(r.bytes[: r.size]),
            )  # fmt: skip
            if record.name.startswith(name):
                found.append(record)
        self._library.stub_clear()
        return found


def set_stream(number: int = STREAM) -> None:
    """Have torch name this stream as the current one. Call before the extension is connected."""
    import torch

    torch._C._cuda_getCurrentRawStream = lambda device: number  # type: ignore[attr-defined]


def make_triton_use_the_stub() -> None:
    """Have Triton compile for an H100 whose driver is the stub, and launch on the stream."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    # Its __init__ asks torch for a GPU.
    made: Any = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
    made.utils = nvidia.CudaUtils()
    made.launcher_cls = nvidia.CudaLauncher
    made.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    made.get_current_device = lambda: 0
    made.set_current_device = lambda device: None
    made.get_device_capability = lambda device=0: (9, 0)
    made.get_current_stream = lambda device: STREAM
    driver.set_active(made)
