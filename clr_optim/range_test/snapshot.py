"""A copy of everything that training changes: model, optimizer, gradients, loaders, random states.

Every value goes back into the object that holds it. So references from optimizers and captured
graphs stay valid.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clr_optim.core.warn import callers_level
from clr_optim.range_test.contents import bytes_of
from clr_optim.range_test.put_back import PutBack, extra_state_back, global_random_back
from clr_optim.range_test.record import Record
from clr_optim.range_test.search import Search

__all__ = ["Snapshot"]

# A loader's or an object's data are left out if they are larger than this and than the model.
_LARGE = 64 * 2**20


class Snapshot:
    """Copy what training changes, and put the copies back.

    :class:`~clr_optim.range_test.search.Search` chooses the values.

    Args:
        modules: the model, and other modules with parameters (a loss).
        optimizer: the model's optimizer.
        loaders: the loaders of batches.
        device: the device of the training.
        offload: whether to copy tensors into the CPU's memory.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: Optimizer,
        loaders: Sequence[Any],
        device: torch.device,
        offload: bool,
    ) -> None:
        self._modules = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self._reshard()
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        modular = [p for module in modules for p in module.parameters()]
        #: all parameters
        self.params: list[Tensor] = list(dict.fromkeys([*modular, *grouped]))
        buffers = [buffer for module in self._modules for buffer in module.buffers(recurse=False)]
        size = sum(bytes_of(tensor) for tensor in [*self.params, *buffers])
        self._flags = [(module, module.training) for module in self._modules]
        extra_states = [(module, extra_state_back(module)) for module in self._modules]
        self._extra_states: list[PutBack] = [back for _, back in extra_states if back is not None]
        self._record = Record(
            offload,
            shared=[*self.params, *self._modules],
            with_extra_state={id(module) for module, back in extra_states if back is not None},
        )
        self._search = search = Search(self._record, largest=max(_LARGE, size))
        for tensor in [*self.params, *buffers]:
            search.copy(tensor)
        self._leaves = [(param, param.requires_grad, param.grad) for param in self.params]
        for _, _, grad in self._leaves:
            search.copy(grad)
        search.copy(optimizer.state, everything=True)
        search.copy(optimizer.param_groups, everything=True)
        search.copy(optimizer, everything=True)
        # The test can run without copies of the other values.
        self._record.is_lenient = True
        for module in self._modules:
            search.copy(module)
        for loader in loaders:
            search.copy_loader(loader)
        devices = {device, *(p.device for p in self.params)}
        self._record.put_backs += global_random_back(devices)

    def set_workers_aside(self) -> None:
        """Have loaders start new workers. The persistent workers keep their state meanwhile."""
        for loader in self._search.loaders_with_persistent_workers:
            if "_iterator" in vars(loader):
                vars(loader)["_iterator"] = None
            else:
                warnings.warn(
                    f"the workers of the loader {type(loader).__name__} persist, and their state "
                    "cannot be put back: give lr_range_test a loader with persistent_workers=False",
                    UserWarning,
                    stacklevel=callers_level(),
                )

    def restore(self) -> None:
        """Put every value back. A second call is allowed."""
        self._reshard()
        errors: list[Exception] = []

        def attempt(put_back: PutBack) -> None:
            try:
                put_back()
            except Exception as error:  # put the other values back all the same
                errors.append(error)

        with torch.no_grad():
            for put_back in [*self._extra_states, *self._record.put_backs]:
                attempt(put_back)
            for param, requires_grad, grad in self._leaves:
                attempt(functools.partial(setattr, param, "grad", grad))
                if param.requires_grad != requires_grad:
                    attempt(functools.partial(param.requires_grad_, requires_grad))
        for module, flag in self._flags:
            if module.training != flag:
                module.training = flag
        if errors:
            lines = [f"{type(error).__name__}: {error}".partition("\n")[0] for error in errors]
            reasons = "; ".join(dict.fromkeys(lines))
            warnings.warn(
                f"the range test could not put back {len(errors)} of {len(self._record.copied)} "
                f"objects ({reasons}): load a checkpoint before further training",
                RuntimeWarning,
                stacklevel=callers_level(),
            )

    def _reshard(self) -> None:
        """Have FSDP's modules shard their parameters.

        A forward without a backward leaves whole parameters, whose memory FSDP frees later.
        """
        modules: list[Any] = self._modules
        for module in modules:
            if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):
                module.reshard()
