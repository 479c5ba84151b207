"""The choice of a backend: by name, by the environment, without the extension."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest
import torch

from clr_optim import CyclicalOptimizer, backends, schedule
from clr_optim.backends import native
from clr_optim.kernels.native import loader


def adam(**options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return torch.optim.Adam([p], lr=0.1, **options)


pytestmark = pytest.mark.usefixtures("no_environment")


def test_auto_takes_a_kernel_where_there_is_one():
    assert backends.resolve("auto", adam()) == ("native", "it has a fused kernel")
    assert CyclicalOptimizer(adam()).explain().startswith("native: 1 parameter tensors, 3 values")
    name, why = backends.resolve("auto", torch.optim.ASGD([torch.ones(1)]))
    assert (name, why) == ("torch", "no fused kernel for ASGD")


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
    assert backends.resolve("torch", adam())[0] == "torch"  # the user's name wins
    name, why = backends.resolve("auto", torch.optim.ASGD([torch.ones(1)]))
    assert (name, why) == ("torch", "no fused kernel for ASGD")

    class Mine(torch.optim.Adam):
        pass

    assert backends.resolve("auto", Mine([torch.ones(1)]))[0] == "torch"
    patched = adam()
    patched.step = lambda closure=None: None
    assert backends.resolve("auto", patched) == ("torch", "its step was replaced")


def test_a_wish_loads_nothing_before_the_first_step(monkeypatch):
    def loaded():
        raise AssertionError("loaded")

    monkeypatch.setattr(backends, "library", loaded)
    assert CyclicalOptimizer(adam()).explain().startswith("native: ")
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")
    assert CyclicalOptimizer(adam()).explain().startswith("native: ")
    monkeypatch.delenv("CLR_OPTIM_BACKEND")
    with pytest.raises(AssertionError, match="loaded"):
        CyclicalOptimizer(adam(), backend="native")


def test_a_backend_by_name_serves_or_raises():
    assert CyclicalOptimizer(adam(), backend="torch").explain().startswith("torch: 1 parameter")
    assert CyclicalOptimizer(adam(), backend="native").explain().startswith("native: 1 parameter")
    with pytest.raises(ValueError, match="backend='native' cannot serve ASGD: no fused kernel"):
        CyclicalOptimizer(torch.optim.ASGD([torch.ones(1)]), backend="native")


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


WITHOUT_EXTENSION = """
import sys, warnings, torch
sys.modules["clr_optim.kernels.native.module"] = None  # as if it were not installed
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
assert opt.explain().startswith("torch: ") and "is not installed" in opt.explain()
try:
    make(backend="native")
except ValueError as error:
    print(error)
