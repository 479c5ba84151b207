"""The parameters of a workload, and gradients that move before each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from clr_optim.bench.workloads import Shape

__all__ = ["Tensors"]


class Tensors:
    """Hold the parameters of a workload and move their gradients.

    Two sets of gradients take turns by default. This is easier on every step than training, where
    each gradient is a new tensor in new memory; ``backward=True`` makes such gradients.

    Args:
        shapes: one per parameter.
        dtype: of parameters and gradients.
        backward: make new gradients by a backward pass before each step, as in training.
        device: of all tensors.
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
        """Give every parameter a gradient in other memory than its last one."""
        grads = next(self._sets)
        if not self._backward:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            return
        # If the old gradients were freed first, the new ones could take their memory.
        old_grads = [param.grad for param in self.params]
        for param in self.params:
            param.grad = None
        torch.autograd.backward(self.params, grads)
        del old_grads
