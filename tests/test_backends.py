"""Which backend serves, what happens without a compiler, and who says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from clr_optim import CyclicalOptimizer, backends


def adam(**options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return torch.optim.Adam([p], lr=0.1, **options)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("CLR_OPTIM_BACKEND", raising=False)


def test_auto_takes_a_kernel_where_there_is_one():
    assert backends.resolve("auto", adam()) == ("native", "it has a fused kernel")
    assert CyclicalOptimizer(adam()).explain().startswith("native: 1 parameter tensors, 3 values")
    name, why = backends.resolve("auto", torch.optim.NAdam([torch.ones(1)]))
    assert (name, why) == ("torch", "no fused kernel for NAdam")


def test_auto_steps_as_the_kernel_it_names():
    steps = []
    for backend in ("auto", "native"):
        inner = adam()
        CyclicalOptimizer(inner, backend=backend).step()
        steps.append(inner.param_groups[0]["params"][0])
    assert torch.equal(*steps)


def test_the_environment_wishes_for_what_serves(monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")
    assert backends.resolve("auto", adam()) == (
        "native",
        "asked for by CLR_OPTIM_BACKEND='native'",
    )
    assert backends.resolve("torch", adam())[0] == "torch"  # by name, it is as said
    name, why = backends.resolve("auto", torch.optim.NAdam([torch.ones(1)]))
    assert (name, why) == ("torch", "no fused kernel for NAdam")

    class Mine(torch.optim.Adam):
        pass

    assert backends.resolve("auto", Mine([torch.ones(1)]))[0] == "torch"
    patched = adam()
    patched.step = lambda closure=None: None
    assert backends.resolve("auto", patched) == ("torch", "its step was replaced")


def test_a_wish_compiles_nothing_before_the_first_step(monkeypatch):
    def compiled():
        raise AssertionError("compiled")

    monkeypatch.setattr(backends, "library", compiled)
    assert CyclicalOptimizer(adam()).explain().startswith("native: ")
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")
    assert CyclicalOptimizer(adam()).explain().startswith("native: ")
    monkeypatch.delenv("CLR_OPTIM_BACKEND")
    with pytest.raises(AssertionError, match="compiled"):
        CyclicalOptimizer(adam(), backend="native")


def test_a_backend_by_name_serves_or_raises():
    assert CyclicalOptimizer(adam(), backend="torch").explain().startswith("torch: 1 parameter")
    assert CyclicalOptimizer(adam(), backend="native").explain().startswith("native: 1 parameter")
    with pytest.raises(ValueError, match="backend='native' cannot serve NAdam: no fused kernel"):
        CyclicalOptimizer(torch.optim.NAdam([torch.ones(1)]), backend="native")


def test_explain_names_what_is_left_to_torch():
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(3))]},
        {"params": [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]},
        {"params": [torch.nn.Parameter(torch.ones(3))], "differentiable": True},
    ]
    inner = torch.optim.SGD(groups, lr=0.1)
    lines = CyclicalOptimizer(inner, backend="native").explain().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("native: 1 parameter tensors, 3 values, SGD")
    assert "torch: 1 parameter" in lines[1]
    assert "complex64" in lines[1]
    assert "differentiable=True" in lines[2]


WITHOUT_COMPILER = """
import warnings, torch
from clr_optim import CyclicalOptimizer

def make(**options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p, CyclicalOptimizer(torch.optim.SGD([p], lr=0.1), **options)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        p, opt = make()
        opt.step()
        opt.step()
assert torch.allclose(p, torch.full((3,), 1 - 0.025 - 0.0250375)), p
assert [w.category for w in caught] == [RuntimeWarning], caught
assert caught[0].filename == "<string>", caught[0].filename
print(caught[0].message)
assert opt.explain().startswith("torch: ") and "cannot be compiled" in opt.explain()
try:
    make(backend="native")
except ValueError as error:
    print(error)
"""


def test_without_a_compiler_torchs_step_serves_with_one_warning(tmp_path):
    env = {**os.environ, "CXX": "/bin/false", "CLR_OPTIM_CACHE_DIR": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "so each wrapped optimizer's own step runs" in out.stdout
    assert "/bin/false" in out.stdout
    assert "backend='native' cannot serve SGD" in out.stdout


# ---- what is chosen for a GPU, without one


def on_a_gpu(monkeypatch, capability=(9, 0), hip=None, triton=None):
    """An optimizer whose parameter says that it is on one, and what torch then says of it."""
    from clr_optim.backends import triton as module

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backends, "why_no_triton", lambda: triton)
    monkeypatch.setattr(module, "is_interpreted", lambda: False)
    return torch.optim.Adam([torch.ones(3).as_subclass(Elsewhere)])


def test_auto_takes_triton_on_nvidias_gpus(monkeypatch):
    assert backends.resolve("auto", on_a_gpu(monkeypatch)) == ("triton", "it has a fused kernel")
    assert backends.resolve("auto", on_a_gpu(monkeypatch, (8, 0)))[0] == "triton"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"capability": (7, 5)}, "compute capability 8.0 and above, this has 7.5"),
        ({"hip": "6.4"}, "no GPU of ROCm has run the kernels yet; backend='triton' asks for them"),
        ({"triton": "Triton is not installed: pip"}, "Triton is not installed: pip"),
    ],
)
def test_auto_says_why_it_leaves_a_gpu_to_torch(monkeypatch, told, words):
    name, why = backends.resolve("auto", on_a_gpu(monkeypatch, **told))
    assert name == "torch"
    assert words in why


def test_where_triton_cannot_compile_only_who_asked_for_it_is_refused(monkeypatch):
    """As without Python's headers, which Triton needs and nothing else here does."""
    from clr_optim.backends import triton
    from clr_optim.core import serving as module

    def no_headers(device):
        raise triton.BuildError("Triton on cuda:0: CalledProcessError: no Python.h")

    monkeypatch.setattr(triton, "try_out", no_headers)
    monkeypatch.setattr(triton, "DEVICES", ("cpu",))
    monkeypatch.setattr(backends, "DEVICES", ("cpu",))
    monkeypatch.setattr(module, "_warned_no_kernels", False)
    monkeypatch.setattr(backends, "why_no_triton", lambda: None)
    monkeypatch.setattr(backends, "why_not_unasked", lambda device: None)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = CyclicalOptimizer(torch.optim.SGD([param], lr=0.1), base_lr=0.1, max_lr=0.1)
    assert opt.explain().startswith("triton: ")
    with pytest.warns(RuntimeWarning, match=r"fused kernels cannot be compiled.*no Python\.h"):
        opt.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))
    assert "no Python.h" in opt.explain()
    assert opt.iteration == 1
