"""Any order of events, with the native backend and with plain torch: they must stay equal.

A stale pointer shows here as a difference, or kills the process. Two optimizers, ours (``auto``)
and torch's own for-loop step fed our rates, live through the same events in float64.

``HYPOTHESIS_PROFILE=long pytest tests/test_native_machine.py`` looks much longer, and anew each
time.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from native_helpers import (
    BY_NAME,
    CASES,
    assert_alike,
    failure,
    feed,
    held,
    like,
    members,
    parameters,
    wrapped,
)

from clr_optim.kernels.native import build

_common = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}
settings.register_profile(
    "native", settings(max_examples=300, stateful_step_count=30, derandomize=True, **_common)
)
settings.register_profile(
    "native-long", settings(max_examples=5000, stateful_step_count=60, **_common)
)
PROFILE = "native-long" if os.environ.get("HYPOTHESIS_PROFILE") == "long" else "native"

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 2, 2), (1, 3), (70,)]
TOLERANCE = 1e-10
KEYS = {
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
    "momentum": [0.0, 0.5, 0.9],
    "dampening": [0.0, 0.3],
    "nesterov": [False, True],
    "amsgrad": [False, True],
    "betas": [(0.9, 0.999), (0.5, 0.7)],
    "eps": [1e-8, 1e-2],
    "lr_decay": [0.0, 0.1],
    "rho": [0.9, 0.4],
    "alpha": [0.99, 0.5],
    "centered": [False, True],
    "differentiable": [False, True],
}
which = st.integers(0, 63)
seeds = st.integers(0, 2**16)


class Machine(RuleBasedStateMachine):
    @initialize(
        name=st.sampled_from([case.name for case in CASES if not case.wrap]),
        seed=seeds,
        count=st.integers(1, 5),
        clip=st.sampled_from([None, None, 0.5]),
    )
    def begin(self, name, seed, count, clip):
        self.threads = torch.get_num_threads()
        self.case, self.clip = BY_NAME[name], clip
        generator = torch.Generator().manual_seed(seed)
        values = []
        for i in range(count):
            shape = SHAPES[(seed + i) % len(SHAPES)]
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if value.dim() == 2 and i % 2:
                value = value.t()
            if value.dim() == 4 and i % 2:
                value = value.to(memory_format=torch.channels_last)
            values.append(value)
        self.theirs = self.case.make(parameters(values))
        self.ours = wrapped(self.case.make(parameters(values)), backend="auto", max_grad_norm=clip)
        self.others = []

    def teardown(self):
        if hasattr(self, "threads"):
            torch.set_num_threads(self.threads)

    # ---- both at once

    def pick(self, i):
        """The same parameter of both."""
        ours, theirs = members(self.ours), members(self.theirs)
        return [(opt, ps[i % len(ps)]) for opt, ps in ((self.ours, ours), (self.theirs, theirs))]

    def both(self, change):
        """What torch raises, ours must raise."""
        theirs, ours = failure(change, self.theirs), failure(change, self.ours)
        if type(theirs) is not type(ours):
            raise AssertionError(f"torch raises {theirs!r}, ours {ours!r}") from ours
        return theirs is None

    @invariant()
    def check(self):
        assert_alike(self.ours, self.theirs, TOLERANCE)

    @staticmethod
    def normal(shape, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # ---- gradients

    @rule(seed=seeds)
    def backward(self, seed):
        """New tensors of their own memory for all."""
        for opt in (self.ours, self.theirs):
            for i, p in enumerate(members(opt)):
                if p.requires_grad:
                    p.grad = like(self.normal(p.shape, seed + i), p)

    @rule(seed=seeds)
    def accumulate(self, seed):
        for opt in (self.ours, self.theirs):
            for i, p in enumerate(members(opt)):
                if p.grad is not None and p.grad.layout is torch.strided:
                    if 0 in p.grad.stride():  # expanded: autograd would not add in place either
                        p.grad = p.grad.clone()
                    p.grad.add_(self.normal(p.shape, seed + i))

    @rule(i=which)
    def drop_a_gradient(self, i):
        for _, p in self.pick(i):
            p.grad = None

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.both(lambda opt: opt.zero_grad(set_to_none=to_none))

    @rule(i=which, seed=seeds, kind=st.sampled_from(["transposed", "expanded", "strided"]))
    def gradient_of_another_layout(self, i, seed, kind):
        for _, p in self.pick(i):
            values = self.normal(p.shape, seed)
            if kind == "transposed":
                values = values.permute(tuple(range(values.dim()))[::-1]).contiguous()
                p.grad = values.permute(tuple(range(values.dim()))[::-1])
            elif kind == "expanded":
                p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)
            else:
                p.grad = torch.stack([values, values], -1)[..., 1]

    @precondition(lambda self: self.case.cls in (torch.optim.SGD, torch.optim.Adagrad))
    @precondition(lambda self: self.clip is None)
    @rule(i=which, seed=seeds)
    def sparse_gradient(self, i, seed):
        """As an embedding's; not with weight decay, which torch refuses half-way."""
        for opt, p in self.pick(i):
            if p.dim() == 2 and p.shape[0] and not opt.param_groups[0]["weight_decay"]:
                rows = torch.tensor([seed % p.shape[0]])
                p.grad = torch.sparse_coo_tensor(
                    rows[None], self.normal((1, p.shape[1]), seed), p.shape, check_invariants=True
                ).coalesce()

    # ---- tensors

    @rule(i=which)
    def swap_data(self, i):
        for _, p in self.pick(i):
            p.data = like(p.detach() * 0.5, p)

    @rule(i=which)
    def transpose_data(self, i):
        for _, p in self.pick(i):
            if p.dim() == 2 and (p.grad is None or p.grad.layout is torch.strided):
                p.data = p.detach().t().contiguous().t()

    @rule(i=which, length=st.integers(1, 4), move=st.booleans())
    def resize(self, i, length, move):
        """With its state, as somebody who prunes does; in the old memory or in new."""
        for opt, p in self.pick(i):
            if p.dim() == 1 and p.numel() > length:
                p.grad = None
                p.data = p.detach()[:length].clone() if move else p.detach()[:length]
                for name, t in opt.state.get(p, {}).items():
                    if name != "step" and t is not None:
                        opt.state[p][name] = t.to_dense()[:length]

    @rule(i=which)
    def replace_state(self, i):
        for opt, p in self.pick(i):
            for name, t in list(opt.state.get(p, {}).items()):
                if t is not None:
                    opt.state[p][name] = t.clone()

    @rule(i=which)
    def refill_state(self, i):
        for opt, p in self.pick(i):
            for t in opt.state.get(p, {}).values():
                if t is not None and t.layout is torch.strided:
                    t.data = t.detach() * 2

    @rule(i=which)
    def rebuild_state_dict(self, i):
        for opt, p in self.pick(i):
            if p in opt.state:
                opt.state[p] = dict(opt.state[p])

    @rule(i=which)
    def delete_state(self, i):
        for opt, p in self.pick(i):
            opt.state.pop(p, None)

    @rule(i=which)
    def delete_a_buffer(self, i):
        """Only where torch makes a new one."""
        for opt, p in self.pick(i):
            if isinstance(getattr(opt, "optimizer", opt), torch.optim.SGD) and p in opt.state:
                opt.state[p].pop("momentum_buffer", None)

    @rule()
    def a_new_state_object(self):
        self.ours.optimizer.state = copy.copy(self.ours.optimizer.state)

    # ---- checkpoints and copies

    @rule()
    def load_own_state_dict(self):
        self.both(lambda opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())))

    @rule()
    def load_torchs_state_dict(self):
        position = self.ours.iteration
        self.ours.load_state_dict(copy.deepcopy(self.theirs.state_dict()))
        self.ours.set_iteration(position)

    @rule(backend=st.sampled_from(["auto", "torch"]), own=st.booleans())
    def switch_backend_at_a_checkpoint(self, backend, own):
        saved = copy.deepcopy(self.ours.state_dict() if own else self.theirs.state_dict())
        position = self.ours.iteration
        self.ours = wrapped(
            self.ours.optimizer, backend=backend, max_grad_norm=self.clip,
            base_lr=[g["clr_base_lr"] for g in self.ours.param_groups],
            max_lr=[g["clr_max_lr"] for g in self.ours.param_groups],
        )  # fmt: skip
        self.ours.load_state_dict(saved)
        self.ours.set_iteration(position)

    @rule()
    def keep_a_copy(self):
        """Gradients are not copied along, by torch nor by us."""
        self.others = [*self.others, copy.deepcopy((self.ours, self.theirs))][-2:]

    @precondition(lambda self: self.others)
    @rule(i=which)
    def go_on_with_a_copy(self, i):
        i %= len(self.others)
        now = self.ours, self.theirs
        (self.ours, self.theirs), self.others[i] = self.others[i], now

    # ---- groups

    @rule(seed=seeds)
    def add_group(self, seed):
        if len(self.ours.param_groups) < 4:
            for opt in (self.ours, self.theirs):
                values = [self.normal(SHAPES[(seed + i) % len(SHAPES)], seed) for i in range(2)]
                opt.add_param_group({"params": parameters(values), "lr": 0.02})

    @rule(i=which, free=st.booleans())
    def freeze(self, i, free):
        for _, p in self.pick(i):
            p.requires_grad_(free)
            p.grad = None

    @rule(i=which)
    def reorder_in_place(self, i):
        for opt in (self.ours, self.theirs):
            groups = opt.param_groups
            groups[i % len(groups)]["params"].reverse()

    @rule(i=which, key=st.sampled_from(sorted(KEYS)), choice=which)
    def change_a_setting(self, i, key, choice):
        for opt in (self.ours, self.theirs):
            group = opt.param_groups[i % len(opt.param_groups)]
            if key in group:
                group[key] = KEYS[key][choice % len(KEYS[key])]

    @rule(top=st.floats(0.001, 0.1))
    def set_bounds(self, top):
        self.ours.set_bounds(base_lr=top / 4, max_lr=top)

    @rule(count=st.sampled_from([1, 2]))
    def set_threads(self, count):
        torch.set_num_threads(count)

    # ---- steps

    @rule()
    def step(self):
        """A step that torch refuses may leave it half done: both then go back to before it."""
        before = copy.deepcopy([self.snapshot(opt) for opt in (self.ours, self.theirs)])
        position = self.ours.iteration
        feed(self.theirs, self.ours)
        kept = [(p, p.grad) for p in members(self.theirs)]
        if self.clip is not None and all(g is None or g.layout is torch.strided for _, g in kept):
            for p, g in kept:
                p.grad = None if g is None else g.clone()
            torch.nn.utils.clip_grad_norm_([p for p, _ in kept], self.clip)
        done = self.both(lambda opt: opt.step())
        for p, g in kept:
            p.grad = g
        if done:
            assert self.ours.iteration == position + 1
            self.check()
        else:
            assert self.ours.iteration == position
            for opt, saved in zip((self.ours, self.theirs), before, strict=True):
                self.restore(opt, saved)

    @precondition(lambda self: any(p.grad is not None for p in members(self.theirs)))
    @rule(count=st.integers(1, 3))
    def several_steps(self, count):
        for _ in range(count):
            self.step()

    @staticmethod
    def snapshot(opt):
        return [(p.detach(), state) for p, state in zip(members(opt), held(opt), strict=True)]

    @staticmethod
    def restore(opt, saved):
        for p, (value, state) in zip(members(opt), saved, strict=True):
            p.data = value
            p.grad = None
            opt.state.pop(p, None)
            if state:
                opt.state[p] = dict(state)


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    """Without the kernels torch would be compared with itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLR_OPTIM_BACKEND", "native")  # what "auto" means here
        build.load()
        yield


TestMachine = Machine.TestCase
TestMachine.settings = settings.get_profile(PROFILE)
