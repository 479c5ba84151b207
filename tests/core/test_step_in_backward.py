"""Each parameter is updated in the backward pass, and the course is that of ordinary steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_helpers import Network, Twins, adamw
from internals import plan_of
from native_helpers import CASES, KERNELS, Case, assert_identical, threads
from setting_schedules import schedules_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clr_optim import CyclicalOptimizer, Ema

# ---- the course


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_rule_takes_the_ordinary_course(case: Case, dtype):
    twins = Twins(
        lambda model: case.ours(model.parameters(), step_size_up=7), lambda: Network(dtype)
    )
    for k in range(12):
        twins.step(k)
        assert all(p.grad is None for p in twins.model.parameters())


WRAPS: dict[str, dict[str, Any]] = {
    "average of each step": {"average": Ema(0.9)},
    "average in float32": {"average": Ema(0.9, every=2, dtype=torch.float32)},
    "average at cycle ends": {"average": "cycle_end"},
    "cycled momentum": {"cycle_momentum": True},
    "scale_fn": {"scale_fn": lambda x: 0.9**x},
}


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
@pytest.mark.parametrize("wrap", WRAPS)
def test_settings_take_the_ordinary_course_for_200_steps(case: Case, wrap):
    if (
        wrap == "cycled momentum"
        and not {"betas", "momentum"} & case.make([torch.zeros(1)]).defaults.keys()
    ):
        pytest.skip("no momentum")
    try:
        twins = Twins(lambda model: case.ours(model.parameters(), step_size_up=3, **WRAPS[wrap]))
    except ValueError:
        pytest.skip("no momentum to cycle")
    for k in range(200):
        twins.step(k)


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_settings_that_follow_schedules(case: Case):
    def make(model: nn.Module) -> Any:
        inner = case.make(model.parameters())
        return CyclicalOptimizer(inner, step_size_up=3, schedules=schedules_for(inner))

    twins = Twins(make)
    for k in range(20):
        twins.step(k)


@pytest.mark.parametrize("wrap", [{}, {"average": Ema(0.5)}], ids=str)
def test_a_parameter_without_a_gradient_is_left_alone(wrap):
    """Some passes reach the first layer only through a branch that is off."""

    def loss(model: Any, k: int) -> Tensor:
        return model.loss(k) if k % 3 else model.last(torch.ones(5)).sum() + model.unused.sum()

    twins = Twins(lambda model: adamw(model, **wrap))
    for k in range(12):
        twins.step(k, loss)
        state = twins.opt.state
        assert int(state[twins.model.unused]["step"]) == k // 3 + 1
        if k:
            assert int(state[twins.model.first.weight]["step"]) == k - k // 3


def test_a_pass_without_any_gradient_advances():
    twins = Twins(adamw)
    twins.step(0)
    for opt in (twins.opt, twins.ordinary):
        opt.zero_grad()
        opt.step()
    twins.compare()
    assert twins.opt.iteration == 2


def test_threads_give_the_same_bits():
    with threads(2):
        twins = Twins(adamw, lambda: Network(width=300))
        for k in range(5):
            twins.step(k)


# ---- models


class Tied(Network):
    """The last layer uses the weight of the first one again."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.first.weight.sum(1, keepdim=True)


def test_tied_weights_get_one_update_from_both_uses():
    twins = Twins(adamw, Tied)
    for k in range(9):
        twins.step(k)
    assert int(twins.opt.state[twins.model.first.weight]["step"]) == 9


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    class Checkpointed(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x.requires_grad_()))
            x = checkpoint(lambda y: self.frozen(y).tanh(), x, use_reentrant=use_reentrant)
            return checkpoint(self.last, x, use_reentrant=use_reentrant)

    twins = Twins(adamw, Checkpointed)
    for k in range(6):
        twins.step(k)


def test_a_weight_in_two_reentrant_checkpoints_is_refused():
    """Each reentrant checkpoint runs a backward pass, which completes a gradient."""

    class Shared(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x.requires_grad_()))
            for _ in range(2):
                x = checkpoint(self.frozen, x, use_reentrant=True)
            return self.last(x)

    model = Shared()
    model.frozen.requires_grad_()
    opt = adamw(model)
    opt.step_in_backward()
    with pytest.raises(RuntimeError, match="second gradient"):
        model.loss(0).backward()


def test_a_weight_that_backward_still_needs_makes_torch_raise():
    """torch saves a view of the weight for a node that runs after the gradient is complete."""
    weight = nn.Parameter(torch.ones(3))
    opt = CyclicalOptimizer(torch.optim.SGD([weight]))
    opt.step_in_backward()
    x = torch.ones(3, requires_grad=True)

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(weight)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    loss = (Late.apply(x) * weight).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_layer_frozen_and_unfrozen_later():
    twins = Twins(adamw)
    for k in range(12):
        for model in (twins.model, twins.other):
            model.frozen.requires_grad_(k in (3, 4, 5, 8))
            model.first.requires_grad_(k not in (6, 7))
        twins.step(k)
        frozen = twins.model.frozen.weight
        twins.model.zero_grad()
        steps = [0, 0, 0, 1, 2, 3, 3, 3, 4, 4, 4, 4][k]
        assert int(twins.opt.state.get(frozen, {"step": 0})["step"]) == steps
    # The first gradient waits for step(), which adds the hook.
    twins.model.frozen.requires_grad_(True)
    twins.model.loss(0).backward()
    assert twins.model.frozen.weight.grad is None


