"""What a type checker knows of a user's script; `make types` checks it, nothing runs it."""

from typing import assert_type

import torch

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import triangular

parameters = [torch.nn.Parameter(torch.zeros(1))]
opt = CyclicalOptimizer(torch.optim.Adam(parameters, lr=1e-3), policy="exp_range")
assert_type(opt, CyclicalOptimizer[torch.optim.Adam])
assert_type(opt.optimizer, torch.optim.Adam)
assert_type(opt.lr_at(3), list[float])
assert_type(opt.step(), None)
assert_type(opt.step(lambda: 1.0), float)
assert_type(triangular()(3), float)
