"""The schedules of transformers against ours, over 100,000 steps."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from clr_optim.schedule import cosine, fixed, inverse_sqrt, linear, polynomial, wsd

transformers = pytest.importorskip("transformers")

STEPS, WARMUP, LR = 100_000, 3_000, 0.3
FALL = STEPS - WARMUP - 5_000  # the last 5,000 steps are beyond the end


def of(name, **options):
    return lambda optimizer: getattr(transformers.optimization, name)(optimizer, **options)


FALLING = {"num_warmup_steps": WARMUP, "num_training_steps": WARMUP + FALL}
PAIRS = {
    "constant": (
        fixed().with_warmup(WARMUP),
        of("get_constant_schedule_with_warmup", num_warmup_steps=WARMUP),
    ),
    "linear": (
        linear(FALL).with_warmup(WARMUP), of("get_linear_schedule_with_warmup", **FALLING),
    ),
    "polynomial": (
        polynomial(FALL, 2.0, end=0.1).with_warmup(WARMUP),
        of("get_polynomial_decay_schedule_with_warmup", power=2.0, lr_end=0.1 * LR, **FALLING),
    ),
    "inverse_sqrt": (
        inverse_sqrt(WARMUP), of("get_inverse_sqrt_schedule", num_warmup_steps=WARMUP),
    ),
    "inverse_sqrt with a timescale": (
        inverse_sqrt(WARMUP, timescale=777),
        of("get_inverse_sqrt_schedule", num_warmup_steps=WARMUP, timescale=777),
    ),
    # A half cosine: in transformers the rate rises again after its end.
    "cosine": (
        cosine(STEPS - WARMUP).with_warmup(WARMUP),
        of("get_cosine_schedule_with_warmup", num_warmup_steps=WARMUP, num_training_steps=STEPS),
    ),
    **{
        f"wsd {shape}": (
            wsd(WARMUP, 60_000, 30_000, shape=shape),
            of(
                "get_wsd_schedule", num_warmup_steps=WARMUP, num_stable_steps=60_000,
                num_decay_steps=30_000, decay_type=kind,
            ),
        )
        for shape, kind in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt"))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_the_rates_are_those_of_transformers(name):
    schedule, make = PAIRS[name]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = make(optimizer)
    optimizer._opt_called = True
    rates = np.empty(STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            rates[step] = optimizer.param_groups[0]["lr"]
            scheduler.step()
    found = schedule(np.arange(STEPS), 0.01, LR)
    # A rate near 0 has the absolute error of the highest one, as 1 + cos cancels.
    np.testing.assert_allclose(found, rates, rtol=1e-12, atol=1e-16)
