"""The compiled Triton kernels, for GPUs that this machine need not have."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from cases import EVERY_KERNEL, Problem
from native_helpers import NUMBERS

from clr_optim.kernels.triton import report
from clr_optim.rules import KERNELS

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def slots_of(case):
    """Return the number of state tensors that torch keeps in a parameter's shape."""
    problem = Problem(case)
    optimizer = case.make(problem.params)
    problem.step(optimizer, 0)
    state = optimizer.state.get(problem.params[0], {})
    return sum(value is not None for name, value in state.items() if name not in NUMBERS)


SLOTS = {case.kernel: slots_of(case) for case in EVERY_KERNEL}

# An SM has 65536 registers: it then runs four programs of 256 threads at a time, or three.
MOST_REGISTERS = {"float32": 64, "bfloat16": 64, "float16": 64, "float64": 80}


def run(*arguments):
    """Run Python in a separate process, where Triton does not interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def compiled(request, tmp_path_factory):
    """Return a target, the rows of its report by rule and dtype, and the printed text."""
    path = tmp_path_factory.mktemp("report") / "rows.json"
    done = run("-m", report.__name__, "--target", request.param, "--json", path)
    assert not done.returncode, done.stderr
    rows = json.loads(path.read_text())
    return request.param, {(row["rule"], row["dtype"]): row for row in rows}, done.stdout


@needs_triton
@pytest.mark.parametrize("dtype", report.DTYPES)
@pytest.mark.parametrize("rule", KERNELS)
def test_registers_suffice_and_accesses_are_wide(compiled, rule, dtype):
    target, rows, _ = compiled
    row = rows[rule, dtype]
    assert row["stack"] == row["spills"] == 0
    assert row["registers"] > 0
    if target.startswith("sm"):
        assert row["registers"] <= MOST_REGISTERS[dtype]
        assert (row["float64"] > 0) == (dtype == "float64")
    assert 4 < row["per_element"] < 300
    assert row["loads_narrow"] == row["stores_narrow"] == 0
    # Parameter, gradient and state, several times if the compiler unrolled the loop.
    times, rest = divmod(row["loads_16b"], 2 + SLOTS[rule])
    assert times >= 1
    assert rest == 0
    assert row["stores_16b"] == times * (1 + SLOTS[rule])


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_averages_take_no_stack_and_wide_accesses(target):
    """The rules with the fewest and the most state, which need the fewest and most registers."""
    code = f"""
        import json
        from clr_optim.kernels.triton import report
        names = ("sgd", "adam_amsgrad")
        report.KERNELS = {{name: report.KERNELS[name] for name in names}}
        rows = list(report.rows({target!r}, "own"))
        report.DTYPES = ("bfloat16", "float16")
        print(json.dumps([rows, list(report.rows({target!r}, "float32"))]))
    """
    done = run("-c", "if True:" + code)
    assert not done.returncode, done.stderr
    for wide, rows in enumerate(json.loads(done.stdout)):
        assert len(rows) == (4 if wide else 8)
        for row in rows:
            assert row["stack"] == row["spills"] == 0
            if target.startswith("sm"):
                assert row["registers"] <= 80  # three programs of 256 threads at a time
                assert (row["float64"] > 0) == (row["dtype"] == "float64")
            # A 16-bit parameter takes half the bytes of its float32 average.
            assert row["stores_narrow"] == 0
            assert row["loads_narrow"] <= wide
            assert row["stores_16b"] >= 2 + SLOTS[row["rule"]]


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_masters_take_no_stack_and_wide_accesses(target, tmp_path):
    path = tmp_path / "rows.json"
    done = run("-m", report.__name__, "--target", target, "--masters", "--json", path)
    assert not done.returncode, done.stderr
    rows = json.loads(path.read_text())
    assert [(row["rule"], row["dtype"]) for row in rows] == [(rule, "bfloat16") for rule in KERNELS]
    for row in rows:
        slots = SLOTS[row["rule"]]
        assert row["stack"] == row["spills"] == 0
        assert row["loads_narrow"] == row["stores_narrow"] == 0
        assert 4 < row["per_element"] < 300
        if target.startswith("sm"):
            # An SM runs four programs of 256 threads at a time, and three with most state.
            assert row["registers"] <= (80 if slots == 3 else 64)
            assert row["float64"] == 0
        # With little state a thread reads 16 bytes of each 16-bit tensor: 32 bytes of float32.
        of_state = 2 * slots if slots < 2 else slots
        times, rest = divmod(row["loads_16b"], 3 + of_state)
        assert times >= 1
        assert rest == 0
        assert row["stores_16b"] == times * (2 + of_state)


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_averages_of_masters_take_no_stack(target):
    """The rules with the fewest and the most state."""
    code = f"""
        import json
        from clr_optim.kernels.triton import report
        names = ("sgd", "adam_amsgrad")
        report.KERNELS = {{name: report.KERNELS[name] for name in names}}
        print(json.dumps(list(report.rows({target!r}, "float32", masters=True))))
    """
    done = run("-c", "if True:" + code)
    assert not done.returncode, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 2
    for row in rows:
        assert row["stack"] == row["spills"] == row["stores_narrow"] == 0
        if target.startswith("sm"):
            assert row["registers"] <= 80
            assert row["float64"] == 0
        # Parameter and rest take half the bytes of the float32 average.
        assert row["loads_narrow"] <= 2


@needs_triton
def test_every_kernel_is_in_the_table(compiled):
    _, rows, printed = compiled
    assert list(rows) == [(rule, dtype) for rule in KERNELS for dtype in report.DTYPES]
    shown = [line.split() for line in printed.splitlines()]
    assert shown == [
        list(rows["sgd", "float32"]),
        *([*map(str, r.values())] for r in rows.values()),
    ]


@needs_triton
def test_narrow_accesses_and_spills_are_seen(tmp_path):
    # A separate cache: Triton's key does not tell a patched kernel from the others.
    code = f"""
        import os
        os.environ["TRITON_CACHE_DIR"] = {str(tmp_path)!r}
        from clr_optim.kernels.triton import multi_tensor, report
        report.KERNELS = {{"adam": report.KERNELS["adam"]}}
        report.DTYPES = ("float32",)
        import triton.language as tl
        multiple_of = tl.multiple_of
        tl.multiple_of = tl.core.builtin(lambda input, values, _semantic=None: input)
        print(*next(report.rows("sm_90")).values())
        print(*next(report.rows("gfx942")).values())
        tl.multiple_of = multiple_of
        constants_for = multi_tensor.constants_for
        def few_registers(*a):
            found = constants_for(*a)
            found.multi_tensor["maxnreg"] = 32
            return found
        multi_tensor.constants_for = few_registers
        print(*next(report.rows("sm_90")).values())
    """
    done = run("-c", "if True:" + code)
    assert not done.returncode, done.stderr
    cuda, amd, spilled = (list(map(float, line.split()[2:])) for line in done.stdout.splitlines())
    assert cuda[3:7] == [0, 4 * 4, 0, 4 * 3]  # four elements per thread, each by itself
    assert amd[3] == amd[5] == 0
    assert amd[4] >= 4
    assert amd[6] >= 3
    assert spilled[0] <= 32
    assert spilled[1] > 0
    assert spilled[2] > 0
    assert spilled[3:7] == [4, 0, 3, 0]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        report.main(arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("target", ["sm_", "sm_90a", "gfx", "cuda:90", "h200", ""])
def test_unknown_target(capsys, monkeypatch, target):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = f"target '{target}' is neither sm_NN (NVIDIA) nor gfxNNN (AMD)"
    assert message in refused(capsys, "--target", target)


def test_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in refused(capsys, "--target", "sm_90")


def test_without_triton(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in refused(capsys, "--target", "sm_90")


@needs_triton
def test_what_cannot_be_compiled_or_counted():
    code = """
        import os
        from clr_optim.kernels.triton import report
        def refused(target):
            try:
                next(report.rows(target))
            except report.ReportError as error:
                print(error)
        refused("sm_42")
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
        refused("sm_90")
    """
    done = run("-c", "if True:" + code)
    assert not done.returncode, done.stderr
    unknown, uncounted = done.stdout.splitlines()
    assert unknown.startswith("sgd of float32 does not compile for sm_42")
    assert "'sm_42' is not defined" in unknown
    assert "is TRITON_DISABLE_LINE_INFO set?" in uncounted


# Count launches and compilations instead of doing them: Triton decides before both what to compile.
LAUNCHES = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import clr_optim.backends
from clr_optim import CyclicalOptimizer

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

class Kernel:
    function, packed_metadata = 0, None
    launch_metadata = staticmethod(lambda *arguments: None)
    run = staticmethod(lambda *arguments: launched.append(arguments[:3]))

def compile_(self, key, signature, device, constexprs, options, *rest):
    assert options.enable_fp_fusion is False  # the rules name each fused operation
    compiled.append(self.fn.__name__)
    self.device_caches[0][0][key] = Kernel()
    return Kernel()

compiled, launched = [], []
driver.set_active(Driver())
JITFunction._do_compile = compile_
clr_optim.backends.triton.here.is_interpreted = lambda: True

params = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 16, 1024, 3000, 70_000)]
opt = CyclicalOptimizer(
    torch.optim.AdamW(params, lr=0.1), "exp_range", step_size_up=7, backend="triton"
)
clipped = CyclicalOptimizer(
    torch.optim.AdamW(params, lr=0.1), step_size_up=3, max_grad_norm=0.5, backend="triton"
)
for k in range(1000):
    for i, p in enumerate(params):
        p.grad = None if (k + i) % 5 == 0 else torch.ones_like(p)
    group = opt.param_groups[0]
    group["betas"], group["weight_decay"] = (0.5 + k / 4000, 0.99), (k % 3) * 0.25
    group["eps"] = 1e-8 * (1 + k)
    if k % 100 == 16:
        opt.set_bounds(base_lr=16.0, max_lr=16.0 * (1 + k))
        opt.set_iteration(16 * k)
    opt.step()
    clipped.step()
print(sorted(compiled), len(launched))
"""


@needs_triton
def test_nothing_is_compiled_anew_as_scalars_and_gradients_change():
    done = run("-c", LAUNCHES)
    assert not done.returncode, done.stderr
    # Each optimizer launches one kernel per step. The clipping one also sums squares and fills the
    # gate. Each fills its open gate once.
    kernels = ["open_gate", "open_gate", "sum_of_squares", "whole_step"]
    assert done.stdout == f"{kernels} 4002\n"
