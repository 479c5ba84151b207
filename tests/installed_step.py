"""Take steps as in the README, and by every kernel, with only the package installed.

`make package` runs this file: for the wheel, and with ``--without-kernels`` for a package that was
built without a compiler.
"""

import importlib.metadata
import pathlib
import sys
import warnings

import torch
from cases import EVERY_KERNEL, Problem

import clr_optim
from clr_optim import CyclicalOptimizer
from clr_optim.kernels.native import describe

assert "site-packages" in clr_optim.__file__, clr_optim.__file__
assert importlib.metadata.version("clr-optim") == clr_optim.__version__
for name in ("kernels", "bench", "plan", "backends.torch", "cli"):
    __import__(f"clr_optim.{name}")
root = pathlib.Path(clr_optim.__file__).parent
assert (root / "py.typed").exists()
assert (root / "demo" / "digits.npz").exists()
for name in ("kernels", "bench"):  # these names in site-packages belong to other packages
    assert not (root.parent / name).exists(), name

without_kernels = sys.argv[1:] == ["--without-kernels"]
model = torch.nn.Linear(3, 1)
opt = CyclicalOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), policy="exp_range")
before = model.weight.detach().clone()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        opt.step()
assert opt.iteration == 3
assert not torch.equal(before, model.weight)
if without_kernels:
    assert [warning.category for warning in caught] == [RuntimeWarning], caught
    assert "built without a working C++ compiler" in str(caught[0].message), caught[0]
    assert opt.explain().startswith("torch: "), opt.explain()
    assert not list(root.rglob("*.so"))
else:
    assert not caught, caught
    for case in EVERY_KERNEL:
        problem = Problem(case)
        opt = case.ours(problem.params, backend="native")
        for step in range(3):
            problem.backward(step)
            opt.step()
        assert opt.explain().startswith("native: "), opt.explain()
print(f"clr_optim {clr_optim.__version__}, {sys.version.split()[0]}, torch {torch.__version__}:")
print(f"  kernels {describe()['kernels'].partition(';')[0]}")
