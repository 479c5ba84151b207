"""Events that concern groups, their settings, bounds and positions."""

from __future__ import annotations

from typing import Any

import torch
from native_helpers import parameters
from torch import Tensor

from fuzz.events import SEEDS, WHICH, event
from fuzz.expected import POLICIES
from fuzz.pair import Pair
from fuzz.setups import KEYS, ODD


class GroupEvents(Pair):
    """Add groups, and write into them."""

    @event(0.5, seed=SEEDS, how=("plain", "bounds", "beneath"))
    def add_group(self, seed: int, how: str) -> bool | None:
        few = self.backend == "triton"
        schedule = self.ours.schedule
        if len(self.ours.param_groups) >= (3 if few else 4):
            return False
        if how == "bounds" and schedule.has_bounds:  # which refuses others
            return False
        for opt in self.pair():
            values = [self.value(seed, i) for i in range(1 if few else 2)]
            new: dict[str, Any] = {"params": parameters(values), "lr": 0.02}
            if opt is self.ours and how == "bounds":
                new.update(max_lr=0.01)
                if schedule.reads_base_lr:  # it would warn that it has no effect
                    new.update(base_lr=0.001)
            inner = opt.optimizer if opt is self.ours and how == "beneath" else opt
            inner.add_param_group(new)
        base = 0.001 if schedule.reads_base_lr else 0.0025
        self.expected.bounds.append((base, 0.01) if how == "bounds" else (0.005, 0.02))
        if self.expected.momenta is not None:
            self.expected.momenta.append(self.expected.momenta[0])
        self.overwritten = how == "beneath"  # such a group gets its rate at the next step
        return None

    @event(1.0, i=WHICH, free=(False, True, True))
    def freeze(self, i: int, free: bool) -> None:
        for _, p in self.pick(i):
            p.requires_grad_(free)
            p.grad = None

    @event(0.7, i=WHICH)
    def reorder_in_place(self, i: int) -> None:
        for opt in self.pair():
            groups = opt.param_groups
            groups[i % len(groups)]["params"].reverse()

    @event(2.0, i=WHICH, key=sorted(KEYS), choice=WHICH)
    def change_a_setting(self, i: int, key: str, choice: int) -> bool | None:
        if key == "differentiable" and self.flag:
            return False
        if key == "differentiable" and self.only_kernels:
            return False
        if key == "centered" and not self.centered:
            return False
        if key == "decoupled_weight_decay" and isinstance(self.twin, torch.optim.AdamW):
            return False  # torch's AdamW writes it at every load
        for opt in self.pair():
            group = opt.param_groups[i % len(opt.param_groups)]
            if key not in group:
                return False
            group[key] = KEYS[key][choice % len(KEYS[key])]
        if key in ("momentum", "betas") and self.expected.momenta is not None:
            self.overwritten = True  # until the next step writes the cycle's momentum
        return None

    @event(0.7, i=WHICH, key=sorted(KEYS), kind=sorted(ODD))
    def write_an_odd_setting(self, i: int, key: str, kind: str) -> bool | None:
        """Write the same value in another type, as configurations and arrays do."""
        for opt in self.pair():
            group = opt.param_groups[i % len(opt.param_groups)]
            takes, make = ODD[kind]
            if not isinstance(group.get(key), takes) or (key == "betas" and self.expected.momenta):
                return False
            group[key] = make(group[key])
        self.odd = True
        return None

    @event(0.5, i=WHICH)
    def keep_own_state(self, i: int) -> None:
        """Keep a user's entries in the state, under names of other classes too."""
        if self.case.cls is torch.optim.Adagrad:
            return False  # Adagrad takes every entry for a parameter's when it loads
        for opt, p in self.pick(i):
            opt.state["of the user"] = {"step": 2, "exp_avg": torch.ones(2)}
            opt.state["epoch"] = i
            if opt.state.get(p):
                opt.state[p]["prev"] = 2.5
                if self.case.cls is not torch.optim.NAdam:  # it reads its mu_product
                    opt.state[p]["mu_product"] = i
        return None

    @event(0.7, top=(0.001, 0.004, 0.02, 0.1), i=WHICH)
    def set_bounds(self, top: float, i: int) -> bool | None:
        """Set bounds for all groups alike, or for each group."""
        schedule = POLICIES[self.expected.policy].schedule
        if schedule.has_bounds:
            return False
        tops = [top] * len(self.expected.bounds)
        if i % 2:
            tops[i % len(tops)] = top / 2
        base = [value / 4 for value in tops]
        if schedule.reads_base_lr:
            self.ours.set_bounds(base_lr=base, max_lr=tops)
        else:  # a base_lr would warn that it has no effect
            self.ours.set_bounds(max_lr=tops)
            base = [
                min(low, high) for (low, _), high in zip(self.expected.bounds, tops, strict=True)
            ]
        self.expected.bounds = list(zip(base, tops, strict=True))
        self.overwritten = False
        return None

    @event(0.5, top=(0.003, 0.05))
    def write_bounds(self, top: float) -> bool | None:
        """Write bounds into a group, as older scripts do. The next step adopts them."""
        if POLICIES[self.expected.policy].schedule.has_bounds:
            return False
        self.ours.param_groups[0].update(clr_base_lr=top / 3, clr_max_lr=top)
        self.expected.bounds[0] = (top / 3, top)
        self.overwritten = True
        self.noticed()
        return None

    @event(0.7, to=range(40))
    def set_iteration(self, to: int) -> None:
        self.ours.set_iteration(to)
        self.expected.position = to
        self.overwritten = False

    @event(0.5, to=range(1000, 1_000_000))
    def write_position(self, to: int) -> None:
        """Write a position into the groups, as a sharded optimizer's restore does."""
        for group in self.ours.param_groups:
            group["clr_step"] = to
        self.expected.position = to
        self.overwritten = True
        self.noticed()

    @event(0.5, i=WHICH)
    def write_lr(self, i: int) -> bool | None:
        """Write a rate into a group, as a second scheduler does. The step overrules it."""
        group = self.ours.param_groups[i % len(self.ours.param_groups)]
        if "clr_max_lr" not in group:
            return False  # added beneath: the group's lr still says which rate it wants
        held = group["lr"]
        group["lr"] = torch.full_like(held, 0.5) if isinstance(held, Tensor) else 0.5
        self.overwritten = True
        return None

    @event(0.7, count=(1, 2))
    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)
