"""Share torch's OpenMP runtime with the extension, which is linked without any.

A second runtime would bring a second pool of threads. So at import the extension's symbols bind to
the runtime that torch has loaded, whatever the name of that file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

import torch

__all__ = ["share_openmp"]


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def share_openmp() -> str:
    """Open torch's OpenMP runtime to the libraries loaded from now on; return its path.

    The loader knows the file, whatever its name: libgomp.so.1, torch.libs/libgomp-a34b3233.so.1 or
    Intel's. If torch uses no OpenMP, the system's runtime is loaded.

    Raises:
        OSError: if no runtime loads.
    """
    names = [_runtime_of(ctypes.CDLL(torch._C.__file__))]
    if names[0] is None:
        names = ["libomp.dylib"] if sys.platform == "darwin" else ["libgomp.so.1", "libomp.so.5"]
    for name in names:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)  # the same file again: not a second copy
            return _runtime_of(ctypes.CDLL(None)) or str(name)
    raise OSError(f"no OpenMP runtime loads: tried {', '.join(map(str, names))}")


def _runtime_of(library: ctypes.CDLL) -> str | None:
    """Return the file of the OpenMP runtime that `library` uses, or None."""
    info = _SymbolInfo()
    try:
        address = ctypes.cast(library.omp_get_max_threads, ctypes.c_void_p)
    except AttributeError:
        return None
    found = ctypes.CDLL(None).dladdr(address, ctypes.byref(info))
    return os.fsdecode(info.file) if found and info.file else None
