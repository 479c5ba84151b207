"""Prebound launches, without a driver of a GPU and with a stub that runs nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stub_helpers
import torch
from places import TESTS

from clr_optim import CyclicalOptimizer
from clr_optim.backends.native import library
from clr_optim.plan import Plan
from clr_optim.rules import RULES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return an environment whose processes find the stub driver."""
    why_not = stub_helpers.why_not_built()
    if why_not:
        pytest.skip(why_not)
    folder = tmp_path_factory.mktemp("stub")
    stub_helpers.build(folder)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(TESTS), kept.get("PYTHONPATH")]))
    return {
        **kept,
        "PYTHONPATH": path,
        stub_helpers.FOLDER: str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }


@pytest.mark.parametrize("name", ["on_stub_launches", "on_stub_bindings", "on_stub_triton"])
def test_on_the_stub(environment, name):
    # The tests' conftest.py asks torch for a GPU, and a CUDA build of torch asks the stub.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / f"{name}.py")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without a GPU's driver")
def test_without_a_driver_there_are_no_launches():
    with pytest.raises(RuntimeError, match="no driver of a GPU is loaded"):
        library().Launches(0, [])


def test_a_plan_that_needs_launches_runs_no_kernel_of_the_cpu(native_kernels):
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    inner = torch.optim.SGD([param], lr=0.1)
    opt = CyclicalOptimizer(inner, backend="native")
    for capturable, outcome in ((True, "UNSERVED"), (False, "OUT_OF_VALUES")):
        plan = Plan(inner, RULES[torch.optim.SGD], library(), "cpu", capturable=capturable)
        plan.refresh()
        assert plan.buckets
        assert plan.native.step(vars(opt)) == getattr(library(), outcome)
    assert not param.any()
