"""The current device, stream and capture, as torch knows them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = [
    "guard", "has_fast_float64", "is_capturing", "no_inference_mode", "processors", "stream",
    "wait_for", "warp",
]  # fmt: skip

# A torch without CUDA and ROCm cannot be asked for captures.
_HAS_GRAPHS = bool(torch.version.cuda or torch.version.hip)


def is_capturing() -> bool:
    """Return whether launches now go into a graph instead of running."""
    # A process that has used no GPU captures nothing, and may have no driver to ask.
    if not _HAS_GRAPHS or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


def no_inference_mode() -> AbstractContextManager[Any]:
    """Return a context that leaves inference mode: later steps write to the tensors made in it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def warp(device: torch.device) -> int:
    """Return the threads of a warp: 64 on most of AMD's GPUs, else 32."""
    if device.type == "cuda" and torch.version.hip:
        return int(torch.cuda.get_device_properties(device).warp_size)
    return 32


def processors(device: torch.device) -> int:
    """Return how many processors run programs at the same time; 1 on the CPU."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    names = ("multi_processor_count", "gpu_subslice_count")  # of CUDA and ROCm, of XPU
    return max(int(getattr(properties, name, 1)) for name in names)


def has_fast_float64(device: torch.device) -> bool:
    """Return whether float64 arithmetic takes about twice the time of float32, and no more."""
    if device.type != "cuda":
        return device.type == "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).startswith("gfx9")
    return (properties.major, properties.minor) in {(8, 0), (9, 0), (10, 0)}


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that makes the device the current one, if it is another."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


def stream(device: torch.device) -> Any:
    """Return the device's current stream; None on the CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all work of all its streams."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
