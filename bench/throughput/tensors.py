"""Parameters, and gradients that move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from clr_optim.bench.workloads import Shape

__all__ = ["Tensors"]


class Tensors:
    """Parameters, and gradients that move.

    Args:
        shapes: of the parameters.
        dtype: of parameters and gradients.
        backward: have gradients made by a backward pass, as in training: new tensors, of which no
            step has yet had a Python object, in memory that is new as well. Otherwise two sets
            are made once and take turns, which spares the machine but is easier on every step.
        device: where all of them lie.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        *,
        backward: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        noise = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).to(device, dtype)

        def filled(shape: Shape, scale: float) -> Tensor:
            size = math.prod(shape)
            return (noise.repeat(-(-size // len(noise)))[:size] * scale).reshape(shape).clone()

        self.params = [filled(shape, 1.0).requires_grad_() for shape in shapes]
        self.size = sum(param.numel() for param in self.params)
        self._sets = cycle([[filled(shape, scale) for shape in shapes] for scale in (0.01, 0.02)])
        self._backward = backward

    def move_gradients(self) -> None:
        """Give every parameter another gradient, in other memory than the last."""
        grads = next(self._sets)
        if not self._backward:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            return
        held = [param.grad for param in self.params]  # or the memory could be the same again
        for param in self.params:
            param.grad = None
        torch.autograd.backward(self.params, grads)
        del held
