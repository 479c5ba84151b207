"""Create state without a step: the step by which a distributed checkpointer asks for all state.

Before ``torch.distributed.checkpoint`` loads, the state must be there to load into. So the
checkpointer writes 0 into the ``lr`` of every group, gives every parameter a zero gradient, and
steps. Such a step creates state as torch does, and neither position nor bounds change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clr_optim.backends.base import FusedBackend, Gradients
from clr_optim.core import amp
from clr_optim.core.fallback import Borrowed, has_fallback, step_fallback
from clr_optim.core.rates import written_rate
from clr_optim.core.serving import parameters_of
from clr_optim.core.shared import Shared
from clr_optim.sharding import local_part, no_sums, spread_of, spreads, sum_over_ranks

__all__ = ["asks_for_state", "create_state"]


def asks_for_state(shared: Shared) -> bool:
    """Return whether the next step is a checkpointer's: every rate and every gradient is 0.

    A 0.0 that the policy wrote does not count. Under a warm-up scheduler the gradients are not
    zero. Without any gradient, the answer is yes only if no parameter requires one. All ranks give
    the same answer, since otherwise their positions would part.
    """
    mirror, optimizer = shared.mirror, shared.settings.optimizer
    groups = optimizer.param_groups
    if not groups:
        return False
    for i, group in enumerate(groups):
        # A group that was added to the wrapped optimizer has no record yet.
        if i < len(mirror.records) and not mirror.is_foreign(i, group):
            return False
        if written_rate(group["lr"], i) != 0.0:
            return False
    # Each rank takes part in the sums, whatever gradients it has.
    params = list(parameters_of(optimizer))
    present, nonzero = no_sums(spreads(params)), no_sums(spreads(params))
    for p in params:
        if p.grad is not None:
            present[spread_of(p)] += 1
            nonzero[spread_of(p)] += not _is_zero(local_part(p.grad))
    if not sum_over_ranks(present):
        return not any(p.requires_grad for p in params)
    return not sum_over_ranks(nonzero)


def create_state(shared: Shared, fused: FusedBackend, borrowed: Borrowed) -> None:
    """Create the state that a step at rate 0 creates; the caller holds the lock.

    The kernels create the state themselves: with torch's own step, a float16 parameter would
    become NaN, since its ``eps`` rounds to 0.

    Raises:
        RuntimeError: if the user asked for a backend that cannot serve all parameters.
    """
    position = shared.position
    settings = shared.settings
    if (settings.cycle_momentum or settings.schedules) and position.is_on_device:
        position.settle()  # the kernels use the groups' settings
    fused.plan.refresh()
    gradients = Gradients(max_norm=settings.max_grad_norm)
    if has_fallback(shared, fused, capturing=False):
        left = step_fallback(shared, fused, amp.NO_SIGNALS, gradients, borrowed)
        assert left is not None, "no gate was given"
        gradients = left
        shared.averaging.put(fused.plan.unserved, {})
    course = position.course()
    course = course._replace(rates=[0.0] * len(course.rates), moves=False, weights=())
    norm, _ = fused.step(course, gradients)
    if norm is not None:
        shared.ordinary.norm = norm


def _is_zero(grad: Tensor) -> bool:
    """Return whether all values of a gradient are 0."""
    if grad.layout is not torch.strided:
        grad = grad.coalesce().values() if grad.layout is torch.sparse_coo else grad.to_dense()
    return not bool(grad.any())
