"""Mixed precision: steps that a GradScaler skips, autocast, parameters of 16 bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import assert_same
from native_helpers import BY_NAME, Case
from torch import Tensor, nn

from clr_optim import CyclicalOptimizer

STEPS = 24
FUSED_IN_TORCH = ["sgd-nest-wd", "adam-wd", "adamw-ams", "adagrad-wd"]
ALL = [*FUSED_IN_TORCH, "sgd-wd", "adadelta", "rmsprop-mom-cent", "adam-cycled"]


class Run:
    """A small model whose gradients depend on the number of *taken* steps alone."""

    def __init__(self, case: Case, backend: str, fused: bool = False, **wrap: Any) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        options = {"foreach": None, "fused": True} if fused else {}
        inner = case.make(self.model.parameters(), **options)
        self.opt = CyclicalOptimizer(
            inner, **{"backend": backend, "step_size_up": 3, **case.wrap, **wrap}
        )
        self.log: list[Any] = []
        self.opt.register_cycle_end_hook(lambda opt: self.log.append(("cycle end", opt.iteration)))
        self.opt.register_step_post_hook(lambda *_: self.log.append("step"))

    def loss(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.opt.iteration)
        x = torch.randn(8, 4, generator=generator)
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def values(self) -> list[Tensor]:
        """Return parameters and state, in order."""
        state = [v for p in self.model.parameters() for v in self.opt.state[p].values()]
        return [*self.model.parameters(), *state]

    def where(self) -> Any:
        rates = [group["lr"] for group in self.opt.param_groups]
        return self.opt.iteration, self.opt.cycle, rates, self.opt.get_last_lr()


def overflowing(
    run: Run, seed: int, *, unscale: bool = False, clip: float | None = None
) -> torch.amp.GradScaler:
    """Take STEPS steps under a GradScaler, with overflows at random places between them."""
    chance = random.Random(seed)
    # A power of two divides out exactly. Its halves after each overflow do so, too.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=5)
    grads = list(run.model.parameters())
    while run.opt.iteration < STEPS:
        run.opt.zero_grad()
        scaler.scale(run.loss()).backward()
        overflow = chance.random() < 0.4
        if overflow:
            bad = chance.choice(grads)
            bad.grad.view(-1)[chance.randrange(bad.numel())] = chance.choice(
                [float("inf"), float("-inf"), float("nan")]
            )
        before = [v.detach().clone() for v in run.values()]
        keys = {p: list(s) for p, s in run.opt.state.items()}
        where = run.where()
        if unscale:
            scaler.unscale_(run.opt)
        if clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), clip)
        scaler.step(run.opt)
        scaler.update()
        if overflow:
            assert run.where() == where
            assert {p: list(s) for p, s in run.opt.state.items()} == keys
            assert_same(run.values(), before)
    return scaler


def plain(run: Run, clip: float | None = None) -> None:
    """Take the same steps without a scaler and without overflows."""
    while run.opt.iteration < STEPS:
        run.opt.zero_grad()
        run.loss().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), clip)
        run.opt.step()


def cycle_ends(run: Run) -> list[Any]:
    return [entry for entry in run.log if entry != "step"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", ["none", "unscale", "outside", "inside"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("name", "fused"), [(n, False) for n in ALL] + [(n, True) for n in FUSED_IN_TORCH]
)
def test_overflows_leave_no_trace(name, fused, backend, clip, seed):
    wrap = {"max_grad_norm": 0.5} if clip == "inside" else {}
    outside = 0.5 if clip == "outside" else None
    with_scaler, without = (Run(BY_NAME[name], backend, fused=fused, **wrap) for _ in range(2))
    assert bool(getattr(with_scaler.opt, "_step_supports_amp_scaling", False)) is fused
    overflowing(with_scaler, seed, unscale=clip in ("unscale", "outside"), clip=outside)
    plain(without, clip=outside)
    assert with_scaler.where() == without.where()
    assert_same(with_scaler.values(), without.values())
    assert len(cycle_ends(without)) == STEPS // 6
    if fused:
        # As in torch this path calls step(), and so its hooks, for every try. A cycle ends once.
        assert cycle_ends(with_scaler) == cycle_ends(without)
    else:
        assert with_scaler.log == without.log
    if clip == "inside":
        assert_same([with_scaler.opt.grad_norm], [without.opt.grad_norm])


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_at_the_first_step_creates_no_state(fused):
    """torch's fused SGD would go on with a buffer that was never written."""
    for backend in ("native", "torch"):
        run = Run(BY_NAME["sgd-nest-wd"], backend, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(run.loss()).backward()
        run.model[0].bias.grad.fill_(float("inf"))
        scaler.step(run.opt)
        assert not any(run.opt.state.values())
        assert run.opt.iteration == 0


@pytest.mark.parametrize("scale", [1000.0, 2.0**-30])
@pytest.mark.parametrize("name", FUSED_IN_TORCH)
def test_the_fused_path_equals_torchs(name, scale):
    """torch's fused step unscales by a division, ours by a product."""
    run = Run(BY_NAME[name], "native", fused=True)
    twin = Run(BY_NAME[name], "torch", fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    for _ in range(5):
        for side, scaler in zip((run, twin), scalers, strict=True):
            side.opt.zero_grad()
            scaler.scale(side.loss()).backward()
            scaler.step(side.opt)
            scaler.update()
    for a, b in zip(run.values(), twin.values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("max_grad_norm", [None, 0.25])
def test_what_no_kernel_serves_is_unscaled_too(max_grad_norm):
    """The wrapped step serves tensors that share memory, beside the kernels.

    Both share one norm.
    """
    results = []
    for scaled in (True, False):
        torch.manual_seed(1)
        memory, layer = torch.randn(5, 3), nn.Linear(3, 1)
        overlapping = [nn.Parameter(memory[:3]), nn.Parameter(memory[2:])]
        params = [*layer.parameters(), *overlapping]
        inner = torch.optim.AdamW(params, lr=0.1, fused=True)
        opt = CyclicalOptimizer(inner, max_grad_norm=max_grad_norm)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(sum(layer(p).square().sum() for p in overlapping)).backward()
            scaler.step(opt)
            scaler.update()
        explained = opt.explain()
        results.append([*params, *(v for p in params for v in opt.state[p].values())])
        if max_grad_norm is not None:
            results[-1].append(opt.grad_norm)
    assert "native: " in explained
    assert_same(*results)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ALL)
def test_autocast_to_bfloat16(name, backend):
    """Parameters and state stay float32, and equal the plain optimizer's at the same rates."""
    run = Run(BY_NAME[name], backend)
    twin = Run(BY_NAME[name], "torch")
    for _ in range(8):
        for side in (run, twin):
            side.opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = side.loss()
            loss.backward()
        for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
            q.grad = p.grad.clone()
        for side in (run, twin):
            side.opt.step()
    for a, b in zip(run.values(), twin.values(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_parameters_of_16_bits_under_a_scaler(dtype, backend):
    """float16 gradients pass a GradScaler on its fused path only, as in torch."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 3, dtype=dtype))
    inner = torch.optim.Adam([weight], lr=0.01, fused=True)
    opt = CyclicalOptimizer(inner, backend=backend, step_size_up=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    taken = 0
    for k in range(8):
        opt.zero_grad()
        scaler.scale(weight.square().sum()).backward()
        if k % 3 == 1:
            weight.grad[2, 1] = float("nan")
        before = weight.detach().clone()
        scaler.step(opt)
        scaler.update()
        taken += k % 3 != 1
        assert opt.iteration == taken
        assert torch.equal(before, weight) == (k % 3 == 1)
    assert weight.dtype == dtype
    assert opt.state[weight]["exp_avg"].dtype == dtype
