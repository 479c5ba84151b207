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
        seed: of the values.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        *,
        backward: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        noise = _noise(seed).to(device, dtype)
        params = [_filled(noise, shape, 1.0).requires_grad_() for shape in shapes]
        self._take(params, backward=backward, seed=seed)

    @classmethod
    def of(cls, params: Sequence[Tensor], *, backward: bool = False, seed: int = 0) -> Tensors:
        """Take existing parameters, of any dtypes, and make gradients for them."""
        tensors = cls.__new__(cls)
        tensors._take(list(params), backward=backward, seed=seed)
        return tensors

    def _take(self, params: list[Tensor], *, backward: bool, seed: int) -> None:
        self.params = params
        self.size = sum(param.numel() for param in params)
        #: the number of values of each dtype
        self.sizes: dict[torch.dtype, int] = {}
        for param in params:
            self.sizes[param.dtype] = self.sizes.get(param.dtype, 0) + param.numel()
        noise = {dtype: _noise(seed).to(params[0].device, dtype) for dtype in self.sizes}

        def grad(param: Tensor, scale: float) -> Tensor:
            values = _filled(noise[param.dtype], tuple(param.shape), scale)
            # A gradient has its parameter's strides, as after a backward pass.
            return torch.empty_like(param, requires_grad=False).copy_(values)

        self._sets = cycle([[grad(param, scale) for param in params] for scale in (0.01, 0.02)])
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


def _noise(seed: int) -> Tensor:
    return torch.randn(2**16, generator=torch.Generator().manual_seed(seed))


def _filled(noise: Tensor, shape: Shape, scale: float) -> Tensor:
    size = math.prod(shape)
    return (noise.repeat(-(-size // len(noise)))[:size] * scale).reshape(shape).clone()
