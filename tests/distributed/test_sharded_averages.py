"""Averages of sharded parameters: in training, in the model, and across distributed checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from native_helpers import BY_NAME
from sharded_training import Model, loss_of_share, mesh_of_all, whole_copy, wrap_case

from clr_optim import CycleEnd, Ema

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

SAVED, MORE = 8, 7
AVERAGES = {"ema": Ema(0.75), "wide": Ema(0.75, 2, dtype=torch.float32), "cycle_end": CycleEnd()}


def _start(name: str, backend: str, average: str) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    model: Any = Model()
    if average == "wide":
        model.to(torch.bfloat16)
    mesh = mesh_of_all()
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = wrap_case(BY_NAME[name], model.parameters(), backend, average=AVERAGES[average])
    return model, opt


def _trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def _train(model: Any, opt: Any, first: int, steps: int, means: Any = None) -> Any:
    """Train; return the averages by hand, from whole parameters."""
    kept = opt._shared.settings.average
    for step in range(first, first + steps):
        opt.zero_grad()
        dtype = next(model.parameters()).dtype
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 5, generator=generator).to(dtype)
        if dtype is torch.float32:
            loss_of_share(model, step, dist.get_rank(), dist.get_world_size()).backward()
        else:
            model(x).square().mean().backward()
        opt.step()
        is_due = (step + 1) % 6 == 0 if isinstance(kept, CycleEnd) else (step + 1) % kept.every == 0
        if is_due:
            now = [whole_copy(p).float() for p in _trainable(model)]
            count = (step + 1) // 6
            weight = 1 / count if isinstance(kept, CycleEnd) else 1 - kept.decay
            means = now if means is None else [
                torch.lerp(mean, p, weight) for mean, p in zip(means, now, strict=True)
            ]  # fmt: skip
    return means


def _averages(model: Any, opt: Any) -> list[Any]:
    return [whole_copy(opt.state[p]["clr_average"]) for p in _trainable(model)]


def _close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-6, atol=1e-6)


def _run(name: str, backend: str, average: str, folder: str) -> dict[str, Any]:
    """Train, save in the middle, load into a fresh optimizer, and train on in both."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, opt = _start(name, backend, average)
    means = _train(model, opt, 0, SAVED)
    _close(_averages(model, opt), means)
    model_dict, opt_dict = get_state_dict(model, opt)
    dcp.save({"model": model_dict, "opt": opt_dict}, checkpoint_id=folder)

    other, fresh = _start(name, backend, average)
    values = dict(zip(("model", "opt"), get_state_dict(other, fresh), strict=True))
    assert all("clr_average" in fresh.state[p] for p in _trainable(other))
    dcp.load(values, checkpoint_id=folder)
    set_state_dict(other, fresh, model_state_dict=values["model"], optim_state_dict=values["opt"])
    loaded = _averages(other, fresh)
    count = fresh.state_dict()["param_groups"][0]["clr_averages"]

    own = [whole_copy(p) for p in _trainable(model)]
    with opt.averaged():
        within = [whole_copy(p) for p in _trainable(model)]
        state = {name: whole_copy(value) for name, value in model.state_dict().items()}
    restored = all(
        torch.equal(a, whole_copy(p)) for a, p in zip(own, _trainable(model), strict=True)
    )
    outside = opt.averaged_state_dict(model)
    same = all(torch.equal(whole_copy(outside[name]), value) for name, value in state.items())
    means = _train(model, opt, SAVED, MORE, means)
    _close(_averages(model, opt), means)
    _train(other, fresh, SAVED, MORE)
    return {
        "saved": within,
        "loaded": loaded,
        "count": count,
        "restored": restored,
        "same": same,
        "ends": [_averages(each, by) for each, by in ((model, opt), (other, fresh))],
        "dtypes": {value.dtype for value in loaded},
    }


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_averages_of_shards_across_a_checkpoint(ranks, tmp_path, world, backend, average):
    folder = str(tmp_path / "checkpoint")
    results = ranks.run(world, _run, "sgd-mom", backend, average, folder)
    first = results[0]
    for result in results:
        taken = {"ema": SAVED, "wide": SAVED // 2, "cycle_end": 1}[average]
        assert result["count"] == [taken, SAVED]
        assert result["restored"]
        assert result["same"]
        assert result["dtypes"] == {torch.float32}
        for saved, loaded in zip(first["saved"], result["loaded"], strict=True):
            assert torch.equal(saved, loaded.to(saved.dtype))
        for one, other in zip(*result["ends"], strict=True):
            assert torch.equal(one, other)
