"""The choice of a backend: which one serves an optimizer, and why."""

from __future__ import annotations

import os
import threading

from torch.optim import Optimizer

from clr_optim.backends import device as current_device
from clr_optim.backends.base import FusedBackend
from clr_optim.backends.native import NativeBackend, NoKernelsError, library, rule_for
from clr_optim.backends.triton import TritonBackend, here
from clr_optim.plan import NO_EXTRAS, Extras
from clr_optim.rules import UpdateRule, class_name
from clr_optim.schedule import Schedule

__all__ = [
    "BACKENDS", "NoKernelsError", "current_device", "devices", "is_fused", "make", "plan_device",
    "resolve", "rule_for", "traits",
]  # fmt: skip

_FUSED: dict[str, type[FusedBackend]] = {
    backend.name: backend for backend in (NativeBackend, TritonBackend)
}

#: The values of ``backend=`` and ``CLR_OPTIM_BACKEND``.
BACKENDS = ("auto", "torch", *_FUSED)


def is_fused(name: str) -> bool:
    """Return whether a backend has kernels: ``"torch"`` has none, ``"auto"`` names no backend."""
    return name in _FUSED


def traits(name: str) -> type[FusedBackend] | None:
    """Return the class of a fused backend, whose attributes are its traits; None for torch."""
    return _FUSED.get(name)


def devices(name: str) -> tuple[str, ...]:
    """Return the types of the devices whose tensors a fused backend updates."""
    return _FUSED[name].device_types()


def plan_device(name: str, optimizer: Optimizer) -> str:
    """Return the type of device that a fused backend updates for this optimizer.

    This is the device of the first parameter that the backend can update, else the first device
    that the backend serves at all.
    """
    types = devices(name)
    found = (p.device.type for group in optimizer.param_groups for p in group["params"])
    return next((device for device in found if device in types), types[0])


def make(
    name: str,
    optimizer: Optimizer,
    rule: UpdateRule,
    schedule: Schedule,
    lock: threading.RLock | None = None,
    *,
    asked: bool,
    extras: Extras = NO_EXTRAS,
) -> FusedBackend | None:
    """Return a fused backend for one optimizer, or None while no parameter lies where it works.

    Args:
        name: the name of a fused backend.
        optimizer: the wrapped optimizer.
        rule: its update rule.
        schedule: the policy.
        lock: the lock that a thread holds while it steps the optimizer. None makes a new lock.
        asked: whether the user named the backend.
        extras: the state that steps keep beside torch's.

    Raises:
        NoKernelsError: if the kernels cannot serve here.
    """
    types = devices(name)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not any(param.device.type in types for param in params):
        return None
    device = plan_device(name, optimizer)
    return _FUSED[name].make(optimizer, rule, schedule, device, lock, asked=asked, extras=extras)


def resolve(backend: object, optimizer: Optimizer) -> tuple[str, str]:
    """Return the name of the backend for this optimizer, and why.

    ``CLR_OPTIM_BACKEND`` overrides ``"auto"`` and no other value. The variable is a wish for every
    optimizer of the process: an optimizer that the wished backend cannot serve runs its own step.

    Raises:
        TypeError: if ``backend`` is no string.
        ValueError: for an unknown name, or if the backend that the user named cannot serve.
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
    reason = rule if isinstance(rule, str) else None
    if asked == "auto":
        return _choose(optimizer) if reason is None else ("torch", reason)
    reason = reason or _refuse(asked, optimizer)
    if reason is None and not wish:
        try:
            library()
        except NoKernelsError as error:
            reason = str(error)
    if reason is None:
        return asked, f"asked for by {source}"
    if wish:
        return "torch", reason
    raise ValueError(
        f"{source} cannot serve {class_name(type(optimizer))}: {reason}; use backend='auto'"
    )


def _choose(optimizer: Optimizer) -> tuple[str, str]:
    """Return the backend for the parameters' device; load nothing before the first step."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    device = next((param.device for param in params if param.device.type in here.DEVICES), None)
    if device is None:
        return NativeBackend.name, "it has a fused kernel"
    reason = here.why_no_triton() or here.why_not_unasked(device)
    return (TritonBackend.name, "it has a fused kernel") if reason is None else ("torch", reason)


def _refuse(name: str, optimizer: Optimizer) -> str | None:
    """Return why a backend that the user named cannot serve, or None."""
    if name != TritonBackend.name:
        return None
    missing = here.why_no_triton()
    if missing:
        return missing
    params = [p for group in optimizer.param_groups for p in group["params"]]
    types = devices(name)
    if params and not any(p.device.type in types for p in params):
        return (
            f"its parameters are on {params[0].device.type}, and Triton's kernels update "
            f"tensors on {' or '.join(types)} (on the CPU only with TRITON_INTERPRET=1)"
        )
    return None
