"""Classes that are not torch's, bound to kernels that ship."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import BY_NAME, Lion, wrapped
from internals import kernels_of
from native_helpers import assert_alike, drawn, members, parameters

from clr_optim import register_rule
from clr_optim.rules import RULES, SHIPPED, STATE_SLOTS

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Unbind the classes that a test has bound."""
    rules, slots = dict(RULES), dict(STATE_SLOTS)
    yield
    for table, before in ((RULES, rules), (STATE_SLOTS, slots)):
        table.clear()
        table.update(before)


class Fork(torch.optim.AdamW):
    """A class with the settings, the state and the step of AdamW."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for p, g in zip(members(optimizer), drawn([(5, 3), (7,)], torch.float64, seed), strict=True):
        p.grad = g
    optimizer.step()


def test_a_bound_class_is_served_by_the_kernel_of_its_rule():
    values = drawn([(5, 3), (7,)], torch.float64)
    before = wrapped(Fork(parameters(values), lr=0.1))
    assert before.explain().startswith("torch")
    register_rule(Fork, "adamw")
    ours = wrapped(Fork(parameters(values), lr=0.1))
    for k in range(6):
        if k == 3:  # the constructor does not name this setting
            for opt in (before, ours):
                opt.param_groups[0]["betas"] = (0.5, 0.6)
        step(before, k)
        step(ours, k)
    assert kernels_of(ours) == {"adam"}
    assert_alike(ours, before)
    loaded = wrapped(Fork(parameters(values), lr=0.1))
    loaded.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match=r"lacks .'eps'.*Fork cannot step"):
        loaded.load_state_dict(wrapped(BY_NAME["lion"].make(parameters(values))).state_dict())


def test_a_group_without_a_setting_of_the_rule_is_served_by_its_own_step():
    class Bare(Lion):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            for group in self.param_groups:
                group["decays"] = group.pop("weight_decay")

        step = torch.optim.SGD.step

    register_rule(Bare, "lion")
    opt = wrapped(Bare(parameters(drawn([(3,)], torch.float64))))
    assert "its group has no 'weight_decay'" in opt.explain()


def test_a_lion_whose_decay_is_divided_by_its_first_rate_is_served_by_its_own_step():
    lion = Lion(parameters(drawn([(3,)], torch.float64)))
    lion.decoupled_wd = True  # as lion-pytorch's decoupled_weight_decay=True
    assert wrapped(lion).explain().endswith("Lion: decoupled_weight_decay=True")


#: what was tried -> class, rule, error, message
REFUSED = {
    "no optimizer": (
        int,
        "lion",
        TypeError,
        "optimizer_class must be a subclass of torch.optim.Optimizer, got <class",
    ),
    "the name of a class": (
        "Lion",
        "lion",
        TypeError,
        "optimizer_class must be a subclass .*, got 'Lion'",
    ),
    "a class of torch with a kernel": (
        torch.optim.Adam,
        "adam",
        ValueError,
        "optimizer_class must not be a class of torch, got Adam",
    ),
    "a class of torch without a kernel": (
        torch.optim.ASGD,
        "sgd",
        ValueError,
        "optimizer_class must not be a class of torch, got ASGD",
    ),
    "torch's base class": (
        torch.optim.Optimizer,
        "sgd",
        ValueError,
        "optimizer_class must not be a class of torch, got Optimizer",
    ),
    "a class that is bound": (
        Lion,
        "lion",
        ValueError,
        "must not be bound twice: Lion is already bound to a rule; bind a subclass",
    ),
    "an unknown rule": (
        Fork,
        "adam8bit",
        ValueError,
        "rule must be one of .*'lion'.*, got 'adam8bit'",
    ),
    "a rule instead of its name": (
        Fork,
        SHIPPED["lion"],
        ValueError,
        "rule must be one of .*, got an object of type UpdateRule$",
    ),
}


@pytest.mark.parametrize(("cls", "rule", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_bound_is_refused(cls, rule, error, message):
    before = dict(RULES)
    with pytest.raises(error, match=message):
        register_rule(cls, rule)
    assert before == RULES
