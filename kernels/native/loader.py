"""Load the compiled extension, choose its kernels for this CPU, or say why it cannot serve.

The extension is built ahead, by the wheel's maker or by ``pip install`` of a source tree. It holds
the kernels once per instruction set. torch tells the instructions that this CPU has.
"""

from __future__ import annotations

import functools
import importlib
import platform
import sys
import sysconfig
from types import ModuleType

import torch

from clr_optim.kernels.native.openmp import share_openmp

__all__ = ["NoKernelsError", "describe", "load"]

_NAME = "clr_optim.kernels.native.module"

#: torch's name for the instructions of an x86-64 CPU, and the set of kernels that needs them
_SETS = {"AVX2": "x86_64_v3", "AVX512": "x86_64_v4"}


class NoKernelsError(RuntimeError):
    """The compiled kernels cannot serve; the message says why, and what would help."""


def load() -> ModuleType:
    """Return the extension with the kernels for this CPU; load it once per process.

    Raises:
        NoKernelsError: if the extension cannot serve. Later calls raise the same error at once.
    """
    found = _load()
    if isinstance(found, NoKernelsError):
        raise NoKernelsError(*found.args)
    return found


def describe() -> dict[str, str]:
    """Return which kernels serve, and why.

    Returns:
        ``kernels`` (the set of kernels and its reason, or why there are none), ``extension`` (its
        file, or empty) and ``openmp`` (the file of the threads' runtime, or empty).
    """
    try:
        module = load()
    except NoKernelsError as error:
        return {"kernels": f"none: {error}", "extension": "", "openmp": ""}
    return {
        "kernels": f"{module.kernel_set()}, since {_reason()}",
        "extension": str(module.__file__),
        "openmp": share_openmp(),
    }


@functools.cache
def _load() -> ModuleType | NoKernelsError:
    try:
        _check_python()
        name = _kernel_set()
        module = _import()
        module.use(name or module.kernel_sets()[0])
        _check_exchange_api(module)
    except NoKernelsError as error:
        return error
    return module


def _check_python() -> None:
    """Refuse Windows, and a Python without the GIL, under which the extension reads tensors."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NoKernelsError(
            "this Python is free-threaded, and the extension for it comes later; use a Python "
            "with the GIL"
        )
    if sys.platform == "win32":
        raise NoKernelsError("the compiled kernels are for Linux and macOS")


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _kernel_set() -> str | None:
    """Return the name of the set for this CPU; None if the platform has one set for every CPU."""
    if not _is_x86():
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _SETS:
        raise NoKernelsError(
            f"the kernels need a CPU with AVX2, and torch finds {capability} (the environment "
            "variable ATEN_CPU_CAPABILITY can hide instructions from torch)"
        )
    return _SETS[capability]


def _reason() -> str:
    """Return why the set serves, in a few words."""
    if not _is_x86():
        return f"one set serves every CPU of {platform.machine()}"
    return f"torch finds {torch.backends.cpu.get_cpu_capability()}"


def _import() -> ModuleType:
    """Import the extension, with its OpenMP symbols bound to torch's runtime."""
    try:
        share_openmp()
    except OSError as error:
        raise NoKernelsError(
            f"{error}; install one (Debian, Ubuntu: apt-get install libgomp1)"
        ) from None
    try:
        return importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        raise NoKernelsError(
            "the extension is not installed, since clr_optim was built without a working C++ "
            "compiler; install g++ (Debian, Ubuntu: apt-get install g++; Fedora: dnf install "
            "gcc-c++; macOS: xcode-select --install), then install clr_optim again with "
            "pip install --no-cache-dir --force-reinstall --no-deps"
        ) from None
    except ImportError as error:
        raise NoKernelsError(
            f"the extension does not load: {error}; install clr_optim again, built by g++ if "
            "from source (CXX=g++)"
        ) from error


def _check_exchange_api(module: ModuleType) -> None:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not module.can_read(capsule):
        raise NoKernelsError(
            f"torch {torch.__version__} does not offer DLPack's C exchange API in version 1; "
            "install torch 2.11 or newer"
        )
