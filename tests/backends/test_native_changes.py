"""The native backend beside torch while state, parameters, groups and settings change."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict

import pytest
import torch
from changes import (
    EVENTS,
    SETTINGS,
    cast_one,
    cast_with_state,
    drop,
    many,
    reload,
    shrink_the_parameter_alone,
    swap_shape,
    through_pickle,
    to_float32,
)
from contract import assert_a_copy_and_the_original_go_on, cases, kernels, name_of
from native_helpers import (
    BY_NAME,
    DTYPES,
    Twins,
    assert_alike,
    drawn,
    feed,
    held,
    members,
    parameters,
    twins,
)

pytestmark = pytest.mark.usefixtures("native_kernels")


@cases
def test_state_appears_when_torchs_does(case):
    pair = twins(case)
    assert_alike(*pair.both())
    pair.ours.zero_grad()
    pair.step()
    pair.draw()
    drop(pair, lambda i: i == 1)
    pair.step()
    if case.cls is not torch.optim.Adagrad:  # which has state from the start
        assert not held(pair.ours)[1]
    pair.run(2)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=name_of)
def test_the_counters_dtype_follows_torchs_default(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        pair = twins(BY_NAME["adam"])
        pair.run(3)
        assert pair.ours.state[members(pair.ours)[0]]["step"].dtype == default
        torch.set_default_dtype(torch.float32)
        for opt in pair.both():
            opt.add_param_group({"params": parameters(drawn([(3,)], torch.float64))})
        pair.run(3)
    finally:
        torch.set_default_dtype(before)


@kernels
def test_a_run_may_change_backend_at_checkpoints(case):
    pair = twins(case, backend="native")
    for backend in ("torch", "native", "auto", "torch"):
        pair.run(4)
        pair.ours = reload(pair.ours, backend)
        assert_alike(*pair.both())
    pair.run(3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@kernels
def test_a_copy_and_the_original_go_on(case, duplicate):
    assert_a_copy_and_the_original_go_on(twins(case), duplicate, steps=3)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@kernels
def test_events(case, event):
    pair = twins(case, ((5, 3), (7,), (), (7,)))
    # Some events leave float32 parameters, in which the two differ by roundings.
    tolerance = 1e-5 if event in (to_float32, cast_with_state, cast_one) else 1e-12
    pair.run(3)
    pair.each(event)
    pair.step(tolerance)  # with the gradients that the event left
    if event in (shrink_the_parameter_alone, swap_shape) and pair.twin.state:
        refused(pair)
        return
    pair.run(3, tolerance)
    pair.each(event)
    pair.run(2, tolerance)


def refused(pair):
    """Assert that ours raises where torch does: before any update, while torch stops half-way."""
    pair.draw()
    feed(pair.twin, pair.ours)
    before = pair.ours.iteration
    for _ in range(2):
        pair.each(lambda opt: opt.step())
    assert pair.ours.iteration == before


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["sgd-mom", "adam", "adagrad", "rmsprop-mom"])
def test_a_module_cast_in_mid_run(name, dtype):
    case = BY_NAME[name]

    def make():
        torch.manual_seed(4)
        self = torch.nn.Linear(3, 2, dtype=torch.float64)
        modules.append(self)
        return case.make(self.parameters())

    modules = []
    pair = Twins(make)
    pair.run(2)
    for module in modules:
        module.zero_grad()
        module.to(dtype)
    # torch allows some state of another dtype. Both then go through torch's own step.
    pair.run(3, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("setting", SETTINGS)
@kernels
def test_settings_changed_in_mid_run(case, setting):
    # Some settings do not exist for the class. Some torch cannot change without other state.
    pair = twins(case)
    pair.run(2)
    before = dict(pair.twin.param_groups[0])
    for _ in range(2):
        for opt in pair.both():
            for key, value in SETTINGS[setting].items():
                if key in opt.defaults:
                    opt.param_groups[0][key] = value
        pair.run(3)
        for opt in pair.both():
            for key in SETTINGS[setting]:
                if key in before:
                    opt.param_groups[0][key] = before[key]
        pair.run(2)


@pytest.mark.parametrize("name", ["sgd-mom", "rmsprop"])
def test_momentum_switched_on_and_off(name):
    pair = twins(BY_NAME[name])
    for momentum in (0, 0.9, 0, 0.5, 0):
        for opt in pair.both():
            opt.param_groups[0]["momentum"] = momentum
        pair.run(3)


def test_amsgrad_switched_off_and_on():
    pair = twins(BY_NAME["adam-ams"])
    for amsgrad in (True, False, True):
        for opt in pair.both():
            opt.param_groups[0]["amsgrad"] = amsgrad
        pair.run(3)


@pytest.mark.parametrize("kind", [OrderedDict, UserDict])
@pytest.mark.parametrize("at", [0, 5, 19])
def test_state_in_a_dictionary_of_another_kind(kind, at):
    # A mapping that is no dict has other memory where a scan reads.
    pair = many("adamw", 20)
    pair.run(2)
    for opt in pair.both():
        p = members(opt)[at]
        opt.state[p] = kind(opt.state[p])
    pair.run(3)
    for opt in pair.both():
        p = members(opt)[at]
        opt.state[p] = dict(opt.state[p])
    pair.run(2)


def test_betas_changed_within_a_list():
    pair = Twins(
        lambda: torch.optim.Adam(
            parameters(drawn([(5,)], torch.float64)), betas=[0.9, 0.99], foreach=False
        )
    )
    pair.run(2)
    for opt in pair.both():
        opt.param_groups[0]["betas"] = [0.9, 0.99]
    pair.run(2)
    for opt in pair.both():
        opt.param_groups[0]["betas"][0] = 0.2
    pair.run(2)


@kernels
def test_bounds_changed_in_mid_run(case):
    pair = twins(case)
    pair.run(3)
    pair.ours.set_bounds(base_lr=0.1, max_lr=0.3)
    pair.run(3)
    pair.ours.set_iteration(100)
    pair.run(3)
