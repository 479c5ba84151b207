"""BackwardSteps: an optimizer that may update its parameters within the backward pass."""

from __future__ import annotations

from clr_optim.core.in_backward import BackwardHandle
from clr_optim.core.mastered import Mastered
from clr_optim.core.shared import alone
from clr_optim.core.wrapper import OptimizerT

__all__ = ["BackwardSteps"]


class BackwardSteps(Mastered[OptimizerT]):
    """A wrapper whose steps may begin within the backward pass."""

    @alone
    def step_in_backward(self, *, gradients_are_reduced: bool = False) -> BackwardHandle:
        """Update each parameter in the backward pass, as soon as its gradient is complete.

        A hook on each parameter updates the parameter and sets ``grad`` to ``None``, so that the
        gradients of the whole model are never in memory at once. The training loop stays: call
        ``step()`` after each ``backward()``. It updates parameters that still have a gradient,
        advances the position and calls the hooks. The parameters are those of an ordinary step, bit
        for bit.

        Between the first update of a backward pass and ``step()``, ``state_dict()``, copies,
        ``averaged()``, :meth:`set_iteration` and :meth:`set_bounds` raise. A second gradient of a
        parameter before ``step()`` raises in ``backward()``, before any write. The hooks keep the
        optimizer alive no longer than the caller does. Copies and pickles omit them.

        Args:
            gradients_are_reduced: whether each rank's gradients are already sums over all ranks
                when hooks run. DTensors need no such promise.

        Returns:
            A handle whose ``remove()`` undoes the call; also a context manager.

        Raises:
            RuntimeError: if the hooks are in effect already.
            ValueError: with ``max_grad_norm`` or ``skip_above``, which need the norm of all
                gradients; if no fused kernel serves the optimizer; and with several ranks and
                parameters that are no DTensors, unless ``gradients_are_reduced``.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> opt = CyclicalOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
            >>> handle = opt.step_in_backward()
            >>> model(torch.ones(4)).sum().backward()
            >>> model.weight.grad is None
            True
            >>> opt.step()
            >>> opt.iteration
            1
            >>> handle.remove()
        """
        shared = self._shared
        return shared.in_backward.activate(gradients_are_reduced, shared.lock)
