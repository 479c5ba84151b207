"""Take steps as in the README, with only the wheel installed; `make package` runs this file."""

import importlib.metadata
import pathlib
import sys

import torch

import clr_optim
from clr_optim import CyclicalOptimizer

assert "site-packages" in clr_optim.__file__, clr_optim.__file__
assert importlib.metadata.version("clr-optim") == clr_optim.__version__
for name in ("kernels", "bench", "plan", "backends.torch", "cli"):
    __import__(f"clr_optim.{name}")
root = pathlib.Path(clr_optim.__file__).parent
assert (root / "py.typed").exists()
assert (root / "demo" / "digits.npz").exists()
for name in ("kernels", "bench"):  # these names in site-packages belong to other packages
    assert not (root.parent / name).exists(), name

model = torch.nn.Linear(3, 1)
opt = CyclicalOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), policy="exp_range")
before = model.weight.detach().clone()
for _ in range(3):
    opt.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    opt.step()
assert opt.iteration == 3
assert not torch.equal(before, model.weight)
print(f"clr_optim {clr_optim.__version__} from its wheel: 3 steps, Python {sys.version.split()[0]}")
