"""The commands ``info`` and ``build``: versions, devices, backends, and the compiled kernels."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from clr_optim import backends
from clr_optim._version import __version__
from clr_optim.backends.native import BuildError, library
from clr_optim.cli.outcome import Outcome
from clr_optim.kernels.native import build as native_build
from clr_optim.options import add_json
from clr_optim.rules import STATE_SLOTS

__all__ = ["add_build", "add_info"]


def add_info(commands: Any) -> None:
    """Add the command ``info``."""
    parser = commands.add_parser(
        "info",
        help="print versions, devices, and each optimizer's backend",
        description="Prints versions, devices, and each optimizer's backend with the reason.",
    )
    add_json(parser)
    parser.set_defaults(run=_info)


def add_build(commands: Any) -> None:
    """Add the command ``build``."""
    parser = commands.add_parser(
        "build",
        help="compile the kernels ahead of the first step",
        description="Compiles the C++ kernels for this CPU into the cache, for the first step of "
        "later processes. Prints the file and the compiler.",
    )
    add_json(parser)
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> Outcome:
    try:
        entry = native_build.compile_ahead()
    except BuildError as error:
        print(f"clr-optim: error: {error}", file=sys.stderr)
        return Outcome({"error": str(error)}, 1)
    described = native_build.describe()
    print(entry)
    print(f"{described['compiler']}: {described['version']}")
    return Outcome({"file": str(entry), **described})


def _info(args: argparse.Namespace) -> Outcome:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {
        "clr_optim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "numpy": np.__version__,
        "CPU threads": str(torch.get_num_threads()),
        "GPU": ", ".join(gpus) or "none",
        **dict(_kernels()),
    }
    served = {}
    for cls in STATE_SLOTS:
        make: Callable[..., torch.optim.Optimizer] = cls
        served[cls.__name__] = _served(make([torch.zeros(2, 2, requires_grad=True)]))
    rows = {**versions, **served}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return Outcome({**versions, "optimizers": served})


def _kernels() -> list[tuple[str, str]]:
    """Return how the C++ kernels are compiled here, or why they cannot be."""
    described = native_build.describe()
    try:
        library()
        state = f"ready, {described['openmp']} for threads"
    except BuildError as error:
        state = f"none: {_line(error)}"
    bits = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability(), 128)
    if bits == 512 and "512" not in described["flags"]:
        bits = 256  # compilers prefer 256 bits by default
    return [
        ("kernels", state),
        ("compiler", " ".join(filter(None, (described["compiler"], described["version"])))),
        ("flags", described["flags"]),
        ("vectors", f"{bits} bits, {described['target'] or 'native'}"),
        ("cache", " ".join(filter(None, (described["cache"], described["problem"])))),
    ]


def _served(optimizer: Optimizer) -> str:
    """Return the backend of an optimizer's first step, and the reason."""
    try:
        backend, reason = backends.resolve("auto", optimizer)
        if backends.is_fused(backend):
            library()
    except ValueError as error:  # CLR_OPTIM_BACKEND may name a backend that cannot serve
        return f"none: {_line(error)}"
    except BuildError:
        return "torch: the kernels cannot be compiled, see above"
    return f"{backend}: {reason}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
