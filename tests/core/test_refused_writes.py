"""A write of an attribute that would change nothing is refused. All other writes work."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import fixed

BOUNDS = r"opt\.set_bounds\(base_lr=\.\.\., max_lr=\.\.\.\)"
POSITION = r"opt\.set_iteration\(\.\.\.\)"
ANEW = r"position = opt\.iteration, construct .* opt\.optimizer with {}=\.\.\., and call its set"
GROUPS = r"write group\['{}'\] for each group of opt\.param_groups"

# name: the remedy that the message names
REFUSED = {
    **dict.fromkeys(("lr", "learning_rate", "base_lr", "max_lr"), BOUNDS),
    **dict.fromkeys(("iteration", "cycle", "steps_to_cycle_end", "last_epoch"), POSITION),
    **{
        name: ANEW.format(name)
        for name in (
            "policy", "step_size_up", "step_size_down", "gamma", "window", "scale_fn", "scale_mode",
            "cycle_momentum", "base_momentum", "max_momentum", "max_grad_norm", "skip_above",
            "average", "backend",
        )
    },
    "schedule": ANEW.format("policy"),
    "step_size": ANEW.format("step_size_up"),
    "optimizer": "construct another CyclicalOptimizer around the other one",
    **{name: GROUPS.format(name) for name in ("momentum", "betas", "weight_decay", "eps")},
    "grad_norm": "for reading only",
    "scheduler": "for reading only",
}  # fmt: skip


def wrapped(cls=torch.optim.SGD, **options):
    return CyclicalOptimizer(cls([torch.nn.Parameter(torch.ones(2))], lr=0.4), **options)


def step(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


@pytest.mark.parametrize("name", REFUSED)
def test_a_write_without_effect_is_refused(name):
    opt = wrapped()
    step(opt)
    before = str((opt.param_groups, opt.state_dict(), opt.__dict__.keys()))
    with pytest.raises(
        AttributeError, match=rf"opt\.{name} = 0\.8 has no effect: .*{REFUSED[name]}"
    ):
        setattr(opt, name, 0.8)
    assert str((opt.param_groups, opt.state_dict(), opt.__dict__.keys())) == before


class HasItsOwn(torch.optim.SGD):
    """An optimizer that keeps settings as attributes, as optimizers outside torch do."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.lr, self.gamma, self.iteration = lr, 0.5, 7


@pytest.mark.parametrize("name", ["lr", "gamma", "iteration"])
def test_a_wrapped_optimizers_own_attribute_is_named(name):
    opt = wrapped(HasItsOwn)
    with pytest.raises(
        AttributeError, match=rf"HasItsOwn's own attribute is opt\.optimizer\.{name}"
    ):
        setattr(opt, name, 0.8)
    setattr(opt.optimizer, name, 0.8)
    if name != "iteration":
        assert getattr(opt, name) == 0.8


def test_reading_goes_on_as_before():
    opt = wrapped()
    for name in ("lr", "learning_rate", "window", "gamma"):
        assert not hasattr(opt, name)
        assert not hasattr(CyclicalOptimizer, name)
        with pytest.raises(AttributeError, match=f"object has no attribute '{name}'"):
            getattr(opt, name)
    assert wrapped(HasItsOwn).lr == 0.4
    assert opt.iteration == 0
    assert opt.schedule == CyclicalOptimizer(opt.optimizer).schedule
    assert CyclicalOptimizer.iteration.__doc__.startswith("Steps taken")


def test_what_frameworks_write_goes_on():
    opt = wrapped(backend="torch")
    opt.grad_scale = opt.found_inf = None
    opt._opt_called = True
    opt.note = "mine"
    assert opt.note == "mine"
    # Lightning wraps an optimizer in this way.
    other = CyclicalOptimizer.__new__(CyclicalOptimizer)
    other.__dict__ = {k: v for k, v in opt.__dict__.items() if k != "step"}
    other.__class__ = type("LightningOptimizer", (CyclicalOptimizer,), {})
    step(other)
    assert opt.iteration == other.iteration == 1
    # accelerate learns in this way of a skipped step.
    called = []
    original = opt.step
    opt.step = lambda *args: (called.append(args), original(*args))[1]
    step(opt)
    assert called == [()]
    assert opt.iteration == 2


def test_every_argument_of_the_constructor_is_refused():
    opt = wrapped()
    for name in inspect.signature(CyclicalOptimizer).parameters:
        with pytest.raises(AttributeError, match=rf"^opt\.{name} = None has no effect: "):
            setattr(opt, name, None)


def test_copies_and_pickles_refuse_too():
    opt = wrapped()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        step(other)
        assert other.iteration == 1
        with pytest.raises(AttributeError, match="set_bounds"):
            other.max_lr = 0.8


def test_a_subclass_may_have_attributes_of_its_own():
    class Mine(CyclicalOptimizer):
        window = None

    opt = Mine(torch.optim.SGD([torch.ones(1)], lr=0.1), fixed())
    opt.window = 5
    assert opt.window == 5
