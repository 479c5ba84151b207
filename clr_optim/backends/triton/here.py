"""Whether Triton can run here, and whether ``backend="auto"`` picks it."""

from __future__ import annotations

import importlib.util
import os

import torch

from clr_optim.backends import device as current
from clr_optim.backends.native import NoKernelsError
from clr_optim.backends.triton.clock import fill_open_gate

__all__ = ["DEVICES", "is_interpreted", "try_out", "why_no_triton", "why_not_unasked"]

#: Device types that Triton compiles for. ROCm's devices are called "cuda" too.
DEVICES = ("cuda", "xpu")

#: The least compute capability that Triton compiles for, from its documentation.
_LEAST_CAPABILITY = (8, 0)


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs kernels on CPU tensors: for tests only."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_no_triton() -> str | None:
    """Return why this Python has no Triton kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def why_not_unasked(device: torch.device) -> str | None:
    """Return why ``backend="auto"`` leaves tensors on this GPU to torch, or None."""
    if is_interpreted():
        return "TRITON_INTERPRET is set, and Triton's interpreter takes CPU tensors only"
    if device.type != "cuda" or torch.version.hip:
        name = "ROCm" if torch.version.hip else device.type.upper()
        return f"no GPU of {name} has run the kernels yet; backend='triton' asks for them"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least, has = (".".join(map(str, each)) for each in (_LEAST_CAPABILITY, capability))
        return f"Triton compiles for GPUs of compute capability {least} and above, this has {has}"
    return None


def try_out(device: torch.device) -> None:
    """Compile and launch one small kernel.

    Raises:
        NoKernelsError: if Triton cannot compile here, for lack of a compiler or Python's headers.
    """
    try:
        with current.guard(device):
            one = torch.ones((), dtype=torch.float32, device=device)
            fill_open_gate(torch.empty(2, dtype=torch.float64, device=device), one, one - one)
    except Exception as error:  # compilers, drivers and Triton raise errors of many classes
        lines = str(error).strip().splitlines() or [""]
        raise NoKernelsError(f"Triton on {device}: {type(error).__name__}: {lines[0]}") from error
