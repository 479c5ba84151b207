"""Learning rate and momentum as pure functions of the integer step.

Every policy is a sequence of phases, and one formula serves them all::

    lr(t) = b(t)·lower + a(t)·(upper − lower)·w(x(t))

``lower`` and ``upper`` are the group's ``base_lr`` and ``max_lr`` unless the phase says otherwise,
``w`` is the window, ``x(t)`` in [0, 1] the position in the cycle (rising for ``step_size_up``
steps, falling for ``step_size_down``), ``a`` and ``b`` the decay of amplitude and lower bound::

    a(t) = cycle_gamma^cycle · gamma^t          b(t) = base_gamma^t

Steps are exact integers: the position is an integer modulo, never a sum, so that step 10**12 is as
right as step 10. Powers are taken as 2^(t·log2(gamma)) in float64, which overflows for no cycle.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186; the
argument names are those of :class:`torch.optim.lr_scheduler.CyclicLR`.
"""

from clr_optim.schedule import phase
from clr_optim.schedule.phase import SCALE_MODES as SCALE_MODES
from clr_optim.schedule.phase import Phase
from clr_optim.schedule.phase import ScaleFn as ScaleFn
from clr_optim.schedule.policies import (
    decay,
    exp,
    exp_range,
    exp_range_bounds,
    fixed,
    one_cycle,
    ramp,
    sequence,
    triangular,
    triangular2,
    warm_restarts,
)
from clr_optim.schedule.schedule import Schedule
from clr_optim.schedule.schedule import check_growth as check_growth
from clr_optim.schedule.store import describe_callable as describe_callable

__all__ = [
    "WINDOWS",
    "Phase",
    "Schedule",
    "decay",
    "exp",
    "exp_range",
    "exp_range_bounds",
    "fixed",
    "one_cycle",
    "ramp",
    "sequence",
    "triangular",
    "triangular2",
    "warm_restarts",
]

#: The windows a user may choose; ``"constant"`` (w = 1, no cycle) is for phases without one.
WINDOWS = phase.WINDOWS
