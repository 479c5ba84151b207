"""A pass that is interrupted at any line leaves each parameter updated or untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backward_helpers import Network, adamw
from native_helpers import assert_identical
from test_interrupted_steps import at_line, interrupted

from clr_optim import Ema


class Small(Network):
    """A model of which two parameters get gradients."""

    def loss(self, step: int) -> torch.Tensor:
        return self.last(torch.arange(5.0, dtype=torch.float64) - step).square().sum()


def _pair(started: bool, **options: Any) -> list[tuple[Any, Any]]:
    found = []
    for in_backward in (True, False):
        model = Small(torch.float64)
        opt = adamw(model, **options)
        if in_backward:
            opt.step_in_backward()
        for k in range(2 if started else 0):
            opt.zero_grad()
            model.loss(k).backward()
            opt.step()
        found.append((model, opt))
    return found


@pytest.mark.parametrize("options", [{}, {"average": Ema(0.5)}], ids=str)
@pytest.mark.parametrize("started", [True, False], ids=["", "first pass"])
def test_ctrl_c_at_any_line_of_a_pass_leaves_each_parameter_done_or_untouched(started, options):
    """The rest of the gradients is given by hand, so that a step ends the pass as if whole."""
    done = {False: 0, True: 0}
    for number in range(10**6):
        (model, opt), (other, ordinary) = _pair(started, **options)
        ordinary.zero_grad()
        other.loss(7).backward()
        grads = [p.grad for p in other.parameters()]
        if not interrupted(number, model.loss(7).backward):
            break
        is_done = opt._shared.in_backward.is_done
        for p, grad in zip(model.parameters(), grads, strict=True):
            done[is_done(p)] += 1
            p.grad = None if is_done(p) or grad is None else grad.clone()
        opt.step()
        ordinary.step()
        assert_identical(opt, ordinary)
        assert opt.iteration == ordinary.iteration
        opt.zero_grad()
        ordinary.zero_grad()
        for each in (model, other):
            each.loss(8).backward()
        opt.step()
        ordinary.step()
        assert_identical(opt, ordinary)
    assert min(done.values()) >= (0 if started else 10), done
    assert number > 10


@pytest.mark.parametrize("started", [True, False], ids=["", "first pass"])
def test_ctrl_c_at_any_line_of_the_step_that_ends_a_pass(started):
    for number in range(10**6):
        (model, opt), (other, ordinary) = _pair(started, average=Ema(0.5))
        ordinary.zero_grad()
        for each in (model, other):
            each.loss(7).backward()
        position = opt.iteration
        was_interrupted = interrupted(number, opt.step)
        ordinary.step()
        if opt.iteration == position:
            opt.step()
        assert_identical(opt, ordinary)
        assert opt.iteration == ordinary.iteration
        if not was_interrupted:
            break
    assert number > 20


def test_a_handler_that_steps_within_a_pass_ends_the_pass():
    """A signal handler may step between two updates. The later updates belong to the next pass."""
    for number in range(0, 10**6, 3):
        ((model, opt), _) = _pair(True)
        if not at_line(number, opt.step, model.loss(7).backward):
            break
        assert opt.iteration == 3
        opt.step()
        assert opt.iteration == 4
    assert number > 10


@pytest.mark.parametrize("has_handle", [True, False], ids=["remove", "step_in_backward"])
def test_ctrl_c_at_any_line_of_the_call_or_of_its_end_leaves_all_hooks_or_none(has_handle):
    """Hooks that stayed would update parameters, and no handle could remove them."""
    for number in range(10**6):
        model = Small(torch.float64)
        opt = adamw(model)
        call = opt.step_in_backward().remove if has_handle else opt.step_in_backward
        is_interrupted = interrupted(number, call)
        in_backward = opt._shared.in_backward
        if not is_interrupted:
            assert in_backward.is_active is not has_handle
            break
        hooked = [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
        # All or none: Ctrl-C may come before or after the call has its effect.
        wanted = [p.requires_grad and in_backward.is_active for p in model.parameters()]
        assert hooked == wanted, number
    assert number > 10
