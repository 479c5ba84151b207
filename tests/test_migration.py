"""The page for users of other tools, checked against those tools' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import cosine, linear, warm_restarts


def sgd(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_the_keras_callback(mode):
    base, top, size, gamma = 0.001, 0.006, 7, 0.999
    opt = CyclicalOptimizer(
        sgd(top), mode, base_lr=base, max_lr=top, step_size_up=size, gamma=gamma
    )
    for k in range(6 * size):
        cycle = math.floor(1 + k / (2 * size))
        x = abs(k / size - 2 * cycle + 1)
        scale = {"triangular": 1.0, "triangular2": 0.5 ** (cycle - 1), "exp_range": gamma**k}[mode]
        expected = base + (top - base) * max(0.0, 1.0 - x) * scale
        assert opt.lr_at(k) == pytest.approx([expected], rel=1e-12)


def test_fastais_one_cycle_to_within_a_step():
    # fastai's last step is not at the end of its curve. torch's is, and comes there a step sooner.
    steps, top, div, div_final, pct_start = 100, 0.1, 25.0, 1e5, 0.25
    opt = CyclicalOptimizer.from_scheduler(
        OneCycleLR(
            sgd(top),
            top,
            total_steps=steps,
            pct_start=pct_start,
            div_factor=div,
            final_div_factor=div_final / div,
        )
    )

    def fastais(step):
        def between(start, end, x):
            return start + (end - start) * (1 - math.cos(math.pi * x)) / 2

        x = step / steps
        if x < pct_start:
            return between(top / div, top, x / pct_start)
        return between(top, top / div_final, (x - pct_start) / (1 - pct_start))

    rates = [opt.lr_at(k)[0] for k in range(steps)]
    assert rates[0] == pytest.approx(fastais(0))
    assert max(rates) == pytest.approx(top)
    assert rates[-1] == pytest.approx(fastais(steps))
    for k, rate in enumerate(rates):
        low, high = sorted([fastais(k), fastais(k + 1)])
        assert low * (1 - 1e-9) <= rate <= high * (1 + 1e-9)
    assert opt.param_groups[0]["momentum"] == 0.95  # OneCycleLR cycles it by default


WARMUP, TOTAL = 500, 10_000


@pytest.mark.parametrize("step", [*range(0, TOTAL, 173), WARMUP - 1, WARMUP, TOTAL - 1, TOTAL])
def test_a_warm_up_before_a_cosine_or_a_straight_line(step):
    progress = (step - WARMUP) / (TOTAL - WARMUP)
    rise = step / WARMUP
    expected = {
        cosine: rise if progress < 0 else 0.5 * (1 + math.cos(math.pi * progress)),
        linear: rise if progress < 0 else 1 - progress,
    }
    for policy, factor in expected.items():
        opt = CyclicalOptimizer(sgd(0.1), policy(TOTAL - WARMUP).with_warmup(WARMUP), max_lr=0.1)
        assert opt.lr_at(step) == pytest.approx([0.1 * factor], rel=1e-9, abs=1e-15)


def test_warm_restarts_stepped_by_fractions_of_epochs():
    """The loop of torch's docs: ``scheduler.step(epoch + i / iters)``, here before each batch."""
    iters, optimizer = 25, sgd(0.1)
    scheduler = CosineAnnealingWarmRestarts(optimizer, 2, 3, eta_min=0.001)
    opt = CyclicalOptimizer(
        sgd(0.1), warm_restarts(2 * iters, period_multiplier=3), base_lr=0.001, max_lr=0.1
    )
    for epoch in range(9):
        for i in range(iters):
            optimizer.step()
            scheduler.step(epoch + i / iters)
            expected = optimizer.param_groups[0]["lr"]
            assert opt.lr_at(epoch * iters + i) == pytest.approx([expected], rel=1e-9)
