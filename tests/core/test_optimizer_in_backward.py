"""A small optimizer for each parameter steps during backward, so that no gradient waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_same, step_in_backward
from native_helpers import BY_NAME, KERNELS, Case
from torch import nn

from clr_optim import CyclicalOptimizer


def _model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def _loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.prod(1, keepdim=True)).square().mean()


def _in_backward(
    model: nn.Module, case: Case, backend: str
) -> dict[nn.Parameter, CyclicalOptimizer[Any]]:
    optimizers = {
        p: case.ours([p], backend=backend, step_size_up=3)
        for p in model.parameters()
        if p.requires_grad
    }

    step_in_backward(optimizers)
    return optimizers


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_equals_one_optimizer_after_backward(case, backend):
    small, large = _model(), _model()
    optimizers = _in_backward(small, case, backend)
    one = case.ours(large.parameters(), backend=backend, step_size_up=3)
    for step in range(8):
        _loss(small, step).backward()
        assert all(p.grad is None for p in small.parameters())
        one.zero_grad()
        _loss(large, step).backward()
        one.step()
        assert {opt.iteration for opt in optimizers.values()} == {one.iteration}
        assert {opt.get_last_lr()[0] for opt in optimizers.values()} == {one.get_last_lr()[0]}
    assert_same(list(small.parameters()), list(large.parameters()))


def test_a_frozen_parameter_has_its_cycle_stand_still():
    """The hook of a frozen parameter does not fire. Later its cycle goes on where it stopped."""
    model = _model()
    optimizers = _in_backward(model, BY_NAME["adam-wd"], "auto")
    first = model[0].weight
    for step in range(6):
        first.requires_grad_(step not in (2, 3))
        _loss(model, step).backward()
    assert optimizers[first].iteration == 4
    assert optimizers[model[0].bias].iteration == 6


# Several optimizers without state must be flattened to tell them apart. torch gives each of them
# all groups of a state dict whose state is empty.
@pytest.mark.parametrize(
    ("name", "flat"), [("sgd-wd", True), ("adamw-ams", False), ("adamw-ams", True)]
)
def test_the_distributed_checkpoint_takes_them_all(name, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    case = BY_NAME[name]
    straight, broken = _model(), _model()
    _in_backward(straight, case, "auto")
    for step in range(9):
        _loss(straight, step).backward()

    optimizers = tuple(_in_backward(broken, case, "auto").values())
    for step in range(5):
        _loss(broken, step).backward()
    saved = get_optimizer_state_dict(broken, optimizers, options=options)
    resumed = _model()
    resumed.load_state_dict(broken.state_dict())
    fresh = tuple(_in_backward(resumed, case, "auto").values())
    set_optimizer_state_dict(resumed, fresh, saved, options=options)
    assert {opt.iteration for opt in fresh} == {5}
    for step in range(5, 9):
        _loss(resumed, step).backward()
    assert_same(list(resumed.parameters()), list(straight.parameters()))
