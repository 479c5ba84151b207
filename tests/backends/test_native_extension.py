"""The extension: its sets of kernels give the same bits, and it brings no OpenMP runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import torch
from contract import name_of
from native_helpers import DTYPES, HALF, KERNELS, drawn, held, members, parameters
from places import ROOT

from clr_optim.kernels.native import load, openmp

pytestmark = pytest.mark.usefixtures("native_kernels")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc")

#: Lengths around a unit of two 16-bit values, a vector and a block of the sums.
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 511, 1023, 16385)


# ---- the same bits


@pytest.fixture
def two_sets():
    """Return the sets of kernels that this CPU can run, and put its own back."""
    module = load()
    names, own = module.kernel_sets(), module.kernel_set()
    runnable = names[: names.index(own) + 1]
    if len(runnable) < 2:
        pytest.skip(f"this CPU can run one set of kernels only: {own}")
    yield runnable
    module.use(own)


def bits(tensor):
    """Return the bits of a tensor; those of a NaN beyond its being one do not count."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor = tensor.detach().clone()
    tensor[tensor.isnan()] = torch.nan
    return tensor.view(integers)


def extremes(dtype):
    info = torch.finfo(dtype)
    sizes = [0.0, info.tiny, info.tiny / 2, info.tiny**0.5, info.max**0.5, info.max, torch.inf]
    return torch.tensor([*sizes, *(-size for size in sizes), torch.nan]).to(dtype)


