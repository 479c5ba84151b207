"""Changes that a plan takes in without being built anew, and parameters that it leaves to torch."""

from __future__ import annotations

import collections
import threading
import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from internals import count_builds
from native_helpers import (
    BY_NAME,
    KERNELS,
    Twins,
    assert_alike,
    drawn,
    members,
    parameters,
    threads,
    wrapped,
)

from clr_optim.plan import words
from clr_optim.plan.overlap import Memory, sharing
from clr_optim.rules import RULES


def twins(name: str, count: int = 3, **wrap: Any) -> Twins:
    case = BY_NAME[name]
    shapes = [(3, 2), (4,), ()]
    return Twins(
        lambda: case.make(parameters(drawn([shapes[i % 3] for i in range(count)], torch.float64))),
        **wrap,
    )


@pytest.fixture
def builds(monkeypatch):
    """A list that gains an item whenever a plan is built."""
    return count_builds(monkeypatch)


def step(pair: Twins, missing: set[int] | None = None) -> None:
    pair.draw()
    for opt in pair.both():
        for i, p in enumerate(members(opt)):
            if i in (missing or ()):
                p.grad = None
    pair.step()


# ---- what comes later


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside the others"])
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_first_gradients_one_after_the_other_are_taken_in(case, alone, builds):
    count = 9
    pair = twins(case.name, count)
    for last in range(count):
        there = {last} if alone else set(range(last + 1))
        step(pair, set(range(count)) - there)
    for _ in range(2):
        step(pair)
    assert len(builds) <= 1


@pytest.mark.parametrize("beneath", [True, False], ids=["beneath", "ours"])
def test_groups_one_after_the_other_are_taken_in(beneath, builds):
    pair = twins("adam-wd")
    for k in range(6):
        step(pair)
        for opt in pair.both():
            inner = opt.optimizer if beneath and opt is pair.ours else opt
            inner.add_param_group({"params": parameters(drawn([(2,), (3,)], torch.float64, k))})
    step(pair)
    assert len(builds) == 1
    assert pair.ours.iteration == 7


def test_parameters_appended_to_a_group_are_taken_in(builds):
    pair = twins("sgd-mom")
    for k in range(5):
        step(pair)
        for opt in pair.both():
            opt.param_groups[0]["params"] += parameters(drawn([(k + 1,)], torch.float64, k))
    step(pair)
    assert len(builds) == 1


def test_state_of_parameters_that_torch_serves_is_taken_in(builds):
    """Sparse gradients: each parameter has its first step after the plan was built."""
    pair = Twins(
        lambda: torch.optim.SGD(parameters(drawn([(3, 2)] * 6, torch.float64)), momentum=0.9)
    )
    for last in range(6):
        pair.draw()
        for opt in pair.both():
            for i, p in enumerate(members(opt)):
                if i > last:
                    p.grad = None
                elif i:
                    p.grad = p.grad.to_sparse()
        pair.step()
    assert len(builds) <= 2


def test_alternating_sets_of_gradients_need_one_plan(builds):
    pair = twins("adam-wd", 8)
    for k in range(8):
        step(pair, {i for i in range(8) if i % 2 == k % 2})
    assert len(builds) == 1


def test_a_setting_switched_together_with_a_first_gradient():
    pair = twins("adam-wd")
    step(pair, {1, 2})
    for opt in pair.both():
        opt.param_groups[0]["amsgrad"] = True
        opt.state.clear()
    step(pair, {2})
    step(pair)


def test_memory_that_a_latecomer_shares_is_left_to_torch():
    def make() -> torch.optim.Optimizer:
        (base,) = drawn([(6,)], torch.float64)
        return torch.optim.SGD(
            parameters([base[:4]]) + parameters([base[3:]]), lr=0.1, momentum=0.5
        )

    pair = Twins(make)
    for opt in pair.both():
        a, b = members(opt)
        b.data = a.detach()[2:]
    step(pair, {1})
    step(pair)
    assert "share memory" in pair.ours.explain()
    step(pair)


