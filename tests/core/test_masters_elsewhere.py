"""Masters where other code changes layouts, or where state comes later than the parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from native_helpers import assert_identical
from torch import nn

from clr_optim import CyclicalOptimizer, Ema

BF16, REST = torch.bfloat16, "clr_rest"


def _adamw(model, **options):
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return CyclicalOptimizer(inner, step_size_up=3, master_weights=True, **options)


class Convolution:
    """A convolution, which may be laid out by channels last, with an optimizer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Conv2d(3, 4, 3).to(BF16)
        self.opt = _adamw(self.model, average=Ema(0.5))

    def train(self, k: int) -> None:
        generator = torch.Generator().manual_seed(k)
        for p in self.model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(BF16)
            p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)
        self.opt.step()


def test_a_change_of_the_memory_format_keeps_the_masters():
    one, two = Convolution(), Convolution()
    for k in range(6):
        if k == 3:
            one.model.to(memory_format=torch.channels_last)
        one.train(k)
        two.train(k)
        assert_identical(one.opt, two.opt)
        rests = [each.opt.state[each.model.weight][REST] for each in (one, two)]
        assert torch.equal(*(rest.contiguous().view(torch.int16) for rest in rests))


def test_a_checkpoint_loads_into_another_memory_format():
    one, two = Convolution(), Convolution()
    for k in range(3):
        two.train(k)
    one.model.load_state_dict(two.model.state_dict())
    one.model.to(memory_format=torch.channels_last)
    one.opt.load_state_dict(copy.deepcopy(two.opt.state_dict()))
    for k in range(3, 6):
        one.train(k)
        two.train(k)
        assert_identical(one.opt, two.opt)


def test_an_average_that_begins_late_starts_at_the_master():
    """load_master_state_dict() creates the rest before the step that creates the average."""
    found = []
    for dtype in (torch.float32, BF16):
        torch.manual_seed(0)
        model = nn.ParameterList([torch.randn(5) for _ in range(2)])
        masters = {name: value.clone() for name, value in model.state_dict().items()}
        model.to(dtype)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        is_narrow = dtype == BF16
        opt = CyclicalOptimizer(inner, average=Ema(0.9), master_weights=is_narrow)
        if is_narrow:
            opt.load_master_state_dict(model, masters)
        for k in range(6):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.25) if k > 2 or i == 0 else None
            opt.step()
        found.append([opt.state[p]["clr_average"] for p in model.parameters()])
    for average, wanted in zip(found[1], found[0], strict=True):
        assert average.dtype == torch.float32
        assert torch.equal(average, wanted)


@pytest.mark.parametrize("name", ["master_state_dict", "load_master_state_dict"])
def test_half_a_step_has_no_masters_to_save_or_load(name):
    model = nn.Linear(3, 2).to(BF16)
    opt = _adamw(model)
    values = opt.master_state_dict(model)
    arguments = (model, values) if name.startswith("load") else (model,)
    opt.step_in_backward()
    model(torch.ones(3, dtype=BF16)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=f"{name}.. cannot run between a backward pass and step"):
        getattr(opt, name)(*arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    opt.step()
    getattr(opt, name)(*arguments)
