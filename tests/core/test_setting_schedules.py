"""Settings that follow schedules: as plain torch with the numbers given by hand."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, EVERY_CLASS, WITH_KERNEL, Case, Problem, wrapped
from internals import backend_of, take_the_general_way
from setting_schedules import feed, number_in, numbers_at, schedules_for

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import POLICIES, Phase, Schedule, decay, exp, triangular

STEPS = 80  # more than a block of values that native code takes at once


def follows(case: Case) -> bool:
    return bool(schedules_for(case.make([torch.nn.Parameter(torch.zeros(2, 2))])))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("native", torch.float32), ("native", torch.float64), ("torch", torch.float32)],
)
@pytest.mark.parametrize("case", [*filter(follows, WITH_KERNEL)], ids=lambda case: case.name)
def test_each_rule_trains_as_plain_torch_with_the_same_numbers(case, backend, dtype):
    compare(case.as_for_loop(), backend, dtype, STEPS if backend == "native" else 20)


@pytest.mark.parametrize("case", [*filter(follows, EVERY_CLASS)], ids=lambda case: case.name)
def test_each_class_trains_as_plain_torch_with_the_same_numbers(case):
    compare(case, "auto", case.dtypes[0], 12)


def compare(case: Case, backend: str, dtype: torch.dtype, steps: int) -> None:
    ours, twin = Problem(case, dtype), Problem(case, dtype)
    plain = case.make(twin.params)
    schedules = schedules_for(plain)
    opt = wrapped(case.make(ours.params), backend=backend, schedules=schedules)
    for k in range(steps):
        (rate,) = opt.lr_at(k)
        for name, number in numbers_at(schedules, k):
            assert number_in(opt.param_groups[0], name) == number, (name, k)
        feed(plain, rate, schedules, k)
        ours.step(opt, k, case.closure)
        twin.step(plain, k, case.closure)
        for p, q in zip(ours.params, twin.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        if k == steps // 2:  # the same numbers reach kernels by another way
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            plain.load_state_dict(copy.deepcopy(plain.state_dict()))


@pytest.mark.parametrize("name", ["adamw", "sgd-nest-wd", "nadam-decoupled-cycled"])
def test_native_code_takes_the_ordinary_steps(native_kernels, monkeypatch, name):
    """And to the same bits as the general way."""

    def run() -> tuple[Any, list[torch.nn.Parameter]]:
        case = BY_NAME[name]
        problem = Problem(case)
        schedules = schedules_for(case.make(problem.params))
        if case.wrap.get("cycle_momentum"):
            del schedules["betas[0]"]
        opt = case.ours(problem.params, backend="native", schedules=schedules)
        problem.run(opt, range(STEPS))
        return opt, problem.params

    opt, params = run()
    backend: Any = backend_of(opt)
    assert backend.plan.native.course()[0] == STEPS
    take_the_general_way(monkeypatch)
    other, others = run()
    assert all(map(torch.equal, params, others))
    found, expected = (each.state_dict()["param_groups"] for each in (opt, other))
    assert found == expected


def two_groups() -> Any:
    decays, stays = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    return torch.optim.AdamW(
        [{"params": [decays]}, {"params": [stays], "weight_decay": 0.0}], lr=0.1, weight_decay=0.3
    )


WD = triangular(2, base_lr=0.0, max_lr=0.1)


def step(opt: Any) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


def decays_in(opt: Any) -> list[float]:
    return [group["weight_decay"] for group in opt.param_groups]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_list_leaves_groups_alone(backend):
    opt = CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, None]}, backend=backend)
    seen = []
    for _ in range(5):
        seen.append(decays_in(opt))
        step(opt)
    assert seen == [[0.0, 0.0], [0.05, 0.0], [0.1, 0.0], [0.05, 0.0], [0.0, 0.0]]
    assert opt.param_groups[1]["clr_schedules"] == "{}"
    opt.param_groups.reverse()  # each group keeps its schedule
    step(opt)
    assert decays_in(opt) == [0.0, 0.1]


def test_a_new_group_follows_the_schedule_of_all_groups():
    opt = CyclicalOptimizer(
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1), schedules={"eps": WD}
    )
    step(opt)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert [group["eps"] for group in opt.param_groups] == [0.05, 0.05]
    step(opt)
    assert [group["eps"] for group in opt.param_groups] == [0.1, 0.1]


def test_weight_decay_tied_to_the_rate():
    schedule = triangular(4)
    opt = CyclicalOptimizer(
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.2),
        schedule,
        base_lr=0.0,
        schedules={"weight_decay": schedule.between(0.0, 0.1)},
    )
    for _ in range(9):
        assert decays_in(opt) == [opt.param_groups[0]["lr"] / 2]
        step(opt)


# ---- who else writes


def test_other_codes_number_is_overruled_with_a_warning():
    opt = CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, None]})
    step(opt)
    opt.param_groups[0]["weight_decay"] = 0.7
    opt.param_groups[1]["weight_decay"] = 0.2  # follows no schedule
    with pytest.warns(
        UserWarning, match=r"weight_decay in .* group 0 \(0.7\) was written .*schedules"
    ):
        step(opt)
    assert decays_in(opt) == [0.1, 0.2]
    opt.param_groups[0]["weight_decay"] = 0.7
    step(opt)  # one warning only
    assert decays_in(opt) == [0.05, 0.2]


def test_a_checkpoint_resumes_the_settings():
    opts = [CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, None]}) for _ in "ab"]
    for _ in range(3):
        step(opts[0])
    state = torch.load(save(opts[0].state_dict()), weights_only=True)
    opts[1].load_state_dict(state)
    assert decays_in(opts[1]) == decays_in(opts[0]) == [0.05, 0.0]
    for each in (copy.deepcopy(opts[0]), pickle.loads(pickle.dumps(opts[0])), opts[1], opts[0]):
        step(each)
        assert decays_in(each) == [0.0, 0.0]
        step(each)
        assert decays_in(each) == [0.05, 0.0]


def save(state: Any) -> Any:
    import io

    memory = io.BytesIO()
    torch.save(state, memory)
    memory.seek(0)
    return memory


@pytest.mark.parametrize("other", [None, {"weight_decay": [triangular(5).between(0, 1), None]}])
def test_other_schedules_in_a_checkpoint_are_named(other):
    saved = CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, None]})
    step(saved)
    opt = CyclicalOptimizer(two_groups(), schedules=other)
    with pytest.warns(UserWarning, match=r"state_dict was written with the schedules .*group 0"):
        opt.load_state_dict(saved.state_dict())
    assert decays_in(opt)[0] == (0.05 if other is None else 0.2)
    inner = two_groups()
    inner.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match=r"the wrapped optimizer was written with the schedules"):
        CyclicalOptimizer(inner, schedules=other)


def test_a_later_wrapper_finds_the_users_numbers():
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.3)
    schedules = {"weight_decay": WD, "betas[1]": triangular(3, base_lr=0.9, max_lr=0.99)}
    for _ in range(3):
        opt = CyclicalOptimizer(inner, schedules=schedules)
        step(opt)
        assert inner.param_groups[0]["weight_decay"] == 0.05
    CyclicalOptimizer(inner)
    assert inner.param_groups[0]["weight_decay"] == 0.3
    assert inner.param_groups[0]["betas"] == (0.9, 0.999)
    assert "clr_schedules" not in inner.param_groups[0]


def moved_groups() -> Any:
    """Return an optimizer whose first group has moved to the second place."""
    opt = CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, None]}, backend="torch")
    step(opt)
    opt.param_groups.reverse()
    step(opt)
    assert decays_in(opt) == [0.0, 0.1]
    return opt


@pytest.mark.parametrize("way", ["load", "deepcopy", "pickle", "away"])
def test_a_schedule_travels_with_its_group(way):
    opt = moved_groups()
    if way == "load":
        opt.load_state_dict(torch.load(save(opt.state_dict()), weights_only=True))
    elif way == "deepcopy":
        opt = copy.deepcopy(opt)
    elif way == "pickle":
        opt = pickle.loads(pickle.dumps(opt))
    else:  # each group, for a step
        for group in list(opt.param_groups):
            opt.param_groups.remove(group)
            step(opt)
            opt.param_groups.append(group)
    opt.set_iteration(2)
    for expected in (0.1, 0.05):
        assert decays_in(opt) == [0.0, expected]
        step(opt)


def test_a_checkpoint_without_schedules_keeps_those_of_each_place():
    opt = moved_groups()
    plain = two_groups()
    plain.param_groups.reverse()
    opt.load_state_dict(plain.state_dict())
    opt.set_iteration(1)
    assert decays_in(opt) == [0.0, 0.05]


def test_groups_that_join_a_list_follow_nothing():
    opt = CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, WD]})
    del opt.param_groups[1]
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "weight_decay": 0.0})
    step(opt)
    assert decays_in(opt) == [0.05, 0.0]


def test_a_group_that_joins_is_checked():
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    opt = CyclicalOptimizer(
        inner, schedules={"weight_decay": WD, "betas[1]": triangular(3).between(0.9, 0.99)}
    )
    new = {"params": [torch.nn.Parameter(torch.ones(2))]}
    for wrong, match in (
        ({"weight_decay": 0.0}, "param_group has weight_decay=0"),
        ({"betas": 0.9}, "'betas' is a single number"),
        ({"weight_decay": "much"}, "is no number"),
    ):
        with pytest.raises(ValueError, match=match):
            opt.add_param_group({**new, **wrong})
        assert len(opt.param_groups) == 1
    with pytest.warns(UserWarning, match="param_group: weight_decay has no effect"):
        opt.add_param_group({**new, "weight_decay": 0.3})
    assert decays_in(opt) == [0.0, 0.0]
    opt = CyclicalOptimizer(
        ADAM.make(new["params"], weight_decay=0.0), schedules={"weight_decay": WD}
    )
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})  # no group decayed before


def test_tensors_that_other_groups_share_are_left_alone():
    shared, twice = torch.tensor(0.999), torch.tensor(0.5)
    inner = torch.optim.Adam(
        [
            {"params": [torch.nn.Parameter(torch.ones(2))], "betas": (twice, twice)},
            {"params": [torch.nn.Parameter(torch.ones(3))], "betas": (torch.tensor(0.9), shared)},
        ],
        lr=0.1,
        foreach=False,
    )
    inner.param_groups[0]["betas"] = (twice, twice)
    inner.defaults["betas"] = (twice, shared)
    opt = CyclicalOptimizer(
        inner, schedules={"betas[1]": [triangular(2).between(0.1, 0.5), None]}, backend="torch"
    )
    step(opt)
    first, second = opt.param_groups
    assert torch.equal(first["betas"][1], torch.tensor(0.3))
    assert [float(twice), float(first["betas"][0])] == [0.5, 0.5]
    assert second["betas"][1] is shared
    assert shared == torch.tensor(0.999)


def test_a_tensor_in_a_floats_place_is_replaced():
    opt = CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, None]}, backend="native")
    step(opt)
    mine = torch.tensor(0.7)
    for written in (mine, torch.tensor(3)):
        opt.param_groups[0]["weight_decay"] = written
        with (
            pytest.warns(UserWarning, match="weight_decay in parameter group 0")
            if written is mine
            else nullcontext()
        ):
            step(opt)
        assert type(opt.param_groups[0]["weight_decay"]) is float
    assert mine == torch.tensor(0.7)


@pytest.mark.parametrize("written", [0.9, (0.9,), None])
def test_a_tuple_of_another_form_is_replaced(written):
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    opt = CyclicalOptimizer(inner, schedules={"betas[1]": triangular(2).between(0.9, 0.99)})
    step(opt)
    inner.param_groups[0]["betas"] = written
    with pytest.warns(UserWarning, match=r"betas\[1\] in parameter group 0"):
        step(opt)
    assert inner.param_groups[0]["betas"] == (0.9, 0.99)


def test_what_does_not_follow_is_the_users():
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    opt = CyclicalOptimizer(inner, schedules={"betas[1]": triangular(2).between(0.9, 0.99)})
    step(opt)
    inner.param_groups[0]["betas"] = (0.7, inner.param_groups[0]["betas"][1])
    step(opt)  # without a warning
    assert inner.param_groups[0]["betas"] == (0.7, 0.99)


@pytest.mark.parametrize("make", [tuple, list, torch.tensor, np.array], ids=lambda m: m.__name__)
@pytest.mark.parametrize("options", [{"cycle_momentum": True}, {"schedules": {"betas[0]": WD}}])
def test_the_other_member_may_be_written_in_any_sequence(make, options):
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1, foreach=False)
    opt = CyclicalOptimizer(inner, backend="torch", **options)
    step(opt)
    inner.param_groups[0]["betas"] = make([inner.param_groups[0]["betas"][0], 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch rounds the first member
        step(opt)
    first, second = inner.param_groups[0]["betas"]
    assert float(second) == 0.5
    assert float(first) == pytest.approx(opt._shared.mirror.written.numbers[0], rel=1e-6)


def test_the_users_zero_is_not_that_of_an_earlier_schedule():
    inner = torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(torch.ones(n))]} for n in (2, 3)], lr=0.1, weight_decay=0.3
    )
    CyclicalOptimizer(inner, schedules={"weight_decay": [WD, None]})  # stands at 0
    opt = CyclicalOptimizer(inner, schedules={"weight_decay": triangular(2).between(0.1, 0.2)})
    assert decays_in(opt) == [0.1, 0.1]
    other = CyclicalOptimizer(two_groups(), schedules={"weight_decay": [WD, None]})
    with pytest.raises(ValueError, match="parameter group 1 has weight_decay=0"):
        CyclicalOptimizer(other.optimizer, schedules={"weight_decay": WD})


def test_momentum_of_some_groups():
    """The other groups have stepped without a buffer, and go on so."""
    inner = torch.optim.RMSprop(
        [{"params": [torch.nn.Parameter(torch.ones(n))]} for n in (2, 3)], lr=0.1
    )
    inner.param_groups[1]["momentum"] = 0.9
    step(inner)
    schedules = {"momentum": [None, triangular(2).between(0.5, 0.9)]}
    opt = CyclicalOptimizer(inner, schedules=schedules)
    step(opt)
    opt.load_state_dict(opt.state_dict())
    assert [group["momentum"] for group in opt.param_groups] == [0, 0.7]
    with pytest.raises(ValueError, match=r"schedules\['momentum'\] needs the state"):
        CyclicalOptimizer(opt.optimizer, schedules={"momentum": triangular(2).between(0.5, 0.9)})


def test_wrappers_of_several_kinds_leave_the_users_momentum():
    inner = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    by_schedule = {"schedules": {"betas[0]": triangular(3).between(0.5, 0.8)}}
    for options in (by_schedule, {"cycle_momentum": True}, by_schedule, {}):
        step(CyclicalOptimizer(inner, step_size_up=3, **options))
    assert inner.param_groups[0]["betas"] == (0.9, 0.999)


# ---- refusals

B = triangular(2)
ADAM = BY_NAME["adamw"]
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no dictionary": ([WD], TypeError, "schedules must be a dictionary .*got \\["),
    "a number": ({"eps": 0.1}, TypeError, r"schedules\['eps'\] must be a Schedule, or a list.*0.1"),
    "a text": ({"eps": "exp"}, TypeError, r"schedules\['eps'\] must be a Schedule, or a list"),
    "no name": ({3: WD}, TypeError, "name must be a string, got 3"),
    "list of others": ({"eps": [0.1]}, TypeError, r"schedules\['eps'\]\[0\] must be a Schedule or"),
    "too many": ({"eps": [WD, WD]}, ValueError, r"has 2 entries and the optimizer 1 parameter"),
    "no bounds": ({"eps": B}, ValueError, r"\['eps'\] has no bounds.*between\(low, high\)"),
    "lr": ({"lr": WD}, ValueError, "'lr' cannot follow a schedule: the policy decides the rate"),
    "params": ({"params": WD}, ValueError, "'params' cannot follow a schedule: leave it out"),
    "our key": ({"clr_step": WD}, ValueError, "'clr_step' cannot follow a schedule"),
    "odd name": ({"betas[x]": WD}, ValueError, r"'betas\[x\]' names no setting: use"),
    "unknown": ({"momentum": WD}, ValueError, "'momentum' in parameter group 0 is no setting"),
    "tuple": ({"betas": WD}, ValueError, r"'betas'.*has 2 numbers: name .* as 'betas\[0\]'"),
    "no tuple": ({"eps[0]": WD}, ValueError, r"'eps' is a single number, 1e-08: use 'eps'"),
    "out of range": ({"betas[2]": WD}, ValueError, r"'betas\[2\]' .*: give a place below 2"),
    "flag": ({"amsgrad": WD}, ValueError, "'amsgrad' in parameter group 0 is no number, but False"),
    "none": ({"foreach": WD}, ValueError, "'foreach' in parameter group 0 is no number, but"),
    "two names": ({"betas[1]": B, "betas[01]": B}, ValueError, r"'betas\[01\]' names no setting"),
    "read once": ({"initial_lr": WD}, ValueError, "leave it out, since the optimizer"),
    "no group": ({"eps": [None]}, ValueError, r"schedules\['eps'\] has no Schedule for any group"),
    "beta 1": ({"betas[1]": triangular(2).between(0.9, 1.0)}, ValueError, "rises to 1, .* below 1"),
    "scale_fn": (
        {"eps": triangular(2, scale_fn=lambda x: 1.0).between(0, 1)}, ValueError,
        r"schedules\['eps'\] has a scale_fn, which only the policy may have",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("schedules", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_follow_says_why(schedules, error, match):
    inner = ADAM.make([torch.nn.Parameter(torch.ones(2))])
    before = inner.state_dict()["param_groups"]
    with pytest.raises(error, match=match):
        CyclicalOptimizer(inner, schedules=schedules)
    assert inner.state_dict()["param_groups"] == before


def test_biases_do_not_start_to_decay():
    with pytest.raises(ValueError, match=r"group 1 has weight_decay=0, .*list with a Schedule"):
        CyclicalOptimizer(two_groups(), schedules={"weight_decay": WD})
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.0)
    CyclicalOptimizer(inner, schedules={"weight_decay": WD})  # no group decays: the user means it


@pytest.mark.parametrize(
    "schedule",
    [
        triangular(2, base_lr=0.0, max_lr=0.9),
        decay(5, base_lr=0.0, max_lr=0.9),
        exp(0.9, gamma=0.99),
        Schedule("mine", [Phase(step_size_up=2, steps=4, base_lr=0.0, max_lr=0.5)]),
    ],
    ids=lambda schedule: schedule.name,
)
def test_momentum_stays_above_0(schedule):
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="falls to 0, and a momentum of 0 has no buffer"):
        CyclicalOptimizer(inner, schedules={"momentum": schedule})
    with pytest.raises(ValueError, match=r"rises to 1\.5, and must stay at or below 1"):
        CyclicalOptimizer(inner, schedules={"momentum": triangular(2).between(0.5, 1.5)})
    with pytest.raises(ValueError, match="'momentum' cycles with cycle_momentum=True"):
        CyclicalOptimizer(inner, schedules={"momentum": WD}, cycle_momentum=True)


def test_dampening_follows_where_sgd_reads_it():
    def sgd(**options: Any) -> Any:
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, **options)

    with pytest.raises(ValueError, match="'dampening' must be 0 with nesterov=True"):
        CyclicalOptimizer(sgd(momentum=0.9, nesterov=True), schedules={"dampening": WD})
    with pytest.raises(ValueError, match="'dampening' has no effect without momentum"):
        CyclicalOptimizer(sgd(), schedules={"dampening": WD})
    momentum = triangular(2).between(0.5, 0.9)
    CyclicalOptimizer(sgd(), schedules={"dampening": WD, "momentum": momentum})


def test_a_group_without_the_setting_is_named():
    opt: Any = CyclicalOptimizer(
        BY_NAME["sign-descent"].make([torch.nn.Parameter(torch.ones(2))]), schedules={"decay": WD}
    )
    del opt.defaults["decay"]
    with pytest.warns(UserWarning, match="param_group lacks decay, .* have no effect there"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_momentum_may_begin_in_mid_run_where_torchs_may():
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    step(inner)
    opt = CyclicalOptimizer(inner, schedules={"momentum": triangular(2).between(0.5, 0.9)})
    step(opt)
    assert inner.param_groups[0]["momentum"] == 0.7
    assert inner.state_dict()["state"][0]["momentum_buffer"] is not None


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_a_settings_schedule(policy):
    make = POLICIES[policy]
    lengths = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
    schedule = make(*[5] * len(lengths)).between(0.0, 0.1)
    opt = CyclicalOptimizer(
        ADAM.make([torch.nn.Parameter(torch.ones(2))]), schedules={"eps": schedule}
    )
    for k in range(15):
        assert opt.param_groups[0]["eps"] == float(schedule([k])[0])
        step(opt)
