"""Damaged, foreign or malicious checkpoints are refused whole, or migrated as documented.

With TRITON_INTERPRET=1 (``make interpreted``) a part of the tests runs on the Triton backend.
Otherwise all tests run on the other two backends.
"""

from __future__ import annotations

import ast
import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, EVERY_CLASS, Case, Problem
from internals import notes_of
from torch import Tensor
from triton_helpers import INTERPRETED

import clr_optim.kernels
from clr_optim import CyclicalOptimizer
from clr_optim.rules import STATE_SLOTS

NAN, INF = math.nan, math.inf
BACKENDS = ("triton",) if INTERPRETED else ("torch", "native")
FUSED = ["sgd-momentum", "adam", "adagrad-decay-start", "adadelta", "rmsprop-mom-cent"]

Checkpoint = dict[str, Any]


def started(case: Case, backend: str, **options: Any) -> tuple[CyclicalOptimizer[Any], Problem]:
    """Return an optimizer after three steps.

    It has two groups, unless the class allows one only.
    """
    problem = Problem(case)
    parts = [problem.params[:1], problem.params[1:]]
    if case.cls is torch.optim.LBFGS:
        parts = [problem.params]
    opt = CyclicalOptimizer(
        case.make([{"params": part} for part in parts]),
        "triangular2",
        step_size_up=4,
        max_lr=[case.lr, case.lr / 2][: len(parts)],
        backend=backend,
        **options,
    )
    problem.run(opt, range(3), closure=case.closure)
    return opt, problem