# ---- unusual structures, which torch's step takes


class Missing(collections.UserDict):
    """A mapping that is no dict."""

    def __missing__(self, key: Any) -> Any:
        self.data[key] = {}
        return self.data[key]


UNUSUAL: dict[str, Any] = {
    "params in a tuple": lambda o: o.param_groups[0].update(params=tuple(members(o))),
    "params in a deque": lambda o: o.param_groups[0].update(params=collections.deque(members(o))),
    "groups in a tuple": lambda o: setattr(o, "param_groups", tuple(o.param_groups)),
    "state in no dict": lambda o: setattr(o, "state", Missing()),
    "state in an ordered dict": lambda o: setattr(
        o, "state", type("D", (collections.defaultdict,), {})(dict)
    ),
    "betas in a list": lambda o: o.param_groups[0].update(betas=[0.8, 0.9]),
}


@pytest.mark.parametrize("started", [True, False], ids=["", "at first"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_structures(name, started, builds):
    pair = twins("adam-wd")
    if started:
        step(pair)
    for opt in pair.both():
        UNUSUAL[name](opt)
    for _ in range(2):
        step(pair)
    del builds[:]
    for _ in range(4):
        step(pair)
    assert name in ("state in no dict", "params in a deque") or not builds


def test_a_list_of_settings_that_changes_within_itself():
    class Config(collections.UserList):
        pass

    for kind in (list, Config):
        pair = twins("adam-wd")
        for opt in pair.both():
            opt.param_groups[0]["betas"] = kind([0.5, 0.9])
        for beta in (0.5, 0.6, 0.7):
            for opt in pair.both():
                opt.param_groups[0]["betas"][0] = beta
            step(pair)


# ---- lazy negations


@pytest.fixture(params=[True, False], ids=["", "torch is asked"])
def _negations(request, monkeypatch):
    """With the place of the negation bit known to the scan, and without."""
    if not request.param:
        monkeypatch.setattr(words, "_WORDS", words.Words())


asked = pytest.mark.usefixtures("_negations")


@asked
def test_negated_gradients_of_any_size():
    pair = twins("adam-wd")
    for k in range(4):
        pair.draw()
        for opt in pair.both():
            for p in members(opt):
                if k % 2:
                    p.grad = torch._neg_view(p.grad.neg())
        pair.step()


@asked
@pytest.mark.parametrize("started", [True, False], ids=["", "at first"])
def test_negated_parameters_are_left_to_torch(started):
    pair = twins("sgd-mom")
    if started:
        step(pair)
    for opt in pair.both():
        for p in members(opt)[1:]:
            p.data = torch._neg_view(p.detach().clone())
    step(pair)
    assert "lazy negations" in pair.ours.explain()
    step(pair)


@asked
def test_a_parameter_negated_in_its_place_is_noticed():
    """Address and layout stay the same."""
    pair = twins("sgd-mom")
    step(pair)
    for opt in pair.both():
        for p in members(opt):
            p.data = torch._neg_view(p.data)
    step(pair)
    step(pair)


@asked
def test_negated_state_is_left_to_torch():
    pair = twins("adam-wd")
    step(pair)
    for opt in pair.both():
        for state in opt.state.values():
            state["exp_avg"] = torch._neg_view(state["exp_avg"].neg())
    step(pair)
    step(pair)


# ---- settings are read once


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
def test_a_setting_that_another_thread_switches(flag):
    params = parameters(drawn([(3,), (2, 2)], torch.float64))
    opt = wrapped(torch.optim.Adam(params, lr=0.1))
    group, stop = opt.param_groups[0], threading.Event()

    def switch() -> None:
        while not stop.is_set():
            group[flag] = not group[flag]

    thread = threading.Thread(target=switch, daemon=True)
    thread.start()
    try:
        for k in range(300):
            for p, grad in zip(
                params, drawn([p.shape for p in params], torch.float64, k), strict=True
            ):
                p.grad = grad
            try:
                opt.step()
            except (KeyError, RuntimeError):  # torch raises too: state of another setting
                opt.state.clear()
            if k % 50 == 0:
                opt.state.clear()
    finally:
        stop.set()
        thread.join()
    assert all(p.isfinite().all() for p in params)


def test_kernel_and_slots_come_from_one_reading(monkeypatch):
    import dataclasses

    (p,) = parameters(drawn([(3,)], torch.float64))
    p.grad = torch.ones_like(p)
    opt = wrapped(torch.optim.Adam([p], lr=0.1, amsgrad=True))
    rule = RULES[torch.optim.Adam]

    def choose(settings: Any) -> str:
        opt.param_groups[0]["amsgrad"] = False  # another thread may do so at this moment
        return rule.kernel(settings)

    monkeypatch.setitem(RULES, torch.optim.Adam, dataclasses.replace(rule, choose=choose))
    opt.step()
    assert p.isfinite().all()


# ---- memory


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=12)


@given(SPANS, SPANS)
@settings(deadline=None, max_examples=200)
def test_memory_by_brute_force(first, later):
    base = torch.zeros(64)

    def places(spans: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [base[begin : begin + length] for begin, length in spans]

    def cells(span: tuple[int, int]) -> set[int]:
        return set(range(span[0], span[0] + span[1]))

    owners = [places([span]) for span in first]
    right = {
        i
        for i, one in enumerate(first)
        for j, other in enumerate(first)
        if i != j and cells(one) & cells(other)
    }
    assert sharing(owners) == right
    memory = Memory(places(first))
    taken = set().union(*map(cells, first)) if first else set()
    for span in later:
        free = not cells(span) & taken
        assert memory.add(places([span])) == free
        taken |= cells(span) if free else set()


def test_memory_of_strides_and_of_nothing():
    base = torch.zeros(4, 6)
    assert sharing([[base[:, 1::2]], [base[:, ::2]]]) == {0, 1}  # by their reach
    assert (
        sharing([[base[:2]], [base[2:]], [torch.zeros(0)], [torch.zeros(3).to_sparse()]]) == set()
    )
    assert sharing([[base[0], base[0]], [base[1]]]) == {0}


# ---- the same result whatever the order of events


@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, 5)), st.sampled_from(["", "group", "append", "clear", "list"])
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(deadline=None, max_examples=40)
def test_any_order_of_latecomers(events):
    with threads(1):
        pair = twins("adam-wd", 4)
        for seed, (there, what) in enumerate(events):
            for opt in pair.both():
                more = parameters(drawn([(2,)], torch.float64, seed))
                if what == "group":
                    opt.add_param_group({"params": more})
                elif what == "append":
                    opt.param_groups[0]["params"].extend(more)
                elif what == "clear":
                    opt.state.pop(members(opt)[0], None)
                elif what == "list":
                    opt.param_groups[-1]["params"] = list(opt.param_groups[-1]["params"])
            step(pair, set(range(len(members(pair.ours)))) - there)
        assert_alike(pair.ours, pair.twin)


