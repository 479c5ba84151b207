"""The schedules of transformers, taken over as phases: the rates of its functions, for good."""

from __future__ import annotations

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import optimization as schedules  # noqa: E402

from clr_optim import CyclicalOptimizer  # noqa: E402

RATES = (0.3, 0.002)


def sgd():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in RATES]
    return torch.optim.SGD(groups, lr=0.3)


def wsd(**options):
    defaults = {"num_warmup_steps": 5, "num_decay_steps": 12, "num_stable_steps": 9}
    return lambda o: schedules.get_wsd_schedule(o, **{**defaults, **options})


# name: makes a scheduler
MADE = {
    "constant": schedules.get_constant_schedule,
    "constant with warm-up": lambda o: schedules.get_constant_schedule_with_warmup(o, 7),
    "constant without warm-up": lambda o: schedules.get_constant_schedule_with_warmup(o, 0),
    "linear": lambda o: schedules.get_linear_schedule_with_warmup(o, 6, 40),
    "linear without warm-up": lambda o: schedules.get_linear_schedule_with_warmup(o, 0, 40),
    "cosine": lambda o: schedules.get_cosine_schedule_with_warmup(o, 6, 40),
    "cosine of two waves": lambda o: schedules.get_cosine_schedule_with_warmup(o, 6, 46, 2.0),
    "cosine with hard restarts": lambda o: (
        schedules.get_cosine_with_hard_restarts_schedule_with_warmup(o, 6, 45, 3)
    ),
    "polynomial": lambda o: schedules.get_polynomial_decay_schedule_with_warmup(
        o, 6, 40, lr_end=1e-3, power=2.0
    ),
    "inverse square root": lambda o: schedules.get_inverse_sqrt_schedule(o, 9),
    "inverse square root of a scale": lambda o: schedules.get_inverse_sqrt_schedule(o, 9, 50),
    "cosine with min_lr": lambda o: schedules.get_cosine_with_min_lr_schedule_with_warmup(
        o, 6, 40, min_lr_rate=0.1
    ),
    "wsd": wsd(),
    "wsd, linear": wsd(warmup_type="cosine", decay_type="linear", min_lr_ratio=0.1),
    "wsd, 1-sqrt": wsd(warmup_type="1-sqrt", decay_type="1-sqrt", min_lr_ratio=0.05),
    "wsd without warm-up": wsd(num_warmup_steps=0, num_stable_steps=0),
}

# Settings that fall between two steps, and a function that no phase has.
BY_FUNCTION = {
    "cosine between steps": lambda o: schedules.get_cosine_schedule_with_warmup(o, 6, 41, 1.5),
    "hard restarts between steps": lambda o: (
        schedules.get_cosine_with_hard_restarts_schedule_with_warmup(o, 6, 46, 3)
    ),
    "wsd of two waves": wsd(num_cycles=1.0),
    "a warm-up from a rate": lambda o: (
        schedules.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(o, 6, 40, min_lr_rate=0.1)
    ),
}


@pytest.mark.parametrize("position", [0, 3, 6, 30, 44])
@pytest.mark.parametrize("name", [*MADE, *BY_FUNCTION])
def test_the_rates_go_on(name, position):
    build = (MADE | BY_FUNCTION)[name]
    pairs = []
    for _ in range(2):
        optimizer = sgd()
        scheduler = build(optimizer)
        for _ in range(position):
            optimizer.step()
            scheduler.step()
        pairs.append((optimizer, scheduler))
    opt = CyclicalOptimizer.from_scheduler(pairs[0][1], backend="torch")
    assert (opt.schedule.scale_fn is None) == (name in MADE)
    optimizer, scheduler = pairs[1]
    for _ in range(80):
        for mine, torchs in zip(opt.param_groups, optimizer.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(torchs["lr"], rel=1e-9, abs=1e-14)
        opt.step()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", MADE)
def test_the_functions_over_100_000_steps(name):
    scheduler = MADE[name](sgd())
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    function = scheduler.lr_lambdas[0]
    for step in range(0, 100_000, 41):
        factor = function(step)
        expected = [lr * factor for lr in RATES]
        # Far from 0 a float64 argument makes the cosine of transformers inexact.
        assert opt.lr_at(step) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(schedules.TYPE_TO_SCHEDULER_FUNCTION))
def test_every_schedule_of_the_trainer_is_taken_or_refused_by_name(name):
    options = {"num_warmup_steps": 5, "num_training_steps": 40}
    extra = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 10},
    }.get(str(getattr(name, "value", name)))
    optimizer = sgd()
    scheduler = schedules.get_scheduler(name, optimizer, **options, scheduler_specific_kwargs=extra)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        with pytest.raises(TypeError, match=type(scheduler).__name__):
            CyclicalOptimizer.from_scheduler(scheduler)
        return
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    for step in (0, 3, 5, 20, 39):
        expected = [lr * scheduler.lr_lambdas[0](step) for lr in RATES]
        assert opt.lr_at(step) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert not math.isnan(opt.lr_at(10**6)[0])