def frozen(value: Any) -> Any:
    """Return all bits of a value, and the identities of the objects in it."""
    if isinstance(value, Tensor):
        return id(value), value.dtype, tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return id(value), {
            id(k) if isinstance(k, Tensor) else k: frozen(v) for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return id(value), [frozen(v) for v in value]
    return type(value), repr(value)


def snapshot(opt: CyclicalOptimizer[Any], problem: Problem) -> Any:
    whole = (opt.param_groups, opt.state, opt.defaults, problem.params)
    return (
        [frozen(part) for part in whole],
        {k: frozen(v) for k, v in notes_of(opt).items()},
        sorted(vars(opt.optimizer)),
    )


def assert_refused(
    opt: CyclicalOptimizer[Any], problem: Problem, checkpoint: Any, pattern: str
) -> str:
    """Assert that the load raises our error, changes nothing, and training goes on.

    Return the message.
    """
    twin, twins_problem = copy.deepcopy((opt, problem))
    before = snapshot(opt, problem)
    with pytest.raises((TypeError, ValueError), match=pattern) as caught:
        opt.load_state_dict(checkpoint)
    assert type(caught.value) in (TypeError, ValueError)
    assert snapshot(opt, problem) == before
    for k in range(3, 5):
        problem.step(opt, k, closure=isinstance(opt.optimizer, torch.optim.LBFGS))
        twins_problem.step(twin, k, closure=isinstance(opt.optimizer, torch.optim.LBFGS))
    for mine, its in zip(problem.params, twins_problem.params, strict=True):
        assert torch.equal(mine, its)
    assert opt.get_last_lr() == twin.get_last_lr()
    return str(caught.value)


def set_group(index: int = 0, **keys: Any) -> Callable[[Checkpoint], None]:
    return lambda s: s["param_groups"][index].update(keys)


def drop_group_key(key: str) -> Callable[[Checkpoint], None]:
    return lambda s: s["param_groups"][0].pop(key)


def set_state(name: str, value: Any, index: int = 0) -> Callable[[Checkpoint], None]:
    """Return an attack that puts ``value``, or its result for the old state, in a state's place."""

    def damage(s: Checkpoint) -> None:
        old = s["state"][index][name]
        s["state"][index][name] = value(old) if callable(value) else value

    return damage


def with_both(s: Checkpoint) -> None:
    s["state"][0]["exp_avg_sq"] = s["state"][0]["exp_avg"]


def schedule_of(**keys: Any) -> Callable[[Checkpoint], None]:
    def damage(s: Checkpoint) -> None:
        for group in s["param_groups"]:
            group["clr_schedule"] = json.dumps({**json.loads(group["clr_schedule"]), **keys})

    return damage


def positions(value: Any) -> Callable[[Checkpoint], None]:
    return lambda s: [group.update(clr_step=value) for group in s["param_groups"]] and None


class Trap:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> Any:
        return (exec, ("raise RuntimeError('a checkpoint has run code')",))


STATE_OF_0 = r"\['state'\]\[0\]"
GROUP_0 = r"\['param_groups'\]\[0\]"
WHOLE = rf"{GROUP_0}\['clr_step'\] must be a whole number of steps, got"

# name: (the change to an Adam's state dict, or the object in its place; pattern)
ATTACKS: dict[str, tuple[Any, str]] = {
    # ---- not a checkpoint
    "None": (None, "state_dict must be a dictionary .*got None"),
    "a list": ([], "state_dict must be a dictionary"),
    "a string": ("checkpoint.pt", "state_dict must be a dictionary .*'checkpoint.pt'"),
    "a tensor": (torch.ones(1000), r"state_dict must be a dictionary .*a tensor of shape \[1000\]"),
    "empty": ({}, r"state_dict lacks \['state', 'param_groups'\]"),
    "no state": (lambda s: s.pop("state"), r"state_dict lacks \['state'\]"),
    "no groups": (lambda s: s.pop("param_groups"), r"lacks \['param_groups'\]"),
    "state None": (lambda s: s.update(state=None), r"\['state'\] must be a dictionary.*None"),
    "state a list": (lambda s: s.update(state=[{}]), r"\['state'\] must be a dictionary"),
    "groups None": (lambda s: s.update(param_groups=None), "must be a list of dictionaries, got None"),
    "groups a dictionary": (
        lambda s: s.update(param_groups={0: s["param_groups"][0]}), "must be a list of dictionaries",
    ),
    "a group None": (
        lambda s: s["param_groups"].__setitem__(1, None), "must be a list of dictionaries",
    ),
    # ---- groups
    "a group less": (lambda s: s["param_groups"].pop(), r"groups of \[1\] .* of \[1, 2\]: build"),
    "a group more": (
        lambda s: s["param_groups"].append(s["param_groups"][0]), r"groups of \[1, 2, 1\]",
    ),
    "groups exchanged": (lambda s: s["param_groups"].reverse(), r"groups of \[2, 1\]"),
    "a parameter less": (lambda s: s["param_groups"][1]["params"].pop(), r"groups of \[1, 1\]"),
    "params None": (set_group(params=None), f"{GROUP_0} needs 'lr' and a list of 'params'"),
    "params a string": (set_group(params="0"), "needs 'lr' and a list of 'params'"),
    "params twice": (set_group(1, params=[1, 1]), r"\[1\]\['params'\] has 1 again, and each"),
    "params twice, over groups": (set_group(1, params=[0, 1]), r"has 0 again"),
    "params out of range": (set_group(1, params=[1, 7]), r"\['state'\]\[2\] belongs to no parameter"),
    "params unhashable": (set_group(params=[[0]]), r"must hold numbers or names .* got \[0\]"),
    "params None inside": (set_group(params=[None]), "must hold numbers or names .* got None"),
    "params a flag": (set_group(params=[False]), "must hold numbers or names .* got False"),
    "params tensors": (set_group(params=[torch.ones(4, 3)]), "must hold numbers or names"),
    "params NaN": (set_group(params=[NAN]), "must hold numbers or names .* got nan"),
    # ---- settings
    "no lr": (drop_group_key("lr"), f"{GROUP_0} needs 'lr'"),
    "lr None": (set_group(lr=None), rf"{GROUP_0}\['lr'\] must be a number, got None"),
    "lr a string": (set_group(lr="0.1"), r"\['lr'\] must be a number, got '0.1'"),
    "lr NaN": (set_group(lr=NAN), r"\['lr'\] must be a finite number, got nan"),
    "lr an infinite tensor": (set_group(lr=torch.tensor(INF)), r"\['lr'\] must be a finite number"),
    "lr two": (set_group(lr=torch.ones(2)), "floating point tensor of one element"),
    "lr an integer tensor": (set_group(lr=torch.tensor(1)), "floating point tensor of one element"),
    "lr complex": (set_group(lr=1j), r"\['lr'\] must be a number, got 1j"),
    "no betas": (drop_group_key("betas"), rf"{GROUP_0} lacks \['betas'\], without which Adam cannot"),
    "no eps": (drop_group_key("eps"), r"lacks \['eps'\]"),
    "betas None": (set_group(betas=None), rf"{GROUP_0}\['betas'\] must be a setting such as \(0.9"),
    "betas one": (set_group(betas=(0.9,)), r"\['betas'\] must be a setting"),
    "betas NaN": (set_group(betas=(NAN, 0.9)), r"\['betas'\] must be a setting"),
    "betas strings": (set_group(betas=("0.9", "0.99")), r"\['betas'\] must be a setting"),
    "eps a string": (set_group(eps="1e-8"), r"\['eps'\] must be a setting such as 1e-08, got '1e-8'"),
    "eps NaN": (set_group(eps=torch.tensor(NAN)), r"\['eps'\] must be a setting"),
    "eps None": (set_group(eps=None), r"\['eps'\] must be a setting"),
    "weight_decay a list": (set_group(weight_decay=[0.1]), r"\['weight_decay'\] must be a setting"),
    "amsgrad a string": (set_group(amsgrad="no"), r"\['amsgrad'\] must be a setting such as False"),
    "foreach a list": (set_group(foreach=[]), r"\['foreach'\] must be a setting"),
    "a key that is no string": (
        lambda s: s["param_groups"][0].update({7: 7}) or s["param_groups"][0].pop("betas"),
        r"another optimizer class than Adam: its groups have \['7'\] and lack \['betas'\]",
    ),
    # ---- the position
    "clr_step -1": (positions(-1), rf"{GROUP_0}\['clr_step'\] must be an integer >= 0, got -1"),
    "clr_step 2**70": (positions(2**70), r"\['clr_step'\] must be an integer <= 2\*\*63 - 1"),
    "clr_step 2**63": (positions(2**63), r"\['clr_step'\] must be an integer <= 2\*\*63 - 1"),
    "clr_step 1e300": (positions(1e300), r"\['clr_step'\] must be an integer <= 2\*\*63 - 1"),
    "clr_step NaN": (positions(NAN), f"{WHOLE} nan"),
    "clr_step infinite": (positions(INF), f"{WHOLE} inf"),
    "clr_step 1.5": (positions(1.5), f"{WHOLE} 1.5"),
    "clr_step True": (positions(True), r"\['clr_step'\] must be an integer >= 0, got True"),
    "clr_step None": (positions(None), r"\['clr_step'\] must be an integer >= 0, got None"),
    "clr_step a string": (positions("3"), r"\['clr_step'\] must be an integer >= 0, got '3'"),
    "clr_step a list": (positions([3]), r"\['clr_step'\] must be an integer >= 0"),
    "clr_step a NaN tensor": (positions(torch.tensor(NAN)), f"{WHOLE} nan"),
    "clr_step a negative tensor": (positions(torch.tensor(-4)), "must be an integer >= 0, got -4"),
    "clr_step a flag tensor": (positions(torch.tensor(True)), "must be an integer >= 0, got True"),
    "clr_step two": (positions(torch.tensor([1, 1])), r"\['clr_step'\] must be an integer"),
    "clr_step on meta": (positions(torch.tensor(3, device="meta")), r"\['clr_step'\] must be an int"),
    "clr_step complex": (positions(torch.tensor(1j)), r"\['clr_step'\] must be an integer"),
    "clr_step of one group": (set_group(clr_step=9), "disagree on clr_step: {0: 9, 1: 3}.*set them"),
    # ---- bounds
    "base NaN": (set_group(clr_base_lr=NAN), rf"{GROUP_0}\['clr_base_lr'\] must be a finite"),
    "base negative": (set_group(clr_base_lr=-0.1), r"\['clr_base_lr'\] must be .* >= 0, got -0.1"),
    "max infinite": (set_group(clr_max_lr=INF), r"\['clr_max_lr'\] must be a finite"),
    "max beyond floats": (set_group(clr_max_lr=10**400), r"\['clr_max_lr'\] must be a finite"),
    "max a string": (set_group(clr_max_lr="1"), r"\['clr_max_lr'\] must be a number, got '1'"),
    "max None": (set_group(clr_max_lr=None), r"\['clr_max_lr'\] must be a number, got None"),
    "max a list": (set_group(clr_max_lr=[0.1]), r"\['clr_max_lr'\] must be a number"),
    "max True": (set_group(clr_max_lr=True), r"\['clr_max_lr'\] must be a number, got True"),
    "one bound": (drop_group_key("clr_base_lr"), r"\['clr_base_lr'\] must be a number, got None"),
    "bounds reversed": (set_group(clr_base_lr=5.0), "base_lr=5.0 is above max_lr=0.01 in .*swap"),
    # ---- policy
    "policy None": (set_group(clr_schedule=None), rf"{GROUP_0}\['clr_schedule'\] must be a policy"),
    "policy a number": (set_group(clr_schedule=3), r"must be a policy as Schedule.to_json\(\)"),
    "policy a dictionary": (set_group(clr_schedule={"name": "x"}), "must be a policy"),
    "policy bytes": (set_group(clr_schedule=b'{"name": "x"}'), "must be a policy"),
    "policy no JSON": (set_group(clr_schedule="{"), "must be a policy .*got '{': delete that key"),
    "policy a list": (set_group(clr_schedule="[1]"), "must be a policy"),
    "policy without a name": (set_group(clr_schedule="{}"), "must be a policy"),
    "policy nested": (set_group(clr_schedule="[" * 10**6), r"must be a policy .*got '\[\["),
    "policy of the second group": (set_group(1, clr_schedule="?"), r"\[1\]\['clr_schedule'\] must"),
    # ---- state
    "state of no parameter": (
        lambda s: s["state"].update({7: s["state"].pop(0)}), r"\['state'\]\[7\] belongs to no param",
    ),
    "state of a negative number": (
        lambda s: s["state"].update({-1: s["state"].pop(2)}), r"\['state'\]\[-1\] belongs to no param",
    ),
    "state under names": (
        lambda s: s.update(state={f"w{i}": values for i, values in s["state"].items()}),
        r"\['state'\]\['w0'\] belongs to no parameter",
    ),
    "a parameter's state None": (
        lambda s: s["state"].update({0: None}), f"{STATE_OF_0} must be a dictionary .*got None",
    ),
    "a parameter's state a tensor": (
        lambda s: s["state"].update({0: torch.ones(2)}), f"{STATE_OF_0} must be a dictionary",
    ),
    "states exchanged": (
        lambda s: s["state"].update({0: s["state"][1], 1: s["state"][0]}),
        rf"{STATE_OF_0}\['exp_avg'\] must be .* of shape \[4, 3\], got a tensor of shape \[7\]",
    ),
    "no exp_avg": (lambda s: s["state"][0].pop("exp_avg"), rf"{STATE_OF_0} lacks \['exp_avg'\]"),
    "no step": (lambda s: s["state"][0].pop("step"), rf"{STATE_OF_0} lacks \['step'\], and has"),
    "no max_exp_avg_sq": (set_group(amsgrad=True), rf"{STATE_OF_0} lacks \['max_exp_avg_sq'\]"),
    "another class's state": (
        lambda s: s["state"][0].update(exp_inf=s["state"][0].pop("exp_avg_sq")),
        r"another optimizer class than Adam: it has the state \['exp_inf'\]",
    ),
    "transposed": (set_state("exp_avg", lambda t: t.T), r"\['exp_avg'\] must be .* of shape \[4, 3\]"),
    "flat": (set_state("exp_avg_sq", lambda t: t.flatten()), r"of shape \[4, 3\], got .* \[12\]"),
    "one element": (set_state("exp_avg", torch.ones(1)), r"of shape \[4, 3\]"),
    "empty tensor": (set_state("exp_avg", torch.ones(0)), r"of shape \[4, 3\], got .* \[0\]"),
    "a scalar's as a vector": (set_state("exp_avg", torch.ones(1), 2), r"\[2\]\['exp_avg'\] .*shape \[\]"),
    "exp_avg None": (set_state("exp_avg", None), r"\['exp_avg'\] must be a dense .*got None"),
    "exp_avg a number": (set_state("exp_avg", 0.5), r"\['exp_avg'\] must be a dense .*got 0.5"),
    "exp_avg a string": (set_state("exp_avg", "x"), r"\['exp_avg'\] must be a dense"),
    "exp_avg a list": (set_state("exp_avg", lambda t: t.tolist()), r"\['exp_avg'\] must be a dense"),
    "exp_avg an array": (set_state("exp_avg", lambda t: t.numpy()), r"\['exp_avg'\] must be a dense"),
    "exp_avg of integers": (set_state("exp_avg", lambda t: t.long()), "floating point tensor.*int64"),
    "exp_avg of flags": (set_state("exp_avg", lambda t: t > 0), "floating point tensor.*torch.bool"),
    "exp_avg complex": (set_state("exp_avg", lambda t: t + 0j), "floating point tensor.*complex64"),
    "exp_avg sparse": (set_state("exp_avg", lambda t: t.to_sparse()), "dense floating .*sparse_coo"),
    "exp_avg on meta": (set_state("exp_avg", lambda t: t.to("meta")), "dense .* on meta"),
    "exp_avg in one place": (
        set_state("exp_avg", torch.zeros(()).expand(4, 3)), r"\['exp_avg'\] must be a dense",
    ),
    "two moments in one memory": (
        with_both, rf"{STATE_OF_0}\['exp_avg_sq'\] is the same memory as .*\['exp_avg'\]: .* clone",
    ),
    "step -1": (set_state("step", torch.tensor(-1.0)), rf"{STATE_OF_0}\['step'\] must be an integer >= 0"),
    "step NaN": (set_state("step", torch.tensor(NAN)), r"\['step'\] must be a whole number of steps"),
    "step infinite": (set_state("step", torch.tensor(INF)), r"\['step'\] must be a whole number"),
    "step 2.5": (set_state("step", torch.tensor(2.5)), r"\['step'\] must be a whole number"),
    "step a negative int": (set_state("step", -7), r"\['step'\] must be an integer >= 0, got -7"),
    "step a string": (set_state("step", "3"), r"\['step'\] must be an integer >= 0, got '3'"),
    "step None": (set_state("step", None), r"\['step'\] must be an integer >= 0, got None"),
    "step True": (set_state("step", True), r"\['step'\] must be an integer >= 0, got True"),
    "step a matrix": (set_state("step", torch.ones(4, 3)), r"\['step'\] must be an integer"),
    "step complex": (set_state("step", torch.tensor(1j)), r"\['step'\] must be an integer"),
    "step on meta": (set_state("step", torch.ones((), device="meta")), r"\['step'\] must be an integer"),
}  # fmt: skip


def attacked(state_dict: Checkpoint, attack: Any) -> Any:
    """Return a copy of the state dict after the attack, or the object that replaces it."""
    if not callable(attack):
        return attack
    damaged = copy.deepcopy(state_dict)
    attack(damaged)
    return damaged


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(ATTACKS)[:: 6 if INTERPRETED else 1])
def test_a_hostile_checkpoint_is_refused_whole(name, backend):
    attack, pattern = ATTACKS[name]
    opt, problem = started(BY_NAME["adam"], backend)
    assert_refused(opt, problem, attacked(opt.state_dict(), attack), pattern)


