"""The global interpreter lock (GIL): the compiled kernels serve only where Python holds it."""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from typing import Any, cast

__all__ = ["checked", "why_no_kernels"]


def _is_free_threaded() -> bool:
    """Return whether this build of Python can run without the GIL."""
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def why_no_kernels() -> str | None:
    """Return why this Python may not call the compiled functions, or None.

    They scan tensors and groups while the GIL keeps other threads away. A free-threaded Python
    runs without the GIL unless PYTHON_GIL=1 or the import of an older extension enables it.
    """
    is_enabled = getattr(sys, "_is_gil_enabled", None)
    if not _is_free_threaded() or (is_enabled is not None and is_enabled()):
        return None
    return (
        "this free-threaded Python runs without the GIL, and the compiled kernels read tensors "
        "under the GIL; start Python with PYTHON_GIL=1 to run them"
    )


def checked(lib: ctypes.PyDLL) -> ctypes.PyDLL:
    """Return compiled functions that refuse to run while the GIL is off.

    An import enables the GIL for its own length, so an optimizer made meanwhile finds it enabled.
    Only a free-threaded build can lose the GIL: others call ``lib`` itself, at no cost.
    """
    return cast("ctypes.PyDLL", _Checked(lib)) if _is_free_threaded() else lib


class _Checked:
    """Asks for the GIL each time that a function of the library is looked up for a call."""

    def __init__(self, lib: ctypes.PyDLL) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        reason = why_no_kernels()
        if reason is not None:
            raise RuntimeError(
                f"step() cannot run the compiled kernels: {reason}, or construct "
                "CyclicalOptimizer with backend='torch'"
            )
        return getattr(self._lib, name)
