"""Optimizers of other packages, wrapped: the cycle runs around their step."""

from __future__ import annotations

import io

import pytest
import torch
from cases import assert_same, feed
from framework_helpers import STEPS, Watch, assert_rates, backends, expected_rates, imported, wrap
from framework_helpers import TOP as LR
from torch import Tensor, nn

from clr_optim import register_rule
from clr_optim.rules import RULES, STATE_SLOTS

lion = imported("lion_pytorch")
bitsandbytes = imported("bitsandbytes.optim")
schedulefree = imported("schedulefree")

MAKE = {
    "lion": lambda params: lion.Lion(params, lr=LR, weight_decay=0.1),
    # 8-bit state is for tensors of 4096 values and more.
    "adamw-8bit": lambda params: bitsandbytes.AdamW8bit(params, lr=LR, weight_decay=0.1),
    "lion-8bit": lambda params: bitsandbytes.Lion8bit(params, lr=LR, weight_decay=0.1),
    "adamw-schedule-free": lambda params: schedulefree.AdamWScheduleFree(params, lr=LR),
    "sgd-schedule-free": lambda params: schedulefree.SGDScheduleFree(params, lr=LR),
    "radam-schedule-free": lambda params: schedulefree.RAdamScheduleFree(params, lr=LR),
}
optimizers = pytest.mark.parametrize("name", MAKE)
schedule_free = pytest.mark.parametrize("name", [name for name in MAKE if "free" in name])


class Run:
    """A model and its optimizer, wrapped (``backend``) or bare."""

    def __init__(self, name: str, backend: str | None) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(64, 72), nn.Tanh(), nn.Linear(72, 3))
        self.opt = MAKE[name](self.model.parameters())
        if backend is not None:
            self.opt = wrap(self.opt, backend)
        self.switch("train")

    def switch(self, mode: str) -> None:
        """Switch between the two sets of weights of a schedule-free optimizer."""
        if hasattr(self.opt, mode):
            getattr(self.opt, mode)()

    def step(self, k: int) -> None:
        generator = torch.Generator().manual_seed(k)
        features = torch.randn(8, 64, generator=generator)
        self.opt.zero_grad()
        (self.model(features) - features[:, :3]).square().mean().backward()
        self.opt.step()

    def values(self) -> list[Tensor]:
        """Return parameters and state, in order."""
        params = list(self.model.parameters())
        state = [v for p in params for v in self.opt.state[p].values() if isinstance(v, Tensor)]
        return [p.detach().clone() for p in [*params, *state]]


@optimizers
@backends
def test_the_same_course_as_the_bare_one_fed_the_rates_by_hand(backend, name):
    ours, bare = Run(name, backend), Run(name, None)
    assert ours.opt.explain().startswith("torch")
    rates = expected_rates()
    for k in range(STEPS):
        assert_rates([ours.opt.param_groups[0]["lr"]], [rates[k]])
        feed(bare.opt, ours.opt.lr_at(k))
        ours.step(k)
        bare.step(k)
    assert_same(ours.values(), bare.values())
    assert ours.opt.state.keys() == set(ours.model.parameters())
    for p, q in zip(ours.model.parameters(), bare.model.parameters(), strict=True):
        assert list(ours.opt.state[p]) == list(bare.opt.state[q])
    if "8bit" in name:
        assert ours.opt.state[ours.model[0].weight]["state1"].dtype == torch.uint8


@optimizers
@backends
def test_state_dict_round_trip_in_mid_cycle(backend, name):
    whole = Run(name, backend)
    for k in range(9):
        whole.step(k)
    whole.switch("eval")
    file = io.BytesIO()
    torch.save({"model": whole.model.state_dict(), "opt": whole.opt.state_dict()}, file)
    whole.switch("train")

    def load(run):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        run.model.load_state_dict(saved["model"])
        run.opt.load_state_dict(saved["opt"])
        run.switch("train")
        return run

    resumed = load(Run(name, backend))
    assert resumed.opt.iteration == 9
    for k in range(9, STEPS):
        assert resumed.opt.param_groups[0]["lr"] == whole.opt.param_groups[0]["lr"]
        whole.step(k)
        resumed.step(k)
    assert_same(resumed.values(), whole.values())

    # Load into the bare optimizer too, which must then be given the rates.
    bare = load(Run(name, None))
    for k in range(9, STEPS):
        feed(bare.opt, whole.opt.lr_at(k))
        bare.step(k)
    assert_same(bare.values(), whole.values())


@schedule_free
@backends
def test_both_modes_of_a_schedule_free_optimizer_are_reachable(backend, name):
    ours, bare = Run(name, backend), Run(name, None)
    for k in range(STEPS):
        feed(bare.opt, ours.opt.lr_at(k))
        for run in (ours, bare):
            run.step(k)
        if k % 6 == 5:
            training = ours.values()
            for run in (ours, bare):
                run.opt.eval()
            assert_same(ours.values(), bare.values())
            assert any((a != b).any() for a, b in zip(ours.values(), training, strict=True))
            with pytest.raises(Exception, match=r"train mode"):
                ours.opt.step()
            assert ours.opt.iteration == k + 1  # that step did not happen
            for run in (ours, bare):
                run.opt.train()
    assert_same(ours.values(), bare.values())


@optimizers
@backends
def test_hooks_and_profiler_see_a_step_once(backend, name):
    watch, run = Watch(), Run(name, backend)
    watch.register(run.opt)
    with watch:
        for k in range(4):
            run.step(k)
    watch.check(run.opt, 4)


@pytest.mark.parametrize("name", ["lion", "adamw-8bit", "lion-8bit"])
def test_clipping_on_the_way_to_their_step(name):
    ours, bare = Run(name, None), Run(name, None)
    ours.opt = wrap(ours.opt, "auto", max_grad_norm=0.01)
    for k in range(STEPS):
        feed(bare.opt, ours.opt.lr_at(k))
        ours.step(k)
        assert ours.opt.grad_norm > 0.01
        handle = bare.opt.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_norm_(bare.model.parameters(), 0.01) and None
        )
        bare.step(k)
        handle.remove()
    assert_same(ours.values(), bare.values())


@pytest.fixture
def bound_lion():
    """Bind the class for one test."""
    register_rule(lion.Lion, "lion")
    yield
    del RULES[lion.Lion], STATE_SLOTS[lion.Lion]


@pytest.mark.usefixtures("bound_lion")
def test_a_bound_lion_trains_as_the_bare_one():
    ours, bare = Run("lion", "auto"), Run("lion", None)
    assert ours.opt.explain().startswith("native")
    for k in range(STEPS):
        feed(bare.opt, ours.opt.lr_at(k))
        ours.step(k)
        bare.step(k)
    for mine, its in zip(ours.values(), bare.values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    loaded = Run("lion", "auto")
    loaded.opt.load_state_dict(ours.opt.state_dict())
    assert loaded.opt.iteration == STEPS
    # This argument is in no group, so the kernel does not know it.
    model = nn.Linear(3, 2)
    divided = lion.Lion(model.parameters(), lr=LR, weight_decay=0.1, decoupled_weight_decay=True)
    assert wrap(divided, "auto").explain().endswith("Lion: decoupled_weight_decay=True")