MOMENTA = {
    "reversed": (
        {"clr_base_momentum": 0.95}, r"base_momentum=0.95 is above max_momentum=0.9 in .*\[0\]: base",
    ),
    "a beta of 1": ({"clr_max_momentum": 1.0}, r"max_momentum=1.0 must be below 1 in .*betas\[0\]"),
    "above 1": ({"clr_max_momentum": 1.5}, r"\['clr_max_momentum'\] must be .* <= 1, got 1.5"),
    "NaN": ({"clr_base_momentum": NAN}, r"\['clr_base_momentum'\] must be"),
    "a string": ({"clr_base_momentum": "0.8"}, r"\['clr_base_momentum'\] must be a number"),
    "None": ({"clr_max_momentum": None}, r"\['clr_max_momentum'\] must be a number, got None"),
    "nothing to cycle": ({"betas": 0.9}, r"\['betas'\] must be a setting"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MOMENTA)
def test_hostile_bounds_of_momentum(name, backend):
    keys, pattern = MOMENTA[name]
    opt, problem = started(BY_NAME["adam"], backend, cycle_momentum=True)
    assert_refused(opt, problem, attacked(opt.state_dict(), set_group(**keys)), pattern)


def damages(case: Case) -> list[tuple[Callable[[Checkpoint], None], str]]:
    """Yield damages to each state that torch's class keeps: missing, and wrong in several ways."""
    opt, problem = started(case, "torch")
    slots, found = STATE_SLOTS[case.cls], []
    for index, values in opt.state_dict()["state"].items():
        for name, value in values.items():
            where = rf"\['state'\]\[{index}\]"
            param = problem.params[index]
            (group,) = (g for g in opt.param_groups if any(p is param for p in g["params"]))
            # A parameter without any state begins anew.
            if name in slots.needed(group, tuple(param.shape)) and len(values) > 1:
                found.append((lambda s, i=index, n=name: s["state"][i].pop(n), rf"{where} lacks"))
            wrong: list[Any] = ["x", torch.ones(5, 5)]
            if name in slots.numbers:
                wrong += [NAN, None, torch.tensor(INF), torch.tensor(True)]
            elif name in slots.tensors:
                wrong += [0.5, torch.ones(value.shape, dtype=torch.int64), value[None]]
            else:
                continue
            found += [
                (set_state(name, bad, index), rf"{where}\[{name!r}\] must be") for bad in wrong
            ]
    return found


TORCHS = [case.name for case in EVERY_CLASS if case.cls in STATE_SLOTS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUSED if INTERPRETED else TORCHS)
def test_every_state_of_every_class(name, backend):
    case = BY_NAME[name]
    if backend != "torch" and name not in FUSED:
        backend = "auto"
    wrong = damages(case)
    assert wrong or name in ("sgd", "lbfgs")  # these keep no state, or state of no fixed form
    opt, problem = started(case, backend)
    state_dict, before = opt.state_dict(), snapshot(opt, problem)
    for attack, pattern in wrong:
        with pytest.raises((TypeError, ValueError), match=pattern):
            opt.load_state_dict(attacked(state_dict, attack))
        assert snapshot(opt, problem) == before
    # A checkpoint that the class wrote itself is not among these.
    opt.load_state_dict(copy.deepcopy(state_dict))
    problem.step(opt, 3, case.closure)


# ---- loaded as documented


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (schedule_of(format=99), '"format": 99'),
        (schedule_of(format="next year's", phases=None), "next year's"),
        (schedule_of(name="lost", phases=[{"speed": 3}]), "'lost'"),
    ],
    ids=["newer", "unknown", "other phases"],
)
def test_a_policy_of_another_version_warns_and_loads(change, words, backend):
    opt, problem = started(BY_NAME["adam"], backend)
    twin, twins_problem = copy.deepcopy((opt, problem))
    with pytest.warns(
        UserWarning, match=r"this optimizer's policy, triangular2\(step_size_up=4\),"
    ) as caught:
        opt.load_state_dict(attacked(opt.state_dict(), change))
    assert words in str(caught[0].message)
    problem.step(opt, 3)
    twins_problem.step(twin, 3)
    assert all(map(torch.equal, problem.params, twins_problem.params))


