"""Learning rate and momentum as pure functions of the integer step.

Functions such as :func:`triangular` return a :class:`Schedule`, which is a sequence of
:class:`Phase` objects. One formula serves all phases: :class:`Phase` states it.

Steps are exact integers, so that step 10**12 is as exact as step 10.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186. The
arguments have the names of :class:`torch.optim.lr_scheduler.CyclicLR`.
"""

from clr_optim.schedule import phase, registry
from clr_optim.schedule.compose import sequence
from clr_optim.schedule.curve import rates_and_momenta as rates_and_momenta
from clr_optim.schedule.cyclic import (
    exp_range,
    exp_range_bounds,
    triangular,
    triangular2,
    warm_restarts,
    wsd_cycles,
)
from clr_optim.schedule.finite import (
    cosine,
    decay,
    exp,
    fixed,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    ramp,
    wsd,
)
from clr_optim.schedule.phase import SCALE_MODES as SCALE_MODES
from clr_optim.schedule.phase import Phase
from clr_optim.schedule.phase import ScaleFn as ScaleFn
from clr_optim.schedule.registry import arguments_for as arguments_for
from clr_optim.schedule.schedule import Schedule
from clr_optim.schedule.schedule import check_growth as check_growth
from clr_optim.schedule.store import describe_callable as describe_callable

__all__ = [
    "POLICIES",
    "WINDOWS",
    "Phase",
    "Schedule",
    "cosine",
    "decay",
    "exp",
    "exp_range",
    "exp_range_bounds",
    "fixed",
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "polynomial",
    "ramp",
    "sequence",
    "triangular",
    "triangular2",
    "warm_restarts",
    "wsd",
    "wsd_cycles",
]

# The API reference reads the descriptions of constants here.

#: All policies, in a dictionary from name to function. An optimizer takes a name whose function
#: needs no arguments.
POLICIES = registry.POLICIES

#: The windows of cycles, ``"triangle"``, ``"welch"`` (parabolic), ``"hann"`` (sinusoidal) and
#: ``"sqrt"`` (1 − √(1 − x)).
WINDOWS = phase.WINDOWS