def test_a_new_group_gets_hooks():
    twins = Twins(adamw)
    twins.step(0)
    heads = [nn.Linear(3, 1), nn.Linear(3, 1)]
    heads[1].load_state_dict(heads[0].state_dict())
    for opt, head in zip((twins.opt, twins.ordinary), heads, strict=True):
        opt.add_param_group({"params": list(head.parameters()), "max_lr": 0.2})
    for model, head in zip((twins.model, twins.other), heads, strict=True):
        model.head = head
    for k in range(5):
        twins.step(k, lambda m, k: m.loss(k) + m.head(torch.ones(3)).square().sum())
        assert twins.model.head.weight.grad is None


def test_a_sparse_gradient_waits_for_the_step():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(5, 3, sparse=True)
            self.last = nn.Linear(3, 1)

        def loss(self, step: int) -> Tensor:
            return self.last(self.table(torch.tensor([step % 5, 1]))).square().sum()

    def make(model: nn.Module) -> Any:
        return CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), step_size_up=3)

    twins = Twins(make, Words)
    for k in range(6):
        twins.model.loss(k).backward()
        assert twins.model.table.weight.grad is not None
        assert twins.model.last.weight.grad is None
        twins.ordinary.zero_grad()
        twins.other.loss(k).backward()
        for opt in (twins.opt, twins.ordinary):
            opt.step()
        twins.compare()
        twins.opt.zero_grad()
    assert "in step(): 1 parameter tensors, which keep their gradients: sparse gradients" in (
        twins.opt.explain()
    )


# ---- checkpoints


def test_a_run_resumes_between_steps():
    twins = Twins(lambda model: adamw(model, average=Ema(0.5)))
    for k in range(4):
        twins.step(k)
    fresh = Twins(lambda model: adamw(model, average=Ema(0.5)))
    for new, old in ((fresh.model, twins.model), (fresh.other, twins.other)):
        new.load_state_dict(old.state_dict())
    fresh.opt.load_state_dict(copy.deepcopy(twins.opt.state_dict()))
    fresh.ordinary.load_state_dict(copy.deepcopy(twins.ordinary.state_dict()))
    for k in range(4, 9):
        twins.step(k)
        fresh.step(k)
    assert_identical(fresh.opt, twins.opt)


QUESTIONS: dict[str, Callable[[Any], object]] = {
    "state_dict()": lambda opt: opt.state_dict(),
    "a copy": copy.deepcopy,
    "averaged()": lambda opt: opt.averaged().__enter__(),
    "averaged_state_dict()": lambda opt: opt.averaged_state_dict(nn.Linear(1, 1)),
    "set_iteration()": lambda opt: opt.set_iteration(3),
    "set_bounds()": lambda opt: opt.set_bounds(max_lr=0.5),
}


@pytest.mark.parametrize("what", QUESTIONS)
def test_half_a_step_is_no_checkpoint(what):
    twins = Twins(lambda model: adamw(model, average=Ema(0.5)))
    twins.step(0)
    twins.model.loss(1).backward()
    with pytest.raises(RuntimeError, match="cannot run between a backward pass and step"):
        QUESTIONS[what](twins.opt)
    twins.ordinary.zero_grad()
    twins.other.loss(1).backward()
    for opt in (twins.opt, twins.ordinary):
        opt.step()
    twins.compare()


def test_a_load_drops_the_pass():
    twins = Twins(adamw)
    twins.step(0)
    saved = copy.deepcopy((twins.model.state_dict(), twins.opt.state_dict()))
    twins.model.loss(1).backward()
    twins.model.load_state_dict(saved[0])
    twins.opt.load_state_dict(saved[1])
    for k in range(1, 4):
        twins.step(k)


def test_copies_have_no_hooks():
    twins = Twins(adamw)
    twins.step(0)
    model, opt = copy.deepcopy((twins.model, twins.opt))
    model.loss(1).backward()
    assert model.first.weight.grad is not None
    opt.step()
    twins.step(1)
    assert_identical(opt, twins.opt)


def test_a_group_that_a_hook_adds_within_a_pass():
    """The plan is built anew. The averages of the updated parameters move once all the same."""
    twins = Twins(lambda model: adamw(model, average=Ema(0.5)))
    for k in range(3):
        twins.step(k)
    heads = [nn.Linear(2, 1), nn.Linear(2, 1)]
    heads[1].load_state_dict(heads[0].state_dict())

    def add(opt: Any, head: nn.Module) -> None:
        opt.add_param_group({"params": list(head.parameters())})
        plan_of(opt).forget()

    twins.model.last.weight.register_post_accumulate_grad_hook(lambda _: add(twins.opt, heads[0]))
    twins.model.loss(3).backward()
    twins.ordinary.zero_grad()
    twins.other.loss(3).backward()
    add(twins.ordinary, heads[1])
    for opt in (twins.opt, twins.ordinary):
        opt.step()
    twins.compare()


def test_a_plan_built_anew_where_the_old_one_lay_has_other_rows():
    """The rows of equal shapes change places, and new buckets may have old addresses."""

    class Equal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.parts = nn.ParameterList([torch.randn(3) for _ in range(4)])

        def loss(self, k: int) -> Tensor:
            used = [p for i, p in enumerate(self.parts) if i != k % 5]
            return torch.stack([(p - i).square().sum() for i, p in enumerate(used)]).sum()

    twins = Twins(lambda model: adamw(model, average=Ema(0.5)), Equal)
    for k in range(60):
        plan_of(twins.opt).forget()
        twins.step(k)
