"""The current device, its stream and its captures."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["guard", "is_capturing", "no_inference_mode", "warp"]

# Without CUDA or ROCm the function that would be asked is not there.
_HAS_GRAPHS = bool(torch.version.cuda or torch.version.hip)


def is_capturing() -> bool:
    """Whether what is launched now goes into a graph and is not run."""
    # Where no GPU has been used nothing is captured, and there may not even be a driver to ask.
    if not _HAS_GRAPHS or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


def no_inference_mode() -> AbstractContextManager[Any]:
    """What is made in it may be written to by later steps, as that of inference mode may not."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def warp(device: torch.device) -> int:
    """Threads of a warp: 64 on most of AMD's GPUs."""
    if device.type == "cuda" and torch.version.hip:
        return int(torch.cuda.get_device_properties(device).warp_size)
    return 32


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one, which it mostly is already."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)
