"""A copy of all that training changes: model, optimizer, gradients, random states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clr_optim.sharding import DTensor, local_part

__all__ = ["Snapshot"]


class Snapshot:
    """All that a training changes, and how to put it back.

    Everything goes back into the objects that hold it, so that no reference to any of them goes
    stale: not an optimizer's, not a captured graph's.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: Optimizer,
        loaders: Sequence[Any],
        device: torch.device,
        offload: bool,
    ) -> None:
        self._offload = offload
        self._memo: dict[int, Callable[[], Any]] = {}
        self._held: list[Any] = []  # or a number of the memo might come to mean another object
        self._modules = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self._reshard()
        self._flags = [module.training for module in self._modules]
        # The tensors that stand under these names, and what is in them.
        self._tensors = [
            self._keep(tensors)
            for module in self._modules
            for tensors in (module._parameters, module._buffers)
        ]
        self._optimizer = self._keep(vars(optimizer))
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        modular = [p for module in modules for p in module.parameters()]
        #: all parameters
        self.params: list[Tensor] = list(dict.fromkeys([*modular, *grouped]))
        self._leaves = [
            (param, param.requires_grad, param.grad, self._keep(param.grad))
            for param in self.params
        ]
        self._random = self._keep_random(loaders, {device, *(p.device for p in self.params)})

    def restore(self) -> None:
        """Put everything back; may be called again."""
        self._reshard()
        with torch.no_grad():
            for put_back in self._tensors:
                put_back()
            self._optimizer()
            for param, requires_grad, grad, put_back in self._leaves:
                put_back()
                param.grad = grad
                if param.requires_grad != requires_grad:
                    param.requires_grad_(requires_grad)
        for module, flag in zip(self._modules, self._flags, strict=True):
            module.training = flag
        for put_back in self._random:
            put_back()

    def _reshard(self) -> None:
        """Give FSDP's modules their sharded parameters: a forward without backward leaves others.

        Whole ones are theirs only for a while.
        """
        modules: list[Any] = self._modules
        for module in modules:
            if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):
                module.reshard()

    def _keep(self, value: Any) -> Callable[[], Any]:
        """A function that puts back what is in ``value`` now, and returns that very object.

        Tensors, containers and optimizers inside one are looked into; other objects are only held.
        """
        known = self._memo.get(id(value))
        if known is not None:
            return known
        put_back: Callable[[], Any]
        if isinstance(value, Tensor):
            put_back = self._keep_tensor(value)
        elif isinstance(value, dict):
            items: list[tuple[Any, Callable[[], Any]]] = []

            def put_back() -> Any:
                now = [(key, keep()) for key, keep in items]
                value.clear()
                value.update(now)
                return value

            self._memo[id(value)] = put_back  # it may hold itself
            items += [(key, self._keep(item)) for key, item in value.items()]
        elif isinstance(value, list):
            members: list[Callable[[], Any]] = []

            def put_back() -> Any:
                value[:] = [keep() for keep in members]
                return value

            self._memo[id(value)] = put_back
            members += [self._keep(item) for item in value]
        elif isinstance(value, tuple):
            parts = [self._keep(item) for item in value]

            def put_back() -> Any:
                for keep in parts:
                    keep()
                return value

        elif isinstance(value, Optimizer):
            inside = self._keep(vars(value))

            def put_back() -> Any:
                inside()
                return value

        else:
            return lambda: value
        self._memo[id(value)] = put_back
        self._held.append(value)
        return put_back

    def _keep_tensor(self, tensor: Tensor) -> Callable[[], Tensor]:
        part = local_part(tensor).detach()  # its memory, wherever the tensor may point later
        alias = part
        if part.layout is torch.strided and 0 in part.stride():
            # Elements that share memory, as expanded ones do, are written once.
            sizes = [
                min(n, 1) if s == 0 else n for n, s in zip(part.shape, part.stride(), strict=True)
            ]
            alias = part.as_strided(sizes, part.stride())
        # On the CPU `to` alone would be no copy.
        saved = alias.to("cpu", copy=True) if self._offload else alias.clone()

        def put_back() -> Tensor:
            alias.copy_(saved)
            if (
                tensor.layout is torch.strided
                and type(tensor) is not DTensor
                and tensor.data_ptr() != part.data_ptr()
            ):
                tensor.data = part  # somebody gave it other memory
            return tensor

        return put_back

    @staticmethod
    def _keep_random(
        loaders: Iterable[Any], devices: Iterable[torch.device]
    ) -> list[Callable[[], Any]]:
        back: list[Callable[[], Any]] = []

        def add(put: Callable[[Any], Any], state: Any) -> None:
            back.append(lambda: put(state))

        add(torch.set_rng_state, torch.get_rng_state())
        add(random.setstate, random.getstate())
        add(np.random.set_state, np.random.get_state())
        for device in devices:
            if device.type == "cuda":
                state = torch.cuda.get_rng_state(device)
                back.append(lambda s=state, d=device: torch.cuda.set_rng_state(s, d))  # type: ignore[misc]
        for loader in loaders:
            sampler = getattr(loader, "batch_sampler", None)
            owners = (
                loader,
                getattr(loader, "sampler", None),
                sampler,
                getattr(sampler, "sampler", None),
            )
            generators = {getattr(owner, "generator", None) for owner in owners}
            for generator in generators:
                if isinstance(generator, torch.Generator):
                    add(generator.set_state, generator.get_state())
        return back
