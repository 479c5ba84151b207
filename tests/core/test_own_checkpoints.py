"""Our ``state_dict()`` loads into ours and into torch's optimizer. Ours loads torch's too."""

from __future__ import annotations

import collections
import copy
import io
import re
import time

import numpy as np
import pytest
import torch
from cases import EVERY_CLASS, Problem
from list_config import ListConfig
from resume_helpers import assert_resumes_as_unwrapped, resumes
from torch import nn

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import fixed, triangular, warm_restarts

BACKENDS = ["auto", "torch"]


def weight(*shape):
    param = nn.Parameter(torch.ones(shape or (3,)))
    param.grad = torch.ones_like(param)
    return param


# ---- every class


@pytest.mark.parametrize("own", [False, True], ids=["", "own"])
@pytest.mark.parametrize("case", EVERY_CLASS, ids=lambda case: case.name)
def test_a_checkpoint_resumes_as_unwrapped(case, own):
    def step(problem, opt, k):
        problem.step(opt, k, case.closure)

    arguments = (lambda problem: case.make(problem.params)), (lambda: Problem(case)), step
    values = {"tensors": lambda problem: problem.params}
    assert resumes(*arguments, wrapped=False, own=own, **values)
    assert_resumes_as_unwrapped(*arguments, own=own, **values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["coo", "uncoalesced"])
