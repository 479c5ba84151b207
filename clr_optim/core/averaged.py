"""Averaged: an optimizer's averages, in place of the parameters or beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clr_optim.core.course import Course
from clr_optim.core.wrapper import OptimizerT

__all__ = ["Averaged"]


class Averaged(Course[OptimizerT]):
    """A wrapper whose steps may keep an average of each parameter."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the parameters hold their averages within a ``with`` block.

        The contents are exchanged in place, so that views, graphs and other references to the
        parameters see the averages. After the block the parameters hold their own values again,
        bit for bit, also after an exception. Within the block ``step()``, ``state_dict()`` and
        ``load_state_dict()`` raise. Averages of another dtype than their parameter's are rounded
        within the block.

        The statistics of normalization layers belong to the parameters, not to the averages: see
        :func:`torch.optim.swa_utils.update_bn`.

        Raises:
            RuntimeError: if no step has taken an average yet, if the optimizer keeps none, and
                within another ``averaged()``.

        Example:
            >>> from clr_optim import Ema
            >>> from clr_optim.schedule import fixed
            >>> weight = torch.zeros(1, requires_grad=True)
            >>> opt = CyclicalOptimizer(
            ...     torch.optim.SGD([weight], lr=1.0), fixed(1.0), average=Ema(0.5)
            ... )
            >>> for _ in range(3):
            ...     weight.grad = -torch.ones(1)
            ...     opt.step()
            >>> with opt.averaged():
            ...     weight.item()
            2.25
            >>> weight.item()
            3.0
        """
        shared = self._shared
        with shared.lock:
            shared.position.catch_up()
            shared.in_backward.refuse_in_pass("averaged()")
            exchanged = shared.averaging.exchanged(shared.ordinary.leave)
            exchanged.__enter__()
        try:
            yield
        finally:
            with shared.lock:
                exchanged.__exit__(None, None, None)

    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return a model's state dict with averages in place of the parameters that have one.

        Args:
            model: the module whose parameters this optimizer updates.

        Returns:
            As :meth:`torch.nn.Module.state_dict`, with copies of all tensors. An average has the
            dtype of its parameter.

        Raises:
            RuntimeError: as for :meth:`averaged`.
            ValueError: if no parameter of the model has an average here.

        Example:
            >>> from clr_optim import Ema
            >>> model = torch.nn.Linear(2, 1)
            >>> inner = torch.optim.SGD(model.parameters())
            >>> opt = CyclicalOptimizer(inner, step_size_up=1, average=Ema(0.9))
            >>> model(torch.ones(2)).sum().backward()
            >>> opt.step()
            >>> other = torch.nn.Linear(2, 1)
            >>> other.load_state_dict(opt.averaged_state_dict(model))
            <All keys matched successfully>
        """
        shared = self._shared
        with shared.lock:
            shared.position.catch_up()
            shared.refuse_unsettled("averaged_state_dict()")
            averages = {id(param): average for param, average in shared.averaging.averages()}
            found: Mapping[str, Any] = model.state_dict(keep_vars=True)
            if not any(id(value) in averages for value in found.values()):
                raise ValueError(
                    f"model must hold parameters of this optimizer, and no parameter of the "
                    f"{type(model).__name__} has an average here: give the model that it trains"
                )
            # A copy of what the model returns keeps the versions of its modules.
            copies = model.state_dict()
            for name, value in found.items():
                if isinstance(value, Tensor):
                    average = averages.get(id(value), value).detach()
                    copies[name] = average.to(value.dtype, copy=True)
            return copies
