"""The loader of the extension: which kernels it chooses, and why there may be none."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import types

import pytest
import torch

from clr_optim.kernels.native import NoKernelsError, describe, load, loader

NAME = "clr_optim.kernels.native.module"


@pytest.fixture(autouse=True)
def _forgotten():
    """Have each test load the extension anew, and put this CPU's kernels back."""
    chosen = load().kernel_set()
    loader._load.cache_clear()
    yield
    loader._load.cache_clear()
    load().use(chosen)


def reason():
    """Return why there are no kernels, which a second call repeats."""
    with pytest.raises(NoKernelsError) as first:
        load()
    with pytest.raises(NoKernelsError) as second:
        load()
    assert str(first.value) == str(second.value)
    assert describe() == {"kernels": f"none: {first.value}", "extension": "", "openmp": ""}
    return str(first.value)


def test_the_kernels_for_this_cpu_serve():
    module = load()
    assert load() is module
    assert module.__name__ == NAME
    assert module.kernel_set() == loader._kernel_set() or module.kernel_sets() == ("baseline",)
    described = describe()
    assert described["kernels"].startswith(f"{module.kernel_set()}, since ")
    assert described["extension"] == module.__file__
    assert "omp" in described["openmp"]


x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have one set")


@x86
@pytest.mark.parametrize(("told", "name"), [("avx2", "x86_64_v3"), ("avx512", "x86_64_v4")])
def test_torchs_environment_variable_chooses(told, name):
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and told == "avx512":
        pytest.skip("this CPU has no AVX-512")
    code = "from clr_optim.kernels.native import describe; print(describe()['kernels'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": told},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{name}, since torch finds {told.upper()}\n"


@x86
def test_an_old_cpu_has_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    why = reason()
    assert "need a CPU with AVX2, and torch finds DEFAULT" in why
    assert "ATEN_CPU_CAPABILITY" in why


def test_a_platform_with_one_set_asks_for_no_instructions(monkeypatch):
    used = []
    module = types.ModuleType(NAME)
    module.kernel_sets, module.use = lambda: ("baseline",), used.append
    module.can_read, module.kernel_set = lambda capsule: True, lambda: "baseline"
    module.__file__ = "module.abi3.so"
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(loader, "_import", lambda: module)
    assert load() is module
    assert used == ["baseline"]
    assert describe()["kernels"] == "baseline, since one set serves every CPU of arm64"


def test_an_installation_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, None)
    why = reason()
    assert "built without a working C++ compiler" in why
    assert "apt-get install g++" in why
    assert "pip install --no-cache-dir --force-reinstall" in why


def test_an_extension_that_does_not_load(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: __kmpc_fork_call")

    monkeypatch.setattr(loader.importlib, "import_module", broken)
    why = reason()
    assert "the extension does not load: undefined symbol: __kmpc_fork_call" in why
    assert "CXX=g++" in why


def test_a_missing_module_of_another_package_is_no_reason(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'abacus'", name="abacus")

    monkeypatch.setattr(loader.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="abacus"):
        load()


def test_a_free_threaded_python_has_no_extension(monkeypatch):
    ask = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else ask(name)
    )
    assert "free-threaded, and the extension for it comes later" in reason()


def test_windows_has_no_extension(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Linux and macOS" in reason()


def test_no_openmp_runtime(monkeypatch):
    def none():
        raise OSError("no OpenMP runtime loads: tried libgomp.so.1")

    monkeypatch.setattr(loader, "share_openmp", none)
    why = reason()
    assert "tried libgomp.so.1" in why
    assert "apt-get install libgomp1" in why


def test_a_torch_without_the_exchange_api(monkeypatch):
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert "does not offer DLPack's C exchange API in version 1" in reason()


def test_a_torch_with_another_exchange_api(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", object())
    assert "install torch 2.11 or newer" in reason()


def test_an_unknown_set_is_refused_and_changes_nothing():
    module = load()
    before = module.kernel_set()
    with pytest.raises(ValueError, match="no kernel set has the name 'abacus'"):
        module.use("abacus")
    with pytest.raises(TypeError):
        module.use(4)
    assert module.kernel_set() == before
    with pytest.raises(TypeError, match=r"round\(\) takes"):
        module.round(1)
