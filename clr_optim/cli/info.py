"""The command ``info``: versions, devices, backends, and the compiled kernels."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from clr_optim import backends
from clr_optim._version import __version__
from clr_optim.cli.outcome import Outcome
from clr_optim.kernels.native import NoKernelsError, describe, load
from clr_optim.options import add_json
from clr_optim.rules import STATE_SLOTS

__all__ = ["add_info"]


def add_info(commands: Any) -> None:
    """Add the command ``info``."""
    parser = commands.add_parser(
        "info",
        help="print versions, devices, and each optimizer's backend",
        description="Prints versions, devices, and each optimizer's backend with the reason.",
    )
    add_json(parser)
    parser.set_defaults(run=_info)


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
        **{name: _line(text) or "none" for name, text in describe().items()},
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


def _served(optimizer: Optimizer) -> str:
    """Return the backend of an optimizer's first step, and the reason."""
    try:
        backend, reason = backends.resolve("auto", optimizer)
        if backends.is_fused(backend):
            load()
    except ValueError as error:  # CLR_OPTIM_BACKEND may name a backend that cannot serve
        return f"none: {_line(error)}"
    except NoKernelsError:
        return "torch: the kernels cannot serve, see above"
    return f"{backend}: {reason}"


def _line(error: object) -> str:
    return " ".join(str(error).split())