"""


def test_without_the_extension_torchs_step_serves_with_one_warning():
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert "so each wrapped optimizer's own step runs" in out.stdout
    assert "built without a working C++ compiler" in out.stdout
    assert "backend='native' cannot serve SGD" in out.stdout


# ---- what the optimizer asks of a backend


def test_every_fused_backend_states_its_traits():
    stated = (
        "capturable", "counts_on_device", "keeps_rates", "name", "reuses_norm", "sees_overflows",
    )  # fmt: skip
    for name in backends.BACKENDS:
        traits = backends.traits(name)
        assert backends.is_fused(name) is (traits is not None)
        if traits is None:
            assert name in ("auto", "torch")
        else:
            assert traits.name == name
            assert all(name in vars(traits) for name in stated)
            assert backends.devices(name) == traits.device_types()


def test_make_builds_the_backend_where_its_tensors_lie():
    inner = adam()
    rule = backends.rule_for(inner)
    fused = backends.make("native", inner, rule, schedule.fixed(), asked=True)
    assert type(fused) is backends.traits("native")
    elsewhere = torch.optim.Adam([torch.ones(1, device="meta")])
    assert backends.make("native", elsewhere, rule, schedule.fixed(), asked=False) is None


def test_make_tries_triton_out_unless_the_user_named_it(monkeypatch):
    from clr_optim.backends import triton

    tried = []
    monkeypatch.setattr(triton.here, "try_out", tried.append)
    monkeypatch.setattr(triton.here, "DEVICES", ("cpu",))
    inner = adam()
    for asked in (True, False):
        backends.make(
            "triton", inner, backends.rule_for(inner), schedule.fixed(), asked=asked
        )  # fmt: skip
    assert tried == [torch.device("cpu")]


# ---- the choice for a GPU, on a machine without one


def on_a_gpu(monkeypatch, capability=(9, 0), hip=None, triton=None):
    """Return an optimizer whose parameter claims to lie on a GPU with these properties."""
    from clr_optim.backends.triton import here

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(here, "why_no_triton", lambda: triton)
    monkeypatch.setattr(here, "is_interpreted", lambda: False)
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
    """Only Triton needs Python's headers, so they may be missing."""
    from clr_optim.backends import triton
    from clr_optim.core import serving as module

    def no_headers(device):
        raise triton.NoKernelsError("Triton on cuda:0: CalledProcessError: no Python.h")

    monkeypatch.setattr(triton.here, "try_out", no_headers)
    monkeypatch.setattr(triton.here, "DEVICES", ("cpu",))
    monkeypatch.setattr(module, "_warned_no_kernels", False)
    monkeypatch.setattr(triton.here, "why_no_triton", lambda: None)
    monkeypatch.setattr(triton.here, "why_not_unasked", lambda device: None)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = CyclicalOptimizer(torch.optim.SGD([param], lr=0.1), base_lr=0.1, max_lr=0.1)
    assert opt.explain().startswith("triton: ")
    with pytest.warns(RuntimeWarning, match=r"fused kernels cannot serve.*no Python\.h"):
        opt.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))
    assert "no Python.h" in opt.explain()
    assert opt.iteration == 1


# ---- free-threaded Python


@pytest.fixture
def free_threaded(monkeypatch):
    """Have this Python say that it is a free-threaded build."""
    from clr_optim.core import serving

    ask = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else ask(name)
    )
    native.library.cache_clear()
    monkeypatch.setattr(serving, "_warned_no_kernels", False)
    loader._load.cache_clear()
    yield
    loader._load.cache_clear()
    native.library.cache_clear()


@pytest.mark.usefixtures("free_threaded")
def test_a_free_threaded_python_runs_torchs_step_and_says_why():
    opt = CyclicalOptimizer(adam())
    with pytest.warns(RuntimeWarning, match="this Python is free-threaded"):
        opt.step()
    assert opt.explain().startswith("torch: 1 parameter")
    assert "this Python is free-threaded" in opt.explain()
    assert opt.iteration == 1


@pytest.mark.usefixtures("free_threaded")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_free_threaded_python_refuses_a_compiled_backend(monkeypatch, backend):
    from clr_optim.backends.triton import here

    monkeypatch.setattr(here, "is_interpreted", lambda: True)
    monkeypatch.setattr(here, "why_no_triton", lambda: None)
    words = rf"backend='{backend}' cannot serve Adam: .*free-threaded.*use backend='auto'"
    with pytest.raises(ValueError, match=words):
        CyclicalOptimizer(adam(), backend=backend)
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")
    opt = CyclicalOptimizer(adam())  # the environment is only a wish
    with pytest.warns(RuntimeWarning, match="free-threaded"):
        opt.step()
    assert opt.explain().startswith("torch: 1 parameter")


@pytest.mark.usefixtures("free_threaded")
def test_a_free_threaded_python_leaves_a_gpu_to_torch(monkeypatch):
    inner = adam()
    monkeypatch.setattr(backends, "_choose", lambda optimizer: ("triton", "it has a fused kernel"))
    monkeypatch.setattr(backends.here, "DEVICES", ("cpu",))
    monkeypatch.setattr(backends.here, "try_out", lambda device: None)
    opt = CyclicalOptimizer(inner)
    with pytest.warns(RuntimeWarning, match="free-threaded"):
        opt.step()
    assert opt.explain().startswith("torch: 1 parameter")