def set_own(**entries: Any) -> Callable[[Checkpoint], None]:
    return lambda s: s["state"][0].update(entries)


HARMLESS: dict[str, Callable[[Checkpoint], None]] = {
    "other dtypes, which torch casts": lambda s: (
        [
            values.update({k: v.double() for k, v in values.items() if k != "step"})
            for values in s["state"].values()
        ]
        and None
    ),
    "keys of a user's own": lambda s: s["state"][0].update(note="hello", mean=torch.ones(3)),
    "a user's own state, under a name of another class": lambda s: s["state"][0].update(
        prev=0.5, sum=torch.ones(2), momentum_buffer=None, square_avg={}
    ),
    "a user's own state, under a name that these settings do not use": set_own(
        max_exp_avg_sq="mine"
    ),
    "entries of no parameter": lambda s: s["state"].update(
        {7: {}, -1: 3, "weight": {}, "ema": {"step": 4, "exp_avg": torch.ones(2)}, ("a", 1): [1]}
    ),
    "a copy of a parameter's state": lambda s: s["state"].update(
        {"kept": dict(s["state"][0]), 99: dict(s["state"][1])}
    ),
    "keys beside": lambda s: s.update(epoch=3, note=None),
    "steps as numbers": set_state("step", lambda t: t.item()),
    "numbers of torch's": lambda s: s["param_groups"][0].update(
        clr_step=torch.tensor(3), eps=torch.tensor(1e-8, dtype=torch.float64).item()
    ),
    "other numbers, in the same order": lambda s: s.update(
        state={k + 10: v for k, v in s["state"].items()},
        param_groups=[{**g, "params": [k + 10 for k in g["params"]]} for g in s["param_groups"]],
    ),
    "names for numbers": lambda s: s.update(
        state={f"p{k}": v for k, v in s["state"].items()},
        param_groups=[{**g, "params": [f"p{k}" for k in g["params"]]} for g in s["param_groups"]],
    ),
    "one step counter for all": lambda s: (
        [values.update(step=s["state"][0]["step"]) for values in s["state"].values()] and None
    ),
    "tuples for lists": lambda s: s.update(param_groups=tuple(s["param_groups"])),
    "a list for a tuple": lambda s: s["param_groups"][0].update(betas=[0.9, 0.999]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_odd_loads_and_goes_on_bit_for_bit(name, backend):
    opt, problem = started(BY_NAME["adam"], backend)
    twin, twins_problem = copy.deepcopy((opt, problem))
    opt.load_state_dict(attacked(opt.state_dict(), HARMLESS[name]))
    for k in range(3, 6):
        problem.step(opt, k)
        twins_problem.step(twin, k)
    assert all(map(torch.equal, problem.params, twins_problem.params))
    assert [float(opt.state[p]["step"]) for p in problem.params] == [6.0] * 3


# ---- classes that the library does not know


class Fails(torch.optim.SGD):
    """An optimizer whose load raises after it has changed everything."""

    error: Exception = KeyError("half")

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.state:
            self.extra = 1
            raise self.error


@pytest.mark.parametrize(
    ("error", "expected", "pattern"),
    [
        (KeyError("half"), ValueError, r"does not load into Fails \(KeyError: 'half'\): give what"),
        (AssertionError("no"), ValueError, r"does not load into Fails \(AssertionError: no"),
        (RuntimeError("out of memory"), RuntimeError, "^out of memory$"),
    ],
)
def test_a_class_that_fails_half_way_is_put_back(error, expected, pattern, monkeypatch):
    case = Case("fails", Fails, {"momentum": 0.9})
    opt, problem = started(case, "torch")
    checkpoint = copy.deepcopy(opt.state_dict())
    monkeypatch.setattr(Fails, "error", error)
    before = snapshot(opt, problem)
    with pytest.raises(expected, match=pattern):
        opt.load_state_dict(checkpoint)
    assert snapshot(opt, problem) == before


@pytest.mark.parametrize("attack", [None, [1], 3, "x"], ids=repr)
def test_the_state_of_an_unknown_class_is_per_parameter(attack):
    opt, problem = started(BY_NAME["sign-descent"], "torch")
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["state"][1] = attack
    assert_refused(opt, problem, checkpoint, r"\['state'\]\[1\] must be a dictionary")


def test_a_scale_fn_that_fails_at_the_new_position_changes_nothing():
    def scale(cycle: float) -> float:
        return 1.0 / (cycle - 3)

    problem = Problem(BY_NAME["adam"])
    opt = CyclicalOptimizer(BY_NAME["adam"].make(problem.params), step_size_up=1, scale_fn=scale)
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["param_groups"][0]["clr_step"] = 5
    before = snapshot(opt, problem)
    with pytest.raises(ValueError, match=r"does not load into Adam \(ZeroDivisionError"):
        opt.load_state_dict(checkpoint)
    assert snapshot(opt, problem) == before


@pytest.mark.parametrize("result", [3, [1], "x"], ids=repr)
def test_what_a_pre_hook_returns_is_checked_too(result):
    opt, problem = started(BY_NAME["adam"], "torch")
    opt.register_load_state_dict_pre_hook(lambda opt, state_dict: result)
    before = snapshot(opt, problem)
    with pytest.raises(TypeError, match="state_dict must be a dictionary"):
        opt.load_state_dict(opt.state_dict())
    assert snapshot(opt, problem) == before


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("policy no JSON", "clr_schedule"),
        ("clr_step NaN", "clr_step"),
        ("clr_step 2**70", "clr_step"),
        ("base NaN", "clr_base_lr"),
        ("max a string", "clr_max_lr"),
    ],
)
def test_what_a_plain_optimizer_has_loaded_is_checked_when_it_is_wrapped(name, key):
    opt, problem = started(BY_NAME["adam"], "torch")
    plain = BY_NAME["adam"].make([{"params": problem.params[:1]}, {"params": problem.params[1:]}])
    plain.load_state_dict(attacked(opt.state_dict(), ATTACKS[name][0]))
    before = (frozen(plain.param_groups), frozen(plain.state))
    with pytest.raises((TypeError, ValueError), match=f"{key}.* must be"):
        CyclicalOptimizer(plain, "triangular2", step_size_up=4)
    assert (frozen(plain.param_groups), frozen(plain.state)) == before