def test_a_sparse_momentum_buffer_resumes(backend, layout):
    def make():
        torch.manual_seed(0)
        rows = nn.Embedding(6, 3, sparse=True)
        inner = torch.optim.SGD(rows.parameters(), lr=0.1, momentum=0.9)
        return rows, CyclicalOptimizer(inner, step_size_up=4, backend=backend)

    def train(rows, opt, steps):
        for k in steps:
            opt.zero_grad()
            rows(torch.tensor([k % 6, (k + 2) % 6])).square().sum().backward()
            opt.step()

    rows, opt = make()
    train(rows, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    buffer = saved["state"][0]["momentum_buffer"]
    assert buffer.layout is torch.sparse_coo
    if layout == "coo":
        saved["state"][0]["momentum_buffer"] = buffer.coalesce()
    other, resumed = make()
    other.load_state_dict(rows.state_dict())
    resumed.load_state_dict(saved)
    for each in ((rows, opt), (other, resumed)):
        train(*each, range(3, 6))
    assert torch.equal(rows.weight, other.weight)


# ---- settings


class Unpacks:
    """An object with only what torch needs of betas."""

    def __iter__(self):
        return iter((0.9, 0.99))


class Number:
    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value

    def __mul__(self, other):
        return self.value * other

    __rmul__ = __mul__

    def __ne__(self, other):
        return self.value != other

    __hash__ = None


SETTINGS = {
    "a sequence": ("Adam", {"betas": ListConfig([0.9, 0.99])}),
    "what unpacks": ("RAdam", {"betas": Unpacks()}),
    "a list": ("NAdam", {"betas": [0.9, 0.99]}),
    "a deque": ("Adamax", {"betas": collections.deque([0.9, 0.99])}),
    "an array": ("Adam", {"betas": np.array([0.9, 0.99])}),
    "a tensor": ("RAdam", {"betas": torch.tensor([0.9, 0.99])}),
    "tensors in a list": ("RAdam", {"betas": [torch.tensor(0.9), torch.tensor(0.99)]}),
    "numpy's numbers": ("Adam", {"eps": np.float32(1e-8), "weight_decay": np.float64(0.1)}),
    "numpy's integers": ("SGD", {"momentum": np.int64(0), "dampening": np.int32(0)}),
    "numpy's flags": ("Adam", {"amsgrad": np.bool_(True), "maximize": np.bool_(False)}),
    "numpy's flag nesterov": ("SGD", {"momentum": 0.9, "nesterov": np.bool_(True)}),
    "0-dim arrays": ("Adagrad", {"lr_decay": np.array(0.1)}),
    "0-dim tensors": ("Adam", {"betas": (torch.tensor(0.9), 0.99), "eps": torch.tensor(1e-8)}),
    "1-dim tensors": ("RMSprop", {"eps": torch.tensor([1e-8])}),
    "a value for each element": ("RMSprop", {"eps": torch.full((3,), 1e-8)}),
    "numbers as flags": ("Adam", {"amsgrad": 1, "maximize": 0}),
    "a number of the user's own": ("Adagrad", {"lr_decay": Number(0.1)}),
}  # fmt: skip


@pytest.mark.parametrize("per_group", [False, True], ids=["", "per group"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_any_type_load(name, per_group):
    cls, options = SETTINGS[name]
    cls = getattr(torch.optim, cls)

    def make():
        params = [weight(), weight()]
        if per_group:
            inner = cls([{"params": params[:1], **options}, {"params": params[1:]}], lr=0.01)
        else:
            inner = cls(params, lr=0.01, foreach=False)
            for group in inner.param_groups:
                group.update(options)  # torch's constructor compares betas, its step does not
        return params, CyclicalOptimizer(inner, step_size_up=4, backend="torch")

    params, opt = make()
    opt.step()
    others, resumed = make()
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for mine, other in zip(others, params, strict=True):
        mine.data.copy_(other)
    for each in (opt, resumed):
        each.step()
    assert resumed.iteration == 2
    assert all(map(torch.equal, params, others))


# ---- state dict layouts that wrapped optimizers define


class Around(torch.optim.Optimizer):
    """An optimizer that holds another one and shows its groups."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0
        self.defaults, self.state = inner.defaults, inner.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    @property
    def param_groups(self):
        return self.inner.param_groups

    def step(self, closure=None):
        self.count += 1
        return self.inner.step(closure)

    def state_dict(self):
        return {"fast": self.inner.state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        self.inner.load_state_dict(state_dict["fast"])


class OnlyState(Around):
    """An optimizer whose state dict has no groups."""

    def state_dict(self):
        return {"moments": self.inner.state_dict()["state"], "count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        saved = self.inner.state_dict()
        self.inner.load_state_dict({**saved, "state": state_dict["moments"]})


class KnownSettings(Around):
    """An optimizer that saves only the settings it knows, under torch's names."""

    def state_dict(self):
        saved = self.inner.state_dict()
        known = [*self.defaults, "params"]
        saved["param_groups"] = [{k: g[k] for k in known if k in g} for g in saved["param_groups"]]
        return {**saved, "count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        self.inner.load_state_dict(state_dict)


class Several(torch.optim.Optimizer):
    """An optimizer for each parameter. Each access puts the groups together anew."""

    def __init__(self, optimizers):
        self.optimizers, self.defaults, self.count = optimizers, {}, 0

    @property
    def param_groups(self):
        return [group for opt in self.optimizers for group in opt.param_groups]

    @property
    def state(self):
        return {p: s for opt in self.optimizers for p, s in opt.state.items()}

    def step(self, closure=None):
        self.count += 1
        for opt in self.optimizers:
            opt.step()

    def zero_grad(self, set_to_none=True):
        for opt in self.optimizers:
            opt.zero_grad(set_to_none)

    def state_dict(self):
        return {str(i): opt.state_dict() for i, opt in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict):
        for i, saved in state_dict.items():
            self.optimizers[int(i)].load_state_dict(saved)


class AsList(Several):
    def state_dict(self):
        return [opt.state_dict() for opt in self.optimizers]

    def load_state_dict(self, state_dict):
        for opt, saved in zip(self.optimizers, state_dict, strict=True):
            opt.load_state_dict(saved)


def several(params):
    return [torch.optim.Adam(params[:1], lr=0.01), torch.optim.SGD(params[1:], 0.1, momentum=0.9)]


LAYOUTS = {
    "around": lambda params: Around(torch.optim.Adam(params, lr=0.01)),
    "around, lr a tensor": lambda params: Around(
        torch.optim.Adam(params, lr=torch.tensor(0.01), foreach=False)
    ),
    "only state": lambda params: OnlyState(torch.optim.Adam(params, lr=0.01)),
    "known settings": lambda params: KnownSettings(torch.optim.Adam(params, lr=0.01)),
    "several": lambda params: Several(several(params)),
    "a list": lambda params: AsList(several(params)),
    "hooks": lambda params: hooked(torch.optim.Adam(params, lr=0.01)),
}


def hooked(opt):
    opt.register_state_dict_post_hook(lambda opt, saved: {"of this run": saved})
    opt.register_load_state_dict_pre_hook(lambda opt, saved: saved["of this run"])
    return opt


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_its_own_resumes(name):
    def make():
        params = [weight(2, 3), weight(4)]
        opt = CyclicalOptimizer(LAYOUTS[name](params), step_size_up=3, backend="torch")
        return params, opt

    params, opt = make()
    for _ in range(4):
        opt.step()
    opt.set_bounds(max_lr=0.5)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others, resumed = make()
    with pytest.warns(UserWarning, match="the checkpoint's bounds hold from here on"):
        resumed.load_state_dict(torch.load(file, weights_only=True))
    for mine, other in zip(others, params, strict=True):
        mine.data.copy_(other)
    assert resumed.iteration == 4
    assert resumed.get_last_lr() == opt.get_last_lr()
    assert [g["clr_max_lr"] for g in resumed.param_groups] == [0.5] * len(opt.param_groups)
    for _ in range(4):
        opt.step()
        resumed.step()
    assert all(map(torch.equal, params, others))
    # A checkpoint of the plain optimizer starts at step 0 and keeps the bounds.
    resumed.load_state_dict(LAYOUTS[name](params).state_dict())
    assert resumed.iteration == 0
    assert resumed.lr_at(3) == [0.5] * len(opt.param_groups)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_its_own_loads_into_the_plain_optimizer(name):
    params = [weight(2, 3), weight(4)]
    opt = CyclicalOptimizer(LAYOUTS[name](params), step_size_up=3, backend="torch")
    opt.step()
    LAYOUTS[name](params).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("name", ["around", "known settings", "several", "a list"])
def test_a_layout_of_its_own_is_put_back_if_it_cannot_be_loaded(name):
    params = [weight(2, 3), weight(4)]
    opt = CyclicalOptimizer(LAYOUTS[name](params), step_size_up=3, backend="torch")
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved_groups = saved.get("fast", saved) if isinstance(saved, dict) else saved[0]
    if "clr_optim" in saved:
        saved["clr_optim"][0]["clr_base_lr"] = 7.0
    else:
        saved_groups = saved_groups.get("0", saved_groups)
        saved_groups["param_groups"][0]["clr_base_lr"] = 7.0
    before = str((opt.param_groups, opt.state, opt.optimizer.count))
    opt.optimizer.count = 1
    with pytest.raises(ValueError, match=r"base_lr=7.0 is above"):
        opt.load_state_dict(saved)
    assert str((opt.param_groups, opt.state, opt.optimizer.count)) == before
    opt.step()
    assert opt.iteration == 2


# ---- load hooks of the wrapped optimizer


def test_hooks_run_once_and_what_they_return_is_checked():
    seen = []

    def renamed(opt, saved):
        seen.append(opt)
        return {"state": saved["optimizer_state"], "param_groups": saved["groups"]}

    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01), step_size_up=4)
    opt.step()
    saved = opt.state_dict()
    opt.optimizer.register_load_state_dict_pre_hook(renamed)
    opt.load_state_dict({"optimizer_state": saved["state"], "groups": saved["param_groups"]})
    assert seen == [opt.optimizer]
    assert opt.iteration == 1
    bad = copy.deepcopy(saved)
    bad["state"][0]["exp_avg"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"\['exp_avg'\] must be a dense"):
        opt.load_state_dict({"optimizer_state": bad["state"], "groups": bad["param_groups"]})
    assert opt.state_dict()["state"][0]["exp_avg"].shape == (3,)


def test_a_hook_that_raises_is_heard_as_in_torch():
    class RefusedError(KeyError):
        pass

    def refuse(opt, saved):
        opt.param_groups[0]["lr"] = 7.0
        raise RefusedError("old format")

    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01))
    opt.optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RefusedError):
        opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.0025
    opt.step()


