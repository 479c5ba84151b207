"""Steps in backward on two ranks: FSDP2's hooks come after the reduction, DDP's do not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dtensor_helpers import Block, loss
from native_helpers import BY_NAME
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clr_optim import Ema

STEPS = 7


def _divided() -> Any:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # views are not changed
    model = Block()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh)
    return model


def _trained(name: str, in_backward: bool, masters: bool = False) -> tuple[list[Tensor], int]:
    """Train a sharded model. Return this rank's tensors, and the gradients that came to a step."""
    model = _divided()
    if masters:
        model.to(torch.bfloat16)
    opt = BY_NAME[name].ours(
        model.parameters(), step_size_up=3, average=Ema(0.9), master_weights=masters
    )
    if masters:
        values = opt.master_state_dict(model)
        opt.load_master_state_dict(model, {key: value * 1.01 for key, value in values.items()})
    handle = opt.step_in_backward() if in_backward else None
    late = 0
    for step in range(STEPS):
        opt.zero_grad()
        loss(model, step, dist.get_rank(), dist.get_world_size()).backward()
        late += sum(p.grad is not None for p in model.parameters())
        opt.step()
        assert opt.iteration == step + 1
    if handle is not None:
        handle.remove()
    whole = [*model.parameters()]
    for p in model.parameters():
        whole += [t for t in opt.state[p].values() if isinstance(t, Tensor)]
    return [_bits(getattr(t, "_local_tensor", t).detach().clone()) for t in whole], late


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of bfloat16 values: a rest of a master may look like NaN."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("name", ["adamw-ams", "sgd-nest-wd"])
def test_fsdp2_takes_the_ordinary_course(ranks, name, masters):
    ordinary = ranks.run(2, _trained, name, False, masters)
    for (ours, late), (expected, all_late) in zip(
        ranks.run(2, _trained, name, True, masters), ordinary, strict=True
    ):
        assert late == 0 < all_late
        assert len(ours) == len(expected)
        assert all(map(torch.equal, ours, expected))


def _under_ddp(reduced: bool) -> list[Tensor] | str:
    model = Block()
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = BY_NAME["adamw-ams"].ours(model.parameters(), step_size_up=3)
    if not reduced:
        try:
            opt.step_in_backward()
        except ValueError as error:
            return str(error)
        return "no error"

    def reduce(param: Tensor) -> None:
        assert param.grad is not None
        dist.all_reduce(param.grad)
        param.grad.div_(dist.get_world_size())

    # The user reduces each gradient in a hook that comes before ours.
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(reduce)
    opt.step_in_backward(gradients_are_reduced=True)
    for step in range(STEPS):
        loss(model, step, dist.get_rank(), dist.get_world_size()).backward()
        assert all(p.grad is None for p in model.parameters())
        opt.step()
    assert ddp is not None
    return [p.detach().clone() for p in model.parameters()]


def test_ranks_that_would_part_are_refused(ranks):
    for text in ranks.run(2, _under_ddp, False):
        assert "gradients_are_reduced=False" in text
        assert "the 2 ranks would part" in text


def test_gradients_that_the_user_has_reduced(ranks):
    first, second = ranks.run(2, _under_ddp, True)
    assert all(map(torch.equal, first, second))


def test_one_rank_needs_no_promise(ranks):
    (text,) = ranks.run(1, _under_ddp, False)
    assert text == "no error"
