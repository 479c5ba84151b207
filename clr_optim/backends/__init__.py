"""Where a step runs: one module per backend, and the choice between them."""

from __future__ import annotations

import os

from torch.optim import Optimizer

from clr_optim.backends.native import BuildError, library, rule_for
from clr_optim.backends.triton import device as _current
from clr_optim.backends.triton import here
from clr_optim.rules import class_name

__all__ = ["BACKENDS", "devices", "is_capturing", "plan_device", "resolve"]

#: What ``backend=`` and ``CLR_OPTIM_BACKEND`` may say.
BACKENDS = ("auto", "torch", "native", "triton")


def is_capturing() -> bool:
    """Whether what is launched now goes into a graph and is not run."""
    return _current.is_capturing()


def devices(backend: str) -> tuple[str, ...]:
    """The types of the devices whose tensors a fused backend updates."""
    if backend == "native":
        return ("cpu",)
    return ("cpu",) if here.is_interpreted() else here.DEVICES


def plan_device(backend: str, optimizer: Optimizer) -> str:
    """The one of them that this optimizer's first such parameter is on, or would have to be."""
    types = devices(backend)
    found = (p.device.type for group in optimizer.param_groups for p in group["params"])
    return next((device for device in found if device in types), types[0])


def resolve(backend: object, optimizer: Optimizer) -> tuple[str, str]:
    """``("native", "triton" or "torch", why)`` for this optimizer.

    ``CLR_OPTIM_BACKEND`` overrides ``"auto"``, never a backend asked for by name; it is a wish for
    every optimizer of the process, so one that no kernel serves gets its own step all the same.

    Raises:
        ValueError: for an unknown name, or a backend asked for by name that cannot serve.
    """
    source = f"backend={backend!r}"
    if not isinstance(backend, str):
        raise TypeError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}")
    wish = os.environ.get("CLR_OPTIM_BACKEND") if backend == "auto" else None
    asked = wish or backend
    if wish:
        source = f"CLR_OPTIM_BACKEND={wish!r}"
    if asked not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}")
    if asked == "torch":
        return "torch", f"asked for by {source}"
    rule = rule_for(optimizer)
    if asked == "auto":
        return ("torch", rule) if isinstance(rule, str) else _automatic(optimizer)
    reason = rule if isinstance(rule, str) else _refusal(asked, optimizer)
    if reason is None and not wish:
        try:
            library()
        except BuildError as error:
            reason = str(error)
    if reason is None:
        return asked, f"asked for by {source}"
    if wish:
        return "torch", reason
    raise ValueError(
        f"{source} cannot serve {class_name(type(optimizer))}: {reason}; use backend='auto'"
    )


def _automatic(optimizer: Optimizer) -> tuple[str, str]:
    """The backend for where the parameters are; nothing is compiled before the first step."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    device = next((param.device for param in params if param.device.type in here.DEVICES), None)
    if device is None:
        return "native", "it has a fused kernel"
    reason = here.why_no_triton() or here.why_not_unasked(device)
    return ("triton", "it has a fused kernel") if reason is None else ("torch", reason)


def _refusal(backend: str, optimizer: Optimizer) -> str | None:
    """Why a backend that was asked for cannot serve, or None, as long as it compiles."""
    if backend == "native":
        return None
    missing = here.why_no_triton()
    if missing:
        return missing
    params = [p for group in optimizer.param_groups for p in group["params"]]
    types = devices("triton")
    if params and not any(p.device.type in types for p in params):
        return (
            f"its parameters are on {params[0].device.type}, and Triton's kernels update "
            f"tensors on {' or '.join(types)} (on the CPU only with TRITON_INTERPRET=1)"
        )
    return None