# ---- from an attack


def test_an_empty_gradient_of_other_strides_needs_one_plan(builds):
    pair = Twins(
        lambda: torch.optim.SGD(parameters([torch.zeros(0, 3), torch.ones(4)]), momentum=0.9)
    )
    for _ in range(4):
        pair.draw()
        for opt in pair.both():
            members(opt)[0].grad = torch.zeros(3, 0).t()
        pair.step()
    assert len(builds) == 1


@asked
def test_a_negated_step_counter_is_left_to_torch():
    pair = twins("adam-wd")
    step(pair)
    for opt in pair.both():
        for state in opt.state.values():
            state["step"] = torch._neg_view(-state["step"] * 100)
    step(pair)
    step(pair)


def test_keys_of_a_users_own_are_none_of_the_kernels_business(builds):
    pair = twins("adam-wd")
    for k in range(4):
        for opt in pair.both():
            opt.param_groups[0]["of the user"] = [torch.ones(2), k]
            opt.param_groups[0]["history"] = [torch.zeros(3)] * k
        step(pair)
    assert len(builds) == 1
    assert "native" in pair.ours.explain()


def test_a_group_that_reads_otherwise_is_left_to_torch():
    class Live(dict):
        decay = 0.0

        def __getitem__(self, key):
            return self.decay if key == "weight_decay" else super().__getitem__(key)

    pair = twins("sgd-mom")
    for opt in pair.both():
        opt.param_groups[0] = Live(opt.param_groups[0])
    for decay in (0.0, 0.5, 0.1):
        for opt in pair.both():
            opt.param_groups[0].decay = decay
        step(pair)