# ---- pickles


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUSED)
def test_ours_load_as_weights_only(name, backend):
    opt, problem = started(BY_NAME[name], backend)
    twin, twins_problem = copy.deepcopy((opt, problem))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))
    problem.step(opt, 3)
    twins_problem.step(twin, 3)
    assert all(map(torch.equal, problem.params, twins_problem.params))


def test_code_in_a_checkpoint_does_not_run():
    opt, _ = started(BY_NAME["adam"], "torch")
    checkpoint = opt.state_dict()
    checkpoint["param_groups"][0]["clr_schedule"] = Trap()
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file, weights_only=True)
    # A pickle is refused in every place that we read, as an object or as bytes.
    payload = pickle.dumps(Trap())
    for bad in (Trap(), payload, np.frombuffer(payload, np.uint8), f"exec({payload!r})"):
        for key in ("clr_step", "clr_schedule", "clr_base_lr", "clr_max_lr", "lr", "betas"):
            assert_refused(*started(BY_NAME["adam"], "torch"), attacked(
                opt.optimizer.state_dict(), set_group(**{key: bad})
            ), key)  # fmt: skip


def test_nothing_here_unpickles_or_evaluates():
    runs_code = {("eval",), ("exec",), ("__import__",), ("torch", "load")}
    runs_code |= {(m, f) for m in ("pickle", "marshal") for f in ("load", "loads", "Unpickler")}
    files = [
        file
        for module in (clr_optim, clr_optim.kernels)
        for file in Path(module.__file__).parent.rglob("*.py")
    ]
    assert len(files) > 20
    calls = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and "weights_only=True" not in ast.unparse(node):
                calls.add(tuple(ast.unparse(node.func).split(".")))
    assert ("json", "loads") in calls
    assert not calls & runs_code
