"""The optimizers of the rows, and SGD with Caffe's momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["CAFFE_RULES", "MOMENTUM", "RULES", "CaffeSGD"]

MOMENTUM = 0.9
_EPSILON = 1e-8


class CaffeSGD(Optimizer):
    """SGD with Caffe's momentum, which keeps the rate inside the buffer.

    ``V = μ·V + lr·(g + decay·W)``, then ``W −= V``, or with Nesterov's momentum
    ``W −= (1 + μ)·V − μ·V_before``. At a constant rate this equals :class:`torch.optim.SGD`. When
    the rate changes, torch multiplies the whole buffer by the new rate. Caffe's buffer keeps the
    rates of the steps that filled it.

    Source: Caffe's ``sgd_solver.cpp`` and ``nesterov_solver.cpp``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; ``closure`` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            momentum = group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"]
                before = buffer.clone() if group["nesterov"] else None
                grad = param.grad.add(param, alpha=group["weight_decay"])
                buffer.mul_(momentum).add_(grad, alpha=group["lr"])
                if before is None:
                    param.sub_(buffer)
                else:
                    param.sub_(buffer, alpha=1.0 + momentum).add_(before, alpha=momentum)
        return loss


Groups = list[dict[str, Any]]

RULES: dict[str, Callable[[Groups], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=MOMENTUM),
    "nesterov": lambda groups: torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.999), eps=_EPSILON),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, alpha=0.99, eps=_EPSILON),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, eps=_EPSILON),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, rho=0.9, eps=_EPSILON),
}
CAFFE_RULES: dict[str, Callable[[Groups], Optimizer]] = {
    "sgd": lambda groups: CaffeSGD(groups, momentum=MOMENTUM),
    "nesterov": lambda groups: CaffeSGD(groups, momentum=MOMENTUM, nesterov=True),
}
