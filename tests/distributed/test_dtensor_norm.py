"""Ranks agree on the gradients' norm, on steps at rate 0, and on what no kernel serves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dtensor_helpers import Pair, dtensors, local, spread
from native_helpers import BY_NAME, failure, members
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
)

BOTH = pytest.mark.parametrize("backend", ["native", "torch"])


# ---- the norm, and the ranks that take part


def _several_meshes(world: int) -> list[tuple[tuple[int, ...], Any, list[Any]]]:
    line = init_device_mesh("cpu", (world,))
    named = init_device_mesh("cpu", (world,), mesh_dim_names=("named",))
    flat = init_device_mesh("cpu", (world, 1))
    return [
        ((4, 3), None, []),
        ((5, 3), line, [Shard(0)]),
        ((4,), line, [Replicate()]),
        ((1,), named, [Shard(0)]),
        ((3, 5), named, [Shard(1)]),
        ((7,), flat, [Shard(0), Replicate()]),
        ((7,), flat, [Shard(0), Shard(0)]),
        ((2, 2), flat, [Replicate(), Replicate()]),
    ]


def _clipped(
    backends: Sequence[str],
    dtype: torch.dtype,
    missing: Sequence[tuple[int, int]] = (),
    spaced: Sequence[int] = (),
    huge: float = 1.0,
) -> tuple[Any, ...]:
    """Return for each step the norm, the expected norm and the norm's dtype.

    Args:
        backends: one per rank.
        dtype: of all parameters.
        missing: ``(rank, number of the parameter)`` of each missing gradient.
        spaced: ranks on which a gradient has gaps in memory, which no kernel takes.
        huge: the value of one element of a gradient, on one rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    layouts = _several_meshes(world)
    idle = [i for r, i in missing if r == rank]

    def make() -> list[Any]:
        drawn = [torch.ones(shape, dtype=dtype) for shape, _, _ in layouts]
        return [
            nn.Parameter(x if mesh is None else spread(x, mesh, *places))
            for x, (_, mesh, places) in zip(drawn, layouts, strict=True)
        ]

    pair = Pair(BY_NAME["adamw-ams"], make, backend=backends[rank], max_grad_norm=0.5)
    answers = []
    for _ in range(3):
        pair.draw(idle)
        for p, q in zip(members(pair.ours), members(pair.twin), strict=True):
            if p.grad is not None and p.shape == (5, 3) and rank == world - 1:
                for grad in (p.grad, q.grad):
                    grad._local_tensor[0, 0] = huge
        squares = torch.zeros(len(layouts), dtype=torch.float64)
        for i, p in enumerate(members(pair.ours)):
            if p.grad is not None:
                squares[i] = local(p.grad).double().square().sum()
        everywhere = squares.clone()
        dist.all_reduce(everywhere)
        whole = [
            mesh is None or not any(p.is_shard() for p in places) for _, mesh, places in layouts
        ]
        norm = torch.where(torch.tensor(whole), squares, everywhere).sum().sqrt()
        for q in members(pair.twin):
            if q.grad is not None:
                local(q.grad).mul_(torch.clamp(0.5 / (norm + 1e-6), max=1.0))
        if rank in spaced:
            for p in members(pair.ours)[:2]:
                part = local(p.grad)
                gaps = torch.stack([part, part], dim=-1)[..., 0]
                if isinstance(p, DTensor):
                    p.grad._local_tensor = gaps
                else:
                    p.grad = gaps
        mine = [p.grad for p in members(pair.ours)]
        kept = [None if g is None else local(g).clone() for g in mine]
        if dtype == torch.bfloat16:  # torch rounds the clipping factors in bfloat16
            pair.ours.step()
        else:
            pair.step(1e-12 if dtype == torch.float64 else 1e-4)  # float32 sums cancel
        for p, grad, values in zip(members(pair.ours), mine, kept, strict=True):
            assert p.grad is grad
            assert grad is None or torch.equal(local(grad).nan_to_num(), values.nan_to_num())
        answers.append((pair.ours.grad_norm.item(), norm.item(), str(pair.ours.grad_norm.dtype)))
    return tuple(answers)


def _assert_norms(results: list[Any], rel: float, *, exactly: bool = True) -> None:
    for result in results:
        for (norm, expected, dtype), (first, _, first_dtype) in zip(
            result, results[0], strict=True
        ):
            assert norm == pytest.approx(expected, rel=rel, nan_ok=True)
            assert dtype == first_dtype
            assert norm == first if exactly else norm == pytest.approx(first, rel=rel)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@BOTH