def test_a_hook_may_add_the_group_that_a_checkpoint_has():
    def grown(opt, saved):
        for _ in range(len(opt.param_groups), len(saved["param_groups"])):
            opt.add_param_group({"params": [weight()]})

    def make():
        return CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01), step_size_up=4)

    opt, resumed = make(), make()
    opt.add_param_group({"params": [weight()], "max_lr": 0.5})
    opt.step()
    resumed.optimizer.register_load_state_dict_pre_hook(grown)
    resumed.load_state_dict(opt.state_dict())
    assert resumed.get_last_lr() == opt.get_last_lr()
    resumed.step()


def test_a_hook_may_make_a_checkpoint_of_anything():
    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01), step_size_up=4)
    opt.step()
    saved = opt.state_dict()
    opt.optimizer.register_load_state_dict_pre_hook(lambda opt, parts: dict(parts))
    opt.load_state_dict(list(saved.items()))
    assert opt.iteration == 1


# ---- older checkpoints


@pytest.mark.parametrize("case", EVERY_CLASS, ids=lambda case: case.name)
def test_settings_that_torch_fills_in_may_be_missing(case):
    """The groups also hold settings that no class has."""
    problem, other = Problem(case), Problem(case)
    plain = case.make(problem.params)
    problem.run(plain, range(2), closure=case.closure)
    saved = copy.deepcopy(plain.state_dict())
    probe = copy.deepcopy(plain)
    for group in probe.param_groups:
        for key in set(group) - {"params", "lr"}:
            del group[key]
    try:
        probe.__setstate__({"state": {}})
    except KeyError:
        return
    for group in saved["param_groups"]:
        for key in set(probe.param_groups[0]) & set(group) - {"params", "lr"}:
            del group[key]
        group.update(old_name_of_a_setting=3, another={"a": 1})
    ours, twin = (
        CyclicalOptimizer(case.make(problem.params), fixed(case.lr)),
        case.make(other.params),
    )
    for each in (ours, twin):
        each.load_state_dict(copy.deepcopy(saved))
    assert set(twin.param_groups[0]) <= set(ours.param_groups[0])


