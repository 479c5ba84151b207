"""What a checkpoint may contain; and how it is saved, checked as a whole, loaded, undone on error.

- ``"param_groups"``: torch's settings of each group (checked in :mod:`.settings`), and our keys
  :data:`clr_optim.keys.KEYS`: position, bounds and policy (checked in :mod:`.keys`).
- ``"state"``: torch's tensors and numbers of each parameter, by the tables of
  :mod:`clr_optim.rules` (checked in :mod:`.state`).
- :data:`clr_optim.keys.ENTRY`: our keys, if the layout of the wrapped optimizer drops them.

The wrapped optimizer may have another layout: its own ``load_state_dict`` then checks the rest.
"""

from clr_optim.core.checkpoint.load import load, shallow_copy, warn_other_policy
from clr_optim.core.checkpoint.save import save

__all__ = ["load", "save", "shallow_copy", "warn_other_policy"]
