"""The plan: which tensors one kernel call updates, kept from step to step while nothing changes."""

from clr_optim.plan.eligible import DTYPES, classify, is_plain, why_not
from clr_optim.plan.overlap import Memory, sharing
from clr_optim.plan.plan import Bucket, Plan, View

__all__ = [
    "DTYPES",
    "Bucket",
    "Memory",
    "Plan",
    "View",
    "classify",
    "is_plain",
    "sharing",
    "why_not",
]