def test_python_code_at_each_gradient_runs_before_pointers_are_read():
    """A torch function mode sees every `p.grad`; here it gives another parameter other memory."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        done = False

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if not self.done and args and args[0] is params[-1]:
                self.done = True
                with torch._C.DisableTorchFunction():
                    params[0].data = torch.full((8,), 100.0)
            return result

    params = parameters([torch.zeros(8) for _ in range(20)])
    opt = wrapped(torch.optim.SGD(params, lr=0.5), base_lr=0.5, max_lr=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    old = params[0].data
    with Mode():
        opt.step()
    assert old.tolist() == [-0.5] * 8
    assert params[0].tolist() == [99.5] * 8
    assert params[1].tolist() == [-1.0] * 8


def test_a_copy_made_while_another_thread_steps_is_of_one_step():
    import copy

    params = parameters(drawn([(3,)] * 30, torch.float64))
    opt = wrapped(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9))
    for p in params:
        p.grad = torch.ones_like(p)
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            opt.step()

    thread = threading.Thread(target=steps, daemon=True)
    thread.start()
    try:
        for _ in range(30):
            assert copy.deepcopy(opt).iteration >= 0
    finally:
        stop.set()
        thread.join()


def test_a_gradient_that_is_a_parameter_needs_one_plan(builds):
    pair = twins("sgd-mom")
    for _ in range(4):
        pair.draw()
        for opt in pair.both():
            for p in members(opt):
                p.grad = torch.nn.Parameter(p.grad)
        pair.step()
    assert len(builds) == 1


def test_a_step_counter_of_one_dimension_is_left_to_torch():
    pair = twins("adam-wd")
    step(pair)
    for opt in pair.both():
        for state in opt.state.values():
            state["step"] = state["step"].reshape(1)
    step(pair)
    assert "step counter" in pair.ours.explain()


def test_a_group_that_supplies_what_is_missing_is_left_to_torch():
    class Supplying(dict):
        def __missing__(self, key):
            return 0.25

    pair = twins("sgd-mom")
    for opt in pair.both():
        opt.param_groups[0] = Supplying(opt.param_groups[0])
        del opt.param_groups[0]["weight_decay"]
    step(pair)
    step(pair)


@pytest.mark.parametrize("how", ["put back", "replaced by an earlier copy"])
def test_a_group_from_an_earlier_step_does_not_turn_the_cycle_back(how):
    first, second = (parameters(drawn([(3,)], torch.float64)) for _ in range(2))
    opt = wrapped(torch.optim.SGD([{"params": first}, {"params": second}], lr=0.1))
    opt.step()
    group = opt.param_groups[1]
    if how == "put back":
        del opt.param_groups[1]
    earlier = dict(group)
    for _ in range(10):
        opt.step()
    opt.param_groups[1:] = [group if how == "put back" else earlier]
    assert opt.iteration == 11
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy has an earlier rate
        opt.step()
    assert opt.iteration == 12
    assert [group["clr_step"] for group in opt.param_groups] == [12, 12]
    assert opt.get_last_lr() == [group["lr"] for group in opt.param_groups]


def test_a_pickle_made_while_another_thread_steps_is_of_one_step():
    import pickle

    params = parameters(drawn([(3,)] * 30, torch.float64))
    opt = wrapped(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1))
    data = opt.__getstate__()
    opt.step()
    new = pickle.loads(pickle.dumps(opt))
    assert new.iteration == 1
    for group in data["optimizer"].param_groups[:7]:
        group["clr_step"] = 0  # as in a pickle of an earlier step
    other = type(opt).__new__(type(opt))
    other.__setstate__(data)
    assert {group["clr_step"] for group in other.param_groups} == {other.iteration}


# ---- a row at a time


def _new_memory(opt: Any, p: torch.Tensor) -> None:
    p.data = p.detach().clone()


def _new_state(opt: Any, p: torch.Tensor) -> None:
    opt.state[p] = dict(opt.state[p])


def _new_tensors(opt: Any, p: torch.Tensor) -> None:
    for name, value in opt.state[p].items():
        opt.state[p][name] = value.clone()


def _no_state(opt: Any, p: torch.Tensor) -> None:
    opt.state.pop(p)


def _other_entry(opt: Any, p: torch.Tensor) -> None:
    opt.state["of the user"] = [len(opt.state)]


def _another_list(opt: Any, p: torch.Tensor) -> None:
    opt.param_groups = list(opt.param_groups)


def _other_strides(opt: Any, p: torch.Tensor) -> None:
    if p.dim() == 2:
        p.data = p.detach().t().contiguous().t()
        p.grad = p.grad.t().contiguous().t()
        for name, value in opt.state[p].items():
            if value.dim() == 2:
                opt.state[p][name] = value.t().contiguous().t()


CHANGES = {
    change.__name__.strip("_"): change
    for change in (
        _new_memory, _new_state, _new_tensors, _no_state, _other_entry, _another_list,
        _other_strides,
    )
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_one_row_that_changes_at_each_step_needs_one_plan(case, change, builds):
    if (
        change in ("new_state", "new_tensors", "no_state", "other_strides")
        and case.name == "sgd-wd"
    ):
        pytest.skip("plain SGD keeps no state")
    pair = twins(case.name, 6)
    for k in range(8):
        pair.draw()
        if k:
            for opt in pair.both():
                CHANGES[change](opt, members(opt)[k % 6])
        pair.step()
    assert len(builds) == 1


def test_more_rows_than_a_few_need_a_new_plan(builds):
    pair = twins("adam-wd", 12)
    for _ in range(4):
        pair.draw()
        for opt in pair.both():
            for p in members(opt):
                p.data = p.detach().clone()
        pair.step()
    assert len(builds) == 4


def test_a_resized_row_needs_another_place():
    pair = twins("adam-wd", 6)
    for k in range(4):
        pair.draw()
        for opt in pair.both():
            p = members(opt)[1]
            if p.numel() > 1 and k:
                p.grad = None
                p.data = p.detach()[:-1].clone()
                p.grad = torch.ones_like(p)
                for name, value in opt.state[p].items():
                    if value.dim():
                        opt.state[p][name] = value[:-1].clone()
        pair.step()


def test_a_row_that_comes_to_share_memory_is_left_to_torch():
    pair = twins("sgd-mom", 6)
    for k in range(3):
        pair.draw()
        for opt in pair.both():
            a, b = members(opt)[1], members(opt)[4]
            if k:
                b.data = a.data
        pair.step()
    assert "share memory" in pair.ours.explain()


def test_state_popped_of_a_parameter_without_a_gradient():
    pair = twins("adam-wd", 3)
    step(pair)
    for opt in pair.both():
        opt.state.pop(members(opt)[1])
    step(pair, {1})
    step(pair)
    step(pair)


def test_what_was_left_for_its_state_is_served_once_the_state_is_gone():
    pair = twins("adam-wd", 3)
    step(pair)
    for opt in pair.both():
        for state in opt.state.values():
            state["step"] = state["step"].reshape(1)
    step(pair)
    assert "torch" in pair.ours.explain()
    for opt in pair.both():
        opt.state.clear()
    step(pair)
    assert "torch" not in pair.ours.explain()