def after_steps(name, case, dtype, **options):
    """Return parameters, state and norms after some steps with one set of kernels."""
    load().use(name)
    tensors = [*drawn(LENGTHS, dtype), extremes(dtype)]
    optimizer = case.ours(parameters(tensors), backend="native", **options)
    found = []
    for step in range(4):
        for i, param in enumerate(members(optimizer)):
            (values,) = drawn([param.shape], dtype, seed=100 * step + i)
            param.grad = extremes(dtype).flip(0) if i == len(LENGTHS) and step == 2 else values
            if "max_grad_norm" in options and i == len(LENGTHS):
                param.grad = None
        optimizer.step()
        if optimizer.grad_norm is not None:
            found.append(optimizer.grad_norm)
    found += [p.detach() for p in members(optimizer)]
    return found + [t for state in held(optimizer) for _, t in state if torch.is_tensor(t)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", KERNELS, ids=name_of)
def test_all_sets_give_the_same_bits(two_sets, case, dtype):
    first, *others = (after_steps(name, case, dtype) for name in two_sets)
    for other in others:
        assert len(first) == len(other)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_all_sets_clip_by_the_same_norm(two_sets, dtype):
    found = [after_steps(name, KERNELS[0], dtype, max_grad_norm=0.5) for name in two_sets]
    for first, other in zip(*found, strict=True):
        assert torch.equal(bits(first), bits(other))


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_all_sets_round_alike(two_sets, dtype):
    values = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    rounded = []
    for name in two_sets:
        load().use(name)
        rounded.append(torch.empty_like(values))
        number = load().dtype_names().index(name_of(dtype))
        load().round(number, values.data_ptr(), rounded[-1].data_ptr(), values.numel())
    assert torch.equal(bits(rounded[0]), bits(rounded[1]))


# ---- symbols and libraries


def need(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@linux
def test_kernels_of_a_set_share_no_symbol_with_other_code(tmp_path):
    """A weak symbol may be merged: an old CPU would then run code of a newer one."""
    need("cmake", "nm", "c++")
    build = tmp_path / "build"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["cmake", "-S", ROOT / "kernels/native", "-B", build, python], **quiet)
    for name in load().kernel_sets():
        subprocess.run(["cmake", "--build", build, "--target", name], **quiet)
        (compiled,) = build.rglob(f"{name}.dir/**/*.o")
        listed = subprocess.run(
            ["nm", "--extern-only", "--defined-only", compiled],
            check=True,
            capture_output=True,
            text=True,
        )
        symbols = [line.split()[1:] for line in listed.stdout.splitlines()]
        assert [symbol for _, symbol in symbols] == [f"_ZN3clr4sets{len(name)}{name}E"]
        assert symbols[0][0] in "RD"


@linux
def test_the_extension_needs_no_openmp_and_no_torch():
    need("readelf")
    dynamic = subprocess.run(
        ["readelf", "-d", load().__file__], check=True, capture_output=True, text=True
    )
    needed = [line.split("[")[1][:-1] for line in dynamic.stdout.splitlines() if "NEEDED" in line]
    assert {name.split(".so")[0] for name in needed} <= {
        "libc", "libm", "libgcc_s", "libstdc++", "ld-linux-x86-64", "ld-linux-aarch64",
    }  # fmt: skip


# ---- one pool of threads

COUNTING = """
    import os, sys

    def threads():
        return len(os.listdir("/proc/self/task"))

    def runtimes():
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if ".so" in line}
        return {file for file in files if "omp" in os.path.basename(file)}
"""


def printed(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COUNTING) + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@linux
@pytest.mark.parametrize("order", [1, -1], ids=["kernels first", "torch first"])
def test_one_pool_shared_with_torch(order):
    """Count the threads. torch's file must be the only OpenMP runtime in the process."""
    code = f"""
        import torch
        from clr_optim import CyclicalOptimizer
        from clr_optim.kernels.native import describe
        param = torch.nn.Parameter(torch.empty(1 << 20))  # torch fills in parallel
        param.grad = torch.empty(1 << 20)
        torch.set_num_threads(4)
        opt = CyclicalOptimizer(torch.optim.SGD([param]), backend="native")
        first, second = [opt.step, lambda: torch.ones(1 << 20)][::{order}]
        base = threads()
        first()
        assert threads() == base + 3
        second(), first()
        print(threads() - base, len(runtimes()), describe()["openmp"] in runtimes())
    """
    assert printed(code) == ["3", "1", "True"]


@linux
def test_one_pool_where_the_runtime_has_a_hashed_name(tmp_path):
    """CUDA wheels rename their OpenMP; a library linked against such a copy replaces torch here."""
    need("c++")
    real = Path(openmp.share_openmp())
    if "gomp" not in real.name:
        pytest.skip(f"torch uses {real.name}")
    name = "libgomp-" + "a" * (len(real.name) - 11) + ".so"  # of the same length, so no table moves
    copy, host, source = tmp_path / name, tmp_path / "torch.so", tmp_path / "host.cpp"
    copy.write_bytes(real.read_bytes().replace(f"{real.name}\0".encode(), f"{name}\0".encode()))
    source.write_text(
        'extern "C" int omp_get_max_threads();\n'
        'extern "C" int most() { return omp_get_max_threads(); }\n'
    )
    flags = ["-shared", "-fPIC", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run(["c++", *flags, source, copy, "-o", host], check=True)
    code = """
        import ctypes, importlib.util, types
        host, openmp_py, extension = sys.argv[1:]
        torch = sys.modules["torch"] = types.ModuleType("torch")
        torch._C = types.SimpleNamespace(__file__=host)
        assert not runtimes()

        def imported(name, file):
            spec = importlib.util.spec_from_file_location(name, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module

        print(imported("openmp", openmp_py).share_openmp())
        print(*runtimes())
        print(imported("module", extension).kernel_set())
        print(*runtimes())
    """
    answers = printed(code, host, openmp.__file__, load().__file__)
    assert answers == [str(copy), str(copy), load().kernel_sets()[0], str(copy)]


def test_the_extension_is_one_for_every_python():
    """The name tells the limited API. A name with this version in it would serve one alone."""
    assert load().__file__.endswith(".abi3.so")
    assert os.path.basename(load().__file__) != f"module{sysconfig.get_config_var('EXT_SUFFIX')}"


# ---- imports


def test_a_second_import_in_one_process_serves_older_optimizers():
    """Code that empties sys.modules, as reloading tools do, imports the extension again."""
    code = """
        import sys
        import torch
        from clr_optim import CyclicalOptimizer

        def made(make):
            p = torch.nn.Parameter(torch.ones(3))
            opt = make(torch.optim.Adam([p], lr=0.1), backend="native")
            p.grad = torch.ones(3)
            opt.step()
            return opt

        old = made(CyclicalOptimizer)
        for name in [each for each in sys.modules if each.split(".")[0] == "clr_optim"]:
            del sys.modules[name]
        from clr_optim import CyclicalOptimizer as Again
        assert Again is not CyclicalOptimizer
        new = made(Again)
        for opt in (old, new, old):
            p = torch.nn.Parameter(torch.ones(3))
            opt.add_param_group({"params": [p]})
            p.grad = torch.ones(3)
            opt.step()
            assert p[0] < 1.0
        print(old.explain(), new.explain())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout.count("native:") == 2
