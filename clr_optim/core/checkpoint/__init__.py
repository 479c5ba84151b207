"""A checkpoint of an optimizer: saved, checked as a whole, loaded, and undone on error.

:mod:`.keys` says what our keys may hold, :mod:`.settings` and :mod:`.state` what torch's may.
"""

from clr_optim.core.checkpoint.load import load, shallow_copy, warn_other_policy
from clr_optim.core.checkpoint.save import save

__all__ = ["load", "save", "shallow_copy", "warn_other_policy"]
