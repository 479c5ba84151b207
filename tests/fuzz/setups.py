"""The values of which setups are drawn, and the preparation of a process for a backend."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import OTHER_IMPLEMENTATIONS, WITHOUT_KERNEL
from list_config import ListConfig
from native_helpers import ADAGRAD_LACKS_STATE, BY_NAME

from fuzz.expected import POLICIES

BACKENDS = ("native", "torch", "triton")

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 2, 2), (1, 3), (70,)]
DTYPES = {
    "float64": (torch.float64,),
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "masters": (torch.bfloat16,),
    "mixed": (torch.float64, torch.float32),
}
#: Relative to a tensor's largest value; float64 over all steps, the others over one step.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-7 * 1.01,
    torch.float16: 2.0**-10 * 1.01,
}
#: Of the gradient with its weight decay, which kernels sum in float32.
ROUNDING = 2.0**-23
KEYS: dict[str, list[Any]] = {
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
    "momentum": [0.0, 0.5, 0.9],
    "dampening": [0.0, 0.3],
    "nesterov": [False, True],
    "amsgrad": [False, True],
    "betas": [(0.9, 0.999), (0.5, 0.7)],
    "eps": [1e-8, 1e-2],
    "lr_decay": [0.0, 0.1],
    "rho": [0.9, 0.4],
    "alpha": [0.99, 0.5],
    "centered": [False, True],
    "differentiable": [False, True],
    "decoupled_weight_decay": [False, True],
}


#: Kinds of settings: the type that is replaced, and the function that replaces the value.
ODD: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "list": (tuple, list),
    "sequence": (tuple, ListConfig),
    "number": (float, np.float64),
    "flag": (bool, np.bool_),
}
#: Rows that use another implementation than torch's for-loop, or that no kernel serves. For the
#: torch backend.
OTHERS = {
    case.name: case
    for case in [*OTHER_IMPLEMENTATIONS, *WITHOUT_KERNEL]
    if not (case.sparse or case.closure or case.only_2d)
}
FLAGS = ("fused", "capturable", "foreach")
HAVE_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
HAVE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad)
HAVE_CAPTURABLE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adadelta
)  # fmt: skip


def setups(backend: str) -> dict[str, Sequence[Any]]:
    """Return the values that each argument of a machine may take."""
    names = [
        name for name, case in BY_NAME.items()
        if not (case.cls is torch.optim.Adagrad and ADAGRAD_LACKS_STATE)
    ]  # fmt: skip
    flags = {
        "native": (None,) * 6 + ("fused",),
        "triton": (None,) * 4 + ("fused", "capturable"),
        "torch": (None, None, "foreach", "fused"),
    }[backend]
    return {
        "backend": (backend,),
        "case": [*names, *(list(OTHERS) * 3 if backend == "torch" else [])],
        "seed": range(2**16),
        # Each program costs Triton's interpreter some milliseconds.
        "count": range(1, 6 if backend != "triton" else 3),
        "big": (False,) * (9 if backend != "triton" else 29) + (True,),
        "clip": (None, None, 0.5),
        "skip": (None, None, 1e30),
        "dtype": ("float64",) * 4 + ("float32",) * 2 + ("mixed", "bfloat16", "float16", "masters"),
        "policy": ["triangular"] * 4 + list(POLICIES),
        "flag": flags,
        "tensor_lr": (False,) * 6 + (True,),
        "hook": (False, True),
    }


# ---- the process


@contextmanager
def surroundings(backend: str) -> Iterator[None]:
    """Set the backend that "auto" means, and ignore the warnings that events cause."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("CLR_OPTIM_BACKEND", backend)
        warnings.filterwarnings(
            "ignore", "(lr|momentum|betas).* was written from outside", UserWarning
        )
        warnings.filterwarnings("ignore", "state_dict has the bounds", UserWarning)
        warnings.filterwarnings("ignore", "an earlier CyclicalOptimizer continued", UserWarning)
        # No event edits a checkpoint.
        warnings.filterwarnings("error", "the checkpoint's lr is not", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks")
        warnings.filterwarnings("ignore", "grad and param do not obey", UserWarning)
        # numpy warns of values that the interpreter computes and never uses: an SGD's empty first
        # buffer.
        warnings.filterwarnings("ignore", "", RuntimeWarning, r"triton\.runtime\.interpreter")
        threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def load_kernels(backend: str) -> None:
    """Load the kernels. Without them torch would be compared with itself."""
    if backend != "torch":
        from clr_optim.kernels.native import load

        load()
    if backend == "triton":
        assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
        import triton_helpers  # repairs the interpreter

        assert triton_helpers.INTERPRETED
