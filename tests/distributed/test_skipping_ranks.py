"""``skip_above`` over ranks: one decision for all, and statistics in distributed checkpoints."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_training import loss_of_share
from test_distributed_checkpoint import (
    WAYS,
    _course,
    _model,
    _other_start,
    _read,
    _start,
    _values,
    _write,
)
from torch import nn

from clr_optim import Spike

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

SPIKE = Spike(sigmas=8.0, window=8)
STEPS = 500


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _try(model: Any, opt: Any, number: int, bad: str | None, sharded: bool = True) -> None:
    """Take a step; a bad one has a bad number on the last rank alone, or on all without shards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    opt.zero_grad()
    loss_of_share(model, number, rank, world).backward()
    if bad is not None and (rank == world - 1 or not sharded):
        for p in model.parameters():
            part = None if p.grad is None else _local(p.grad)
            if part is not None and part.numel():
                part.view(-1)[0] = 1e7 if bad == "spike" else float(bad)
                break
    opt.step()


def _plain_model(how: str) -> Any:
    from sharded_training import Model

    return nn.parallel.DistributedDataParallel(Model()) if how == "ddp" else _model(True)


def _both(how: str, name: str, backend: str, skip_above: Any, clip: float | None) -> Any:
    """Run with bad tries and without; return both ends, and the numbers of skipped tries."""
    from native_helpers import BY_NAME

    warnings.filterwarnings("ignore", "skip_above=", UserWarning)
    ends = []
    chance = random.Random(9)
    tries = []
    for number in range(STEPS):
        while number > 12 and chance.random() < 0.15:
            tries.append((number, chance.choice(["nan", "inf", "spike"])))
        tries.append((number, None))
    for skips in (True, False):
        model = _plain_model(how)
        opt = BY_NAME[name].ours(
            model.parameters(), backend=backend, step_size_up=3, max_grad_norm=clip,
            skip_above=skip_above if skips else None,
        )  # fmt: skip
        for number, bad in tries:
            if bad is None or skips:
                _try(model, opt, number, bad, how != "ddp")
        statistics = opt.state_dict()["param_groups"][0].get("clr_skips")
        ends.append((opt.iteration, opt.skipped, statistics, _values(opt)))
    return ends, sum(bad is not None for _, bad in tries)


@pytest.mark.parametrize("how", ["fsdp2", "ddp"])
@pytest.mark.parametrize(
    ("name", "backend", "skip_above", "clip"),
    [
        ("adamw-ams", "native", SPIKE, None), ("sgd-nest-wd", "native", 1e4, 0.5),
        ("adamw-ams", "torch", SPIKE, 0.5),
    ],
)  # fmt: skip
def test_what_one_rank_finds_is_skipped_by_all(ranks, how, name, backend, skip_above, clip):
    results = ranks.run(2, _both, how, name, backend, skip_above, clip)
    for (
        (iteration, skipped, statistics, ours),
        (_, none, no_statistics, expected),
    ), bad in results:
        assert iteration == STEPS
        assert skipped == bad > 30
        assert (none, no_statistics) == (0, None)
        assert statistics == results[0][0][0][2]
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=0.0)


def _save_and_load(folder: str, name: str, backend: str, way: str) -> Any:
    """Save in the middle of a row of skips; load into a fresh optimizer; go on with both."""
    runs = []
    for resumed in (False, True):
        if resumed:
            model, opt = _other_start(name, backend, skip_above=SPIKE)
            _read(way, model, opt, folder)
        else:
            model, opt = _start(name, backend, skip_above=SPIKE)
            for number in range(15):
                _try(model, opt, number, None)
            for bad in ("spike", "nan", "spike"):
                _try(model, opt, 15, bad)
            future = _write(way, model, opt, folder)
            if future is not None:
                future.result()
        opt.state_dict()
        there = _course(opt)
        for number in range(15, 20):
            _try(model, opt, number, "spike")
            _try(model, opt, number, None)
        opt.state_dict()
        runs.append((there, _course(opt), _values(opt)))
    return runs


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("way", WAYS)
def test_distributed_checkpoints_carry_the_statistics(ranks, tmp_path, way, backend):
    args = str(tmp_path / "checkpoint"), "adamw-ams", backend, way
    for saved, resumed in ranks.run(2, _save_and_load, *args):
        skips = saved[0]["clr"][0]["clr_skips"]
        assert skips[0] == 15.0
        assert skips[3:] == [2.0, 3.0]
        assert saved[:2] == resumed[:2]
        torch.testing.assert_close(saved[2], resumed[2], rtol=0.0, atol=0.0)
