"""The plan of an optimizer: which tensors one kernel call updates, kept while nothing changes."""

from clr_optim.plan.bucket import Bucket
from clr_optim.plan.eligible import DTYPES, classify, is_plain, why_not
from clr_optim.plan.overlap import Memory, sharing
from clr_optim.plan.plan import Plan
from clr_optim.plan.row import NO_EXTRAS, Extras, Row, state_with_rest

__all__ = [
    "DTYPES",
    "NO_EXTRAS",
    "Bucket",
    "Extras",
    "Memory",
    "Plan",
    "Row",
    "classify",
    "is_plain",
    "sharing",
    "state_with_rest",
    "why_not",
]
