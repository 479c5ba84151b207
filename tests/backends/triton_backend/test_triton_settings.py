"""Settings that follow schedules on the device: eager steps, graphs, and overflows.

The reference is a plain optimizer of torch that is given the numbers of each step by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_helpers import SHAPES, Run, scaled
from native_helpers import KERNELS, Case
from setting_schedules import feed, schedules_for
from triton_helpers import DEVICE, MARKS, SLOW, choose_triton

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import triangular

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)

STEPS = 10 if SLOW else 200


class Pair:
    """A run whose settings follow schedules, and a plain optimizer of the same parameters."""

    def __init__(self, case: Case, **options: Any) -> None:
        probe = case.make([torch.nn.Parameter(torch.zeros(2))])
        self.schedules = schedules_for(probe)
        self.run = Run(
            Case(case.name, case.cls, case.options, case.lr), schedules=self.schedules, **options
        )
        self.params = [torch.nn.Parameter(p.detach().clone()) for p in self.run.params]
        self.plain = case.as_for_loop().make(self.params)

    def twin_step(self, number: int, position: int) -> None:
        """Step the plain optimizer at a position, with the gradients of a number."""
        feed(self.plain, self.run.opt.lr_at(position)[0], self.schedules, position)
        for param, grad in zip(self.params, self.run.draw(number), strict=True):
            param.grad = grad
        self.plain.step()

    def assert_alike(self) -> None:
        for ours, twin in zip(self.run.params, self.params, strict=True):
            torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_replays_keep_all_settings_moving(case):
    pair = Pair(case)
    for k in range(2):
        pair.run.eager(k)
        pair.twin_step(k, k)
    pair.assert_alike()
    graph = pair.run.capture()
    for k in range(2, STEPS):
        pair.run.replay(graph, k)
        pair.twin_step(k, k)
    assert pair.run.opt.iteration == STEPS
    pair.assert_alike()
    pair.run.eager(STEPS)  # from the position that the replays have reached
    pair.twin_step(STEPS, STEPS)
    pair.assert_alike()


def test_groups_follow_other_schedules():
    """Of two groups one decays by a schedule, and a third joins after a capture."""

    def make(wrap: bool) -> tuple[Any, list[torch.nn.Parameter]]:
        params = [torch.nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(3)]
        inner = torch.optim.AdamW(
            [{"params": params[:1]}, {"params": params[1:2], "weight_decay": 0.0}], lr=0.1
        )
        if not wrap:
            return inner, params
        schedules = {"weight_decay": [decays, None], "eps": epsilons}
        return CyclicalOptimizer(inner, step_size_up=4, schedules=schedules), params

    decays = triangular(3, base_lr=0.0, max_lr=0.5)
    epsilons = triangular(2, base_lr=1e-4, max_lr=0.1)
    ours, params = make(True)
    plain, twins = make(False)
    for k in range(9):
        if k == 5:
            for opt, ps in ((ours, params), (plain, twins)):
                opt.add_param_group({"params": ps[2:], "lr": 0.1, "weight_decay": 0.25})
        for i, group in enumerate(plain.param_groups):
            group["lr"] = ours.lr_at(k)[i]
            group["eps"] = float(epsilons([k])[0])
        plain.param_groups[0]["weight_decay"] = float(decays([k])[0])
        for p in (*params[: 2 + (k >= 5)], *twins[: 2 + (k >= 5)]):
            p.grad = torch.full_like(p, 0.5 + k)
        ours.step()
        plain.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_column_that_follows_no_more_is_the_hosts():
    """Other code moves a schedule's number to another column, or its group to another place."""

    def make() -> Any:
        params = [torch.nn.Parameter(torch.ones(n, device=DEVICE)) for n in (3, 2)]
        decays = {"params": params[:1], "weight_decay": 0.1}
        return torch.optim.Adam([decays, {"params": params[1:], "weight_decay": 0.0}], lr=0.1)

    inner, plain = make(), make()
    decays = triangular(2, base_lr=0.1, max_lr=0.5)
    ours = CyclicalOptimizer(inner, step_size_up=3, schedules={"weight_decay": [decays, None]})
    for k in range(10):
        if k == 3:
            ours.param_groups.reverse()
            plain.param_groups.reverse()
        if k == 6:
            for group in (*ours.param_groups, *plain.param_groups):
                group["decoupled_weight_decay"] = True
        for group in plain.param_groups:
            group["lr"] = ours.lr_at(k)[0]
        plain.param_groups[k >= 3]["weight_decay"] = float(decays([k])[0])
        for group, twin in zip(ours.param_groups, plain.param_groups, strict=True):
            for p, q in zip(group["params"], twin["params"], strict=True):
                p.grad, q.grad = torch.full_like(p, 0.5 + k), torch.full_like(q, 0.5 + k)
        ours.step()
        plain.step()
        for group, twin in zip(ours.param_groups, plain.param_groups, strict=True):
            torch.testing.assert_close(group["params"][0], twin["params"][0], rtol=1e-5, atol=1e-6)


def test_an_overflow_leaves_the_settings():
    (case,) = (case for case in KERNELS if case.name == "adam-wd")
    pair = Pair(case)
    position = 0
    for k in range(10):
        overflows = k in (4, 5, 8)
        scaled(pair.run, k, overflow=overflows, scale=8.0)
        pair.run.opt.step()
        del pair.run.opt.grad_scale, pair.run.opt.found_inf
        if not overflows:
            pair.twin_step(k, position)
            position += 1
    assert pair.run.opt.iteration == position == 7
    pair.assert_alike()


def test_a_course_that_the_host_decides():
    """With a ``scale_fn`` the host evaluates the policy and all schedules."""
    params = [torch.nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in SHAPES]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    decays = {"weight_decay": triangular(3, base_lr=0.0, max_lr=0.5)}
    ours = CyclicalOptimizer(
        torch.optim.AdamW(params, lr=0.1), step_size_up=3, scale_fn=lambda c: 1 / c,
        schedules=decays,
    )  # fmt: skip
    plain = torch.optim.AdamW(twins, lr=0.1)
    for k in range(8):
        feed(plain, ours.lr_at(k)[0], decays, k)
        for p in (*params, *twins):
            p.grad = torch.full_like(p, 0.5 + k)
        ours.step()
        plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
