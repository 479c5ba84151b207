"""Refusals of the Triton backend, its needs (a compiler, Triton itself), and DTensors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import sharded_training
import torch
from native_helpers import BY_NAME, members, parameters, tensors_of, wrapped
from triton_helpers import DEVICE, INTERPRETED, MARKS, RUNS, choose_triton, drawn, on_gpus, twins

from clr_optim import CyclicalOptimizer

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-cycled"])
@pytest.mark.skipif(RUNS and not INTERPRETED, reason="the ranks' tensors are on the CPU")
def test_a_ranks_part_of_dtensors(ranks, name, max_norm):
    expected, norms = sharded_training.reference(BY_NAME[name], max_norm)
    for result in ranks.run(2, sharded_training.train, name, "fsdp", "triton", max_norm):
        assert result["backends"] == {"triton"}
        assert result["norms"] == pytest.approx(norms, rel=1e-5)
        for ours, reference in zip(result["params"], expected, strict=True):
            torch.testing.assert_close(ours, reference)


@pytest.mark.skipif(RUNS and not INTERPRETED, reason="the ranks' tensors are on the CPU")
def test_the_norm_on_a_rank_without_gradients(ranks):
    found = ranks.run(2, sharded_training.norm_of_the_first_ranks_gradient, "triton")
    assert found == [pytest.approx(12**0.5)] * 2


@on_gpus
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-wd"])
def test_dtensors_on_a_gpu(name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = BY_NAME[name]
    dist = torch.distributed
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        torch.manual_seed(0)
        plain = torch.nn.Linear(70, 30).to(DEVICE)
        sharded = copy.deepcopy(plain)
        fully_shard(sharded, mesh=init_device_mesh("cuda", (1,)))
        ours = case.ours(sharded.parameters(), backend="triton", max_grad_norm=0.5)
        twin = case.ours(plain.parameters(), backend="torch", max_grad_norm=0.5)
        for _ in range(4):
            x = torch.randn(8, 70, device=DEVICE)
            for model, opt in ((sharded, ours), (plain, twin)):
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
        for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
    finally:
        dist.destroy_process_group()


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inner = torch.optim.SGD(parameters([torch.ones(3)]), lr=0.1)
    groups = str(inner.param_groups)
    with pytest.raises(ValueError, match=r"(?s)'triton' cannot serve SGD: .* on cpu, .*INTERPRET"):
        CyclicalOptimizer(inner, backend="triton")
    assert str(inner.param_groups) == groups


def test_the_host_knows_where_a_kernels_own_scalars_begin():
    from clr_optim.backends.triton import clock
    from clr_optim.kernels.triton import prepare

    assert len(prepare.GROUP) == clock.OWN


def test_a_triton_that_cannot_compile_is_a_build_error(monkeypatch):
    from clr_optim.backends.triton import NoKernelsError, try_out
    from clr_optim.kernels.triton import gate

    class Broken:
        def __getitem__(self, grid):
            raise OSError("fatal error: Python.h: No such file or directory\nmore")

    try_out(DEVICE)
    monkeypatch.setattr(gate, "open_gate", Broken())
    with pytest.raises(
        NoKernelsError, match=r"Triton on .*: OSError: fatal error: Python\.h.*directory$"
    ):
        try_out(DEVICE)


def test_by_name_it_refuses_other_optimizers():
    inner = torch.optim.ASGD(parameters(drawn([(3,)], torch.float32)))
    with pytest.raises(ValueError, match="'triton' cannot serve ASGD: no fused kernel for ASGD"):
        CyclicalOptimizer(inner, backend="triton")


def test_by_name_it_refuses_what_only_torch_can_do_and_changes_nothing():
    pair = twins(BY_NAME["sgd-mom"])
    pair.run(2)
    pair.draw()
    p = members(pair.ours)[0]
    good = p.grad
    p.grad = good.t().contiguous().t()
    before = copy.deepcopy(tensors_of(pair.ours))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'triton' cannot serve 1 .*another layout"):
            pair.ours.step()
    assert pair.ours.iteration == 2
    assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())
    p.grad = good
    pair.step()
    pair.run(2)


def test_explain_names_it():
    opt = wrapped(torch.optim.Adam(parameters(drawn([(3,)], torch.float32))), backend="triton")
    assert opt.explain().startswith("triton: 1 parameter tensors, 3 values, Adam")


WITHOUT_TRITON = """
import importlib.util, torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else found(name, *more)
from clr_optim import CyclicalOptimizer
try:
    CyclicalOptimizer(torch.optim.SGD([torch.ones(1)], lr=0.1), backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton_it_says_how_to_get_it():
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=dict(os.environ), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "Triton is not installed: pip install" in out.stdout