def test_the_norm_over_several_meshes_and_plain_tensors(ranks, backend, dtype, world):
    results = ranks.run(world, _clipped, [backend] * 3, dtype)
    _assert_norms(results, 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("huge", [float("inf"), float("nan"), 1e30])
@BOTH
def test_a_norm_that_is_not_finite(ranks, backend, huge):
    """One rank's part is not finite, and every rank must notice.

    1e30 squared overflows float32 only.
    """
    results = ranks.run(2, _clipped, [backend] * 2, torch.float64, (), (), huge)
    expected = [answer[1] for answer in results[0]]
    for result in results:
        assert [answer[0] for answer in result] == pytest.approx(expected, nan_ok=True)


#: Missing gradients: one, all sharded ones of a rank, or different ones on each rank.
MISSING = {
    "one": [(1, 1)],
    "sharded": [(1, i) for i in (1, 3, 4, 5, 6)],
    "different": [(0, 1), (1, 4), (1, 6)],
}


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@BOTH
def test_ranks_without_some_gradients_join_the_norm(ranks, backend, missing):
    results = ranks.run(2, _clipped, [backend] * 2, torch.float32, missing)
    _assert_norms(results, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@BOTH
def test_a_rank_without_any_gradient_joins_the_norm(ranks, backend, dtype):
    missing = [(1, i) for i in range(8)]
    results = ranks.run(2, _clipped, [backend] * 2, dtype, missing)
    assert [r[0][2] for r in results] == [str(dtype)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backends", "spaced"),
    [(("auto", "auto"), (1,)), (("native", "torch"), ()), (("torch", "auto"), (1,))],
    ids=["rest", "backends", "both"],
)
def test_ranks_on_different_paths_make_the_same_collectives(ranks, backends, spaced, dtype):
    """The ranks come to the same norm. Otherwise their copies of one parameter would differ."""
    results = ranks.run(2, _clipped, backends, dtype, (), spaced)
    _assert_norms(results, 1e-6, exactly=False)


def _elsewhere(backend: str, max_norm: float | None) -> tuple[list[float], list[float]]:
    """Step a parameter on a mesh of the first rank alone, as between stages of a pipeline."""
    mesh, first = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [0])
    part = spread(torch.ones(2), first, Shard(0))
    params = [nn.Parameter(spread(torch.ones(4), mesh, Shard(0))), nn.Parameter(part)]
    opt = BY_NAME["sgd-wd"].ours(params, backend=backend, max_grad_norm=max_norm)
    for _ in range(2):
        params[0].grad = torch.ones_like(params[0])
        if dist.get_rank() == 0:
            params[1].grad = torch.ones_like(params[1])
        opt.step()
    return [local(p).tolist() for p in params]


@pytest.mark.parametrize("max_norm", [None, 100.0], ids=["", "clipped"])
@BOTH
def test_a_mesh_without_this_rank(ranks, backend, max_norm):
    with_it, without = ranks.run(2, _elsewhere, backend, max_norm)
    assert with_it[0] == without[0]
    assert with_it[1] == with_it[0]
    assert without[1] == []


# ---- steps at rate 0


def _at_zero(zero: bool, missing: bool) -> list[int]:
    """Return the positions after steps at rate 0. The first rank's gradients are always 0."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    params = dtensors(mesh)
    opt = BY_NAME["adam-wd"].ours(params, max_grad_norm=1.0)
    positions = []
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = torch.zeros_like(p)
            if rank == 1 and not zero and isinstance(p, DTensor):
                local(p.grad).fill_(1.0)
            if missing and rank == i % 2:
                p.grad = None
        for group in opt.param_groups:
            group["lr"] = 0.0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lr was written from outside")
            opt.step()
        positions.append(opt.iteration)
    return positions


@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("zero", [True, False])
def test_ranks_agree_on_steps_at_rate_zero(ranks, zero, missing):
    """A checkpointer's step has gradients of 0 on every rank."""
    expected = [0, 0] if zero else [1, 2]
    assert ranks.run(2, _at_zero, zero, missing) == [expected] * 2


# ---- what no kernel serves


def _summands() -> tuple[str, str]:
    """Return ``(explain(), error of the kernel)`` of a parameter whose ranks hold summands."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> list[Any]:
        values = torch.ones(3, dtype=torch.float64)
        part = DTensor.from_local(values, mesh, [Partial()], run_check=False)
        return [nn.Parameter(part), nn.Parameter(spread(values.clone(), mesh, Shard(0)))]

    opt = BY_NAME["sgd-wd"].ours(make(), backend="native", max_grad_norm=1.0)
    for p in members(opt):
        p.grad = torch.ones_like(p)
    before = [local(p).clone() for p in members(opt)]
    error = failure(lambda opt: opt.step(), opt)
    assert isinstance(error, RuntimeError), error
    assert opt.iteration == 0
    assert all(torch.equal(local(p), q) for p, q in zip(members(opt), before, strict=True))
    pair = Pair(BY_NAME["sgd-wd"], make)
    for own in (pair.ours, pair.twin):
        for p in members(own):
            p.grad = torch.ones_like(p)
    pair.step()
    return opt.explain(), str(error)


def test_a_forced_kernel_says_why_it_cannot(ranks):
    for explained, error in ranks.run(2, _summands):
        assert explained.splitlines() == [
            "torch: 1 parameter tensors, 3 values, SGD: DTensors whose ranks hold summands",
            "native: 1 parameter tensors, 3 values, SGD: asked for by backend='native'",
        ]
        assert "backend='native' cannot serve 1 of the parameters: DTensors whose" in error
