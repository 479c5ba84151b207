"""Serving: which backend updates the parameters, and why."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from clr_optim import backends
from clr_optim.backends import NoKernelsError, rule_for
from clr_optim.backends.base import FusedBackend
from clr_optim.backends.torch import has_own_step
from clr_optim.core.settings import Settings
from clr_optim.core.warn import callers_level
from clr_optim.plan import classify
from clr_optim.rules import class_name

__all__ = ["Serving", "parameters_of"]


def parameters_of(optimizer: Any) -> Iterator[Tensor]:
    """Yield the parameters of all groups."""
    return (p for group in optimizer.param_groups for p in group["params"])


class Serving:
    """The backend of one optimizer, made at the first step.

    Args:
        settings: the optimizer and its policy.
        chosen: the backend's name, and why it was chosen.
    """

    def __init__(self, settings: Settings, chosen: tuple[str, str]) -> None:
        self._settings = settings
        #: the backend's name, and the reason for it
        self.name, self.reason = chosen
        #: the backend that updates parameters, once one was needed; None if torch's own step does
        self.fused: FusedBackend | None = None

    @property
    def traits(self) -> type[FusedBackend] | None:
        """The class of the backend, whose attributes are its traits; None for torch's own step."""
        return backends.traits(self.name)

    def is_kept(self, group: Mapping[str, Any]) -> bool:
        """Return whether the device is to update a group's ``lr``.

        If so, ``lr`` is a tensor, or becomes one at the next write. :meth:`is_driven` tells of a
        tensor whether the device does so already.
        """
        if not group.get("capturable") or self._settings.has_scale_fn:
            return False
        traits = self.traits
        if traits is None or not traits.keeps_rates:
            return False
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return bool(group["params"])
        device = backends.plan_device(self.name, self._settings.optimizer)
        return lr.device.type == device and lr.dtype in (torch.float32, torch.float64)

    def is_driven(self, lr: Tensor) -> bool:
        """Return whether the last step has already written the next rate into a tensor."""
        return self.fused is not None and self.fused.keeps(lr)

    def make(self, lock: threading.RLock) -> FusedBackend | None:
        """Return the fused backend, made at the first call; None if torch's own step serves.

        Args:
            lock: the lock that the thread of a step holds.
        """
        if self.fused is None and backends.is_fused(self.name):
            with lock:
                self._make(lock)
        return self.fused

    def _make(self, lock: threading.RLock) -> None:
        optimizer = self._settings.optimizer
        rule = rule_for(optimizer)
        if self.fused is not None or isinstance(rule, str):
            return  # another thread was faster, or other code replaced the step
        asked = self._settings.backend != "auto"
        schedule = self._settings.schedule
        try:
            self.fused = backends.make(
                self.name,
                optimizer,
                rule,
                schedule,
                lock,
                asked=asked,
                extras=self._settings.extras,
            )
        except NoKernelsError as error:
            if asked or self._settings.master_weights:
                raise
            self.name = "torch"
            self.reason = f"the fused kernels cannot serve: {error}"
            _warn_no_kernels(error)

    def refuse_replaced_step(self) -> None:
        """Raise if other code replaced the wrapped step, and the user asked for kernels by name."""
        optimizer, backend = self._settings.optimizer, self._settings.backend
        if backends.is_fused(backend) and has_own_step(optimizer):
            raise RuntimeError(
                f"backend={backend!r} cannot serve {class_name(type(optimizer))}: its step was "
                f"replaced after it was wrapped; delete the new step (del optimizer.step), or use "
                f"backend='auto', which runs it"
            )

    def reasons(self) -> list[tuple[Tensor, str | None]]:
        """Return each parameter, and why torch's own step serves it; None if a kernel does."""
        optimizer, traits = self._settings.optimizer, self.traits
        rule = rule_for(optimizer)
        if traits is None or isinstance(rule, str):
            why = self.reason if traits is None else str(rule)
            return [(param, why) for param in parameters_of(optimizer)]
        device = backends.plan_device(self.name, optimizer)
        classes = classify(optimizer.param_groups, rule, device, capturable=traits.capturable)
        # Only a step finds shared memory and state that no kernel takes.
        fused = self.fused
        found = {} if fused is None else {id(p): why for p, why in fused.plan.fallback}
        return [
            (param, why or found.get(id(param)))
            for why, params in classes.items()
            for param in params
        ]

    def explain(self) -> str:
        """Return a line for each backend and reason: which parameters it serves, and why."""
        served: dict[tuple[str, str, str], list[Tensor]] = {}
        for param, why in self.reasons():
            kind = (
                ", bfloat16 with float32 masters" if self._settings.extras.has_master(param) else ""
            )
            by = (self.name, kind, self.reason) if why is None else ("torch", "", why)
            served.setdefault(by, []).append(param)
        of_class = class_name(type(self._settings.optimizer))
        return "\n".join(
            f"{by}: {len(params)} parameter tensors, {_values_in(params)}, {of_class}{kind}: {why}"
            for (by, kind, why), params in served.items()
        )


def _values_in(params: Iterable[Tensor]) -> str:
    """Return the number of values in words; a lazy module's parameters have none yet."""
    params = list(params)
    ready = [p for p in params if not is_lazy(p)]
    text = f"{sum(p.numel() for p in ready):,} values"
    lazy = len(params) - len(ready)
    return f"{text} ({lazy} uninitialized until the model's first forward)" if lazy else text


_warned_no_kernels = False


def _warn_no_kernels(error: NoKernelsError) -> None:
    """Warn once per process that steps are slower than they could be."""
    global _warned_no_kernels
    if not _warned_no_kernels:
        _warned_no_kernels = True
        warnings.warn(
            f"the fused kernels cannot serve, so each wrapped optimizer's own step runs, "
            f"more slowly and otherwise the same: {error}",
            RuntimeWarning,
            stacklevel=callers_level(),
        )