def test_state_that_the_default_settings_would_need():
    """Load an old Adam without amsgrad where the code has amsgrad on.

    torch goes on without amsgrad.
    """
    param = weight()
    plain = torch.optim.Adam([param], lr=0.01)
    plain.step()
    saved = plain.state_dict()
    del saved["param_groups"][0]["amsgrad"]
    opt = CyclicalOptimizer(torch.optim.Adam([param], lr=0.01, amsgrad=True))
    opt.load_state_dict(saved)
    opt.step()
    assert opt.param_groups[0]["amsgrad"] is False


# ---- rates and bounds that disagree


def started(lr=0.01, **options):
    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=lr), step_size_up=4, **options)
    opt.step()
    return opt


def test_an_edited_lr_warns_once_and_names_set_bounds():
    opt = started()
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] *= 10
    with pytest.warns(
        UserWarning, match=r"group 0 \(0.04375 instead of 0.004375\).*set_bounds"
    ) as w:
        opt.load_state_dict(saved)
    assert [each.filename for each in w] == [__file__]
    assert opt.param_groups[0]["lr"] == opt.lr_at(1)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_rate_that_was_rounded_does_not_warn(dtype):
    lr = torch.tensor(0.003, dtype=dtype)
    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=lr, foreach=False), step_size_up=7)
    for _ in range(9):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step()
    float_opt = started()
    saved = float_opt.state_dict()
    saved["param_groups"][0]["lr"] = np.float32(saved["param_groups"][0]["lr"])
    float_opt.load_state_dict(saved)
    saved["param_groups"][0]["lr"] = float(saved["param_groups"][0]["lr"])
    float_opt.load_state_dict(saved)


@pytest.mark.parametrize("remembered", [True, False])
def test_a_checkpoint_of_another_policy_is_judged_by_its_own(remembered):
    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01), "exp_range", step_size_up=9)
    opt.set_iteration(20)
    saved = opt.state_dict()
    if not remembered:
        del saved["param_groups"][0]["clr_schedule"]
        started().load_state_dict(saved)
        return
    with pytest.warns(UserWarning, match="was written under the policy") as caught:
        started().load_state_dict(saved)
    assert len(caught) == 1


class OfItsCycle:
    def __call__(self, cycle):
        return 1.0 / (1.0 + cycle)


SCALED = {"scale_fn": OfItsCycle(), "scale_mode": "iterations", "step_size_up": 3}
POLICY_CALLS = [
    ({}, "triangular()"),
    ({"step_size_up": 9}, "triangular(step_size_up=9)"),
    (
        {"policy": "exp_range", "step_size_up": 9, "step_size_down": 2000, "gamma": 0.5},
        "exp_range(step_size_up=9, step_size_down=2000, gamma=0.5)",
    ),
    ({"policy": "triangular2", "window": "hann"}, "triangular2(window='hann')"),
    ({"policy": fixed(0.5)}, repr(fixed(0.5))),
    (SCALED, "triangular(step_size_up=3, scale_fn=test_own_checkpoints.OfItsCycle, scale_mode="),
    ({"policy": "exp_range", **SCALED}, "Schedule('exp_range', [Phase(step_size_up=3, "),
    (
        {"policy": warm_restarts(3, period_multiplier=2)},
        "Schedule('warm_restarts', [Phase(step_size_down=3, window='hann', steps=3), and 60 more])",
    ),
]


@pytest.mark.parametrize(("options", "call"), POLICY_CALLS)
def test_the_warning_about_another_policy_shows_both_as_calls(options, call):
    saved = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01), **options).state_dict()
    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01), step_size_up=7)
    with pytest.warns(UserWarning, match=re.escape(f"under the policy {call}")) as caught:
        opt.load_state_dict(saved)
    (message,) = (str(each.message) for each in caught)
    assert "this optimizer's policy, triangular(step_size_up=7), decides from step 0 on" in message
    assert "{" not in message
    plain = torch.optim.Adam([weight()], lr=0.01)
    plain.load_state_dict(saved)
    with pytest.warns(
        UserWarning, match=re.escape(f"optimizer was written under the policy {call}")
    ):
        CyclicalOptimizer(plain, step_size_up=7)


def test_a_policy_of_another_version_is_shown_by_name():
    saved = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01)).state_dict()
    saved["param_groups"][0]["clr_schedule"] = (
        '{"format": 99, "name": "spiral", "phases": [{"turns": 3}]}'
    )
    opt = CyclicalOptimizer(torch.optim.Adam([weight()], lr=0.01))
    with pytest.warns(UserWarning, match=r"policy 'spiral' of another version, \{.*turns"):
        opt.load_state_dict(saved)


def test_bounds_of_several_groups_are_shown_as_lists():
    def two_groups():
        return torch.optim.Adam([{"params": [weight()]}, {"params": [weight()]}], lr=0.01)

    saved = CyclicalOptimizer(two_groups(), base_lr=0.1, max_lr=[0.2, 0.3]).state_dict()
    opt = CyclicalOptimizer(two_groups(), base_lr=[0.0, 0.1], max_lr=0.3)
    with pytest.warns(UserWarning, match="checkpoint's bounds hold") as caught:
        opt.load_state_dict(saved)
    assert "bounds base_lr=0.1, max_lr=[0.2, 0.3], and" in str(caught[0].message)
    remedy = re.search(r"call (set_bounds\(.*\)) after", str(caught[0].message))[1]
    eval(f"opt.{remedy}", {"opt": opt})
    assert (opt.base_lr, opt.max_lr) == ([0.0, 0.1], 0.3)
    plain = two_groups()
    plain.load_state_dict(saved)
    with pytest.warns(UserWarning, match="the arguments hold") as caught:
        opt = CyclicalOptimizer(plain, max_lr=0.3)
    remedy = re.search(r"call (set_bounds\(.*\))\.", str(caught[0].message))[1]
    eval(f"opt.{remedy}", {"opt": opt})
    assert (opt.base_lr, opt.max_lr) == (0.1, [0.2, 0.3])


def test_a_plain_checkpoint_does_not_warn():
    opt = started()
    plain = torch.optim.Adam([weight()], lr=0.7)
    opt.load_state_dict(plain.state_dict())
    assert opt.lr_at(4) == [0.01]


def test_bounds_of_the_code_that_are_not_the_checkpoints():
    saved = started().state_dict()
    for make in (lambda: started(max_lr=0.5), lambda: started(lr=0.5)):
        opt = make()
        with pytest.warns(UserWarning, match=r"bounds hold.*set_bounds\(base_lr=0.125, max_lr=0.5"):
            opt.load_state_dict(saved)
        assert opt.lr_at(4) == [0.01]
        opt.load_state_dict(saved)  # the checkpoint's bounds are now in use
    opt = started()
    opt.set_bounds(max_lr=0.5)
    opt.load_state_dict(saved)  # back to the code's bounds
    CyclicalOptimizer(torch.optim.Adam([weight()], lr=9.0), fixed(0.1)).load_state_dict(
        CyclicalOptimizer(torch.optim.Adam([weight()], lr=8.0), fixed(0.1)).state_dict()
    )


def test_bounds_of_another_argument_when_a_loaded_optimizer_is_wrapped():
    saved = started().state_dict()
    plain = torch.optim.Adam([weight()], lr=0.01)
    plain.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"the arguments hold.*set_bounds\(base_lr=0.0025"):
        opt = CyclicalOptimizer(plain, max_lr=0.5, step_size_up=4)
    assert (opt.iteration, opt.lr_at(0), opt.lr_at(4)) == (1, [0.125], [0.5])


def test_nothing_is_written_before_a_checkpoint_is_known_to_be_good():
    opt = started()
    opt.optimizer.add_param_group({"params": [weight()]})
    before = str(opt.param_groups)
    with pytest.raises(ValueError, match=r"lacks \['state', 'param_groups'\]"):
        opt.load_state_dict({})
    assert str(opt.param_groups) == before


# ---- time


def test_many_groups_load_in_less_than_twice_torchs_time():
    def best(opt, saved):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            opt.load_state_dict(saved)
            times.append(time.perf_counter() - start)
        return min(times)

    def ratio(groups):
        plain = torch.optim.Adam([{"params": [weight()]} for _ in range(groups)], lr=0.01)
        plain.step()
        saved = copy.deepcopy(plain.state_dict())
        ours = CyclicalOptimizer(copy.deepcopy(plain), triangular(4), backend="torch")
        return best(ours, copy.deepcopy(ours.state_dict())) / best(plain, saved)

    assert min(ratio(500) for _ in range(3)) < 2.5  # 1.6 on a quiet machine
