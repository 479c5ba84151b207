"""torch's tools around optimizers: averaged weights, torch.compile."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import assert_same
from framework_helpers import (
    DOWN,
    EPOCH,
    EPOCHS,
    STEPS,
    UP,
    assert_like_torch,
    assert_served,
    backends,
    build_loader,
    build_model,
    cyclic_lr,
    inner,
    values,
    wrap,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

CYCLE = UP + DOWN


def batches(epochs=EPOCHS):
    return [batch for _ in range(epochs) for batch in build_loader()]


def with_norm():
    """Return a model with a norm that update_bn updates."""
    linear, *rest = build_model()
    linear.bias = None  # the norm would remove a bias
    return nn.Sequential(linear, nn.BatchNorm1d(linear.out_features), *rest)


def take_step(model, opt, batch):
    features, labels = batch
    opt.zero_grad()
    functional.cross_entropy(model(features), labels).backward()
    opt.step()


@pytest.mark.parametrize("ema", [False, True], ids=["mean", "ema"])
@backends
def test_weights_averaged_at_the_ends_of_cycles(backend, ema):
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5) if ema else None
    before, after = with_norm(), with_norm()
    twin, ours = (AveragedModel(model, multi_avg_fn=average) for model in (before, after))
    reference = inner(before.parameters())
    scheduler = cyclic_lr(reference)
    for i, batch in enumerate(batches()):
        take_step(before, reference, batch)
        scheduler.step()
        if (i + 1) % CYCLE == 0:
            twin.update_parameters(before)

    opt = wrap(inner(after.parameters()), backend)
    opt.register_cycle_end_hook(lambda opt: ours.update_parameters(after))
    for batch in batches():
        take_step(after, opt, batch)
    assert_served(opt, backend)
    assert ours.n_averaged == twin.n_averaged == STEPS // CYCLE
    assert_like_torch(ours, twin, backend)
    for averaged in (ours, twin):
        update_bn(build_loader(), averaged)
    expected = twin.module[1].running_mean
    assert not torch.equal(expected, before[1].running_mean)
    torch.testing.assert_close(ours.module[1].running_mean, expected, rtol=1e-4, atol=1e-6)


@backends
def test_swalr_does_not_disturb_the_cycle(backend):
    alone, both = build_model(), build_model()
    opt = wrap(inner(alone.parameters()), backend)
    for batch in batches():
        take_step(alone, opt, batch)

    opt = wrap(inner(both.parameters()), backend)
    averaged = AveragedModel(both)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anneal = SWALR(opt, swa_lr=0.5, anneal_epochs=1)
        for i, batch in enumerate(batches()):
            take_step(both, opt, batch)
            if (i + 1) % EPOCH == 0:
                averaged.update_parameters(both)
                anneal.step()
    assert_same(values(both), values(alone))
    assert ["lr was written from outside" in str(w.message) for w in caught] == [True]
    # If asked, it goes on at the constant rate that SWALR is for.
    opt.set_bounds(base_lr=0.005, max_lr=0.005)
    take_step(both, opt, batches()[0])
    assert opt.get_last_lr() == [0.005]


# ---- torch.compile


@pytest.fixture
def counter():
    """Start to count anew what is compiled."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@backends
def test_a_compiled_model(backend, counter):
    before, after = build_model(), build_model()
    opt = wrap(inner(after.parameters()), backend)
    reference = inner(before.parameters())
    scheduler = cyclic_lr(reference)
    compiled = torch.compile(after, backend=counter, fullgraph=True)
    steps = batches()
    for i, batch in enumerate(steps):
        # Any recompilation after the first one raises.
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            take_step(compiled, opt, batch)
        take_step(before, reference, batch)
        scheduler.step()
    assert len(steps) > 2 * CYCLE
    assert counter.frame_count == 1
    assert_served(opt, backend)
    assert_like_torch(after, before, backend)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05], ids=["", "clipped"])
@backends
def test_a_compiled_training_step_is_not_compiled_again(backend, counter, max_grad_norm):
    before, after = build_model(), build_model()
    reference = wrap(inner(before.parameters()), backend, max_grad_norm=max_grad_norm)
    opt = wrap(inner(after.parameters()), backend, max_grad_norm=max_grad_norm)
    compiled = torch.compile(take_step, backend=counter)
    counters.clear()
    steps = batches()
    for i, batch in enumerate(steps):
        # Any recompilation after the first one raises.
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compiled(after, opt, batch)
        take_step(before, reference, batch)
    assert len(steps) > 2 * CYCLE
    assert counter.frame_count == 1  # the forward pass
    assert opt.iteration == len(steps)
    assert_same(values(after), values(before))
    # Each of these broke the graph at compilation only: step() once where it is called, and once
    # within, where it asks whether it is traced.
    breaks = {"zero_grad": 0, "backward": 0, "CyclicalOptimizer.step": 0}
    for reason, count in counters["graph_break"].items():
        (name,) = (name for name in breaks if name in reason)
        breaks[name] += count
    assert breaks == {"zero_grad": 1, "backward": 1, "CyclicalOptimizer.step": 2}


@backends
def test_the_break_at_step_is_a_clean_one(backend, counter):
    model, (features, labels) = build_model(), batches()[0]
    opt = wrap(inner(model.parameters()), backend)
    functional.cross_entropy(model(features), labels).backward()

    def around(features):
        before = model(features).detach()
        opt.step()
        return before - model(features).detach()

    assert around(features).abs().max() > 0
    explained = torch._dynamo.explain(around)(features)
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)
    assert "torch.compiler.disable" in str(explained.break_reasons[0].reason)


@backends
def test_a_compiled_step_alone_is_not_compiled_again(backend, counter):
    before, after = build_model(), build_model()
    reference, opt = (wrap(inner(m.parameters()), backend) for m in (before, after))
    compiled = torch.compile(lambda: opt.step(), backend=counter)
    for i, (features, labels) in enumerate(batches()):
        for model, each in ((before, reference), (after, opt)):
            each.zero_grad()
            functional.cross_entropy(model(features), labels).backward()
        reference.step()
        with torch._dynamo.config.patch(error_on_recompile=i >= 1):
            compiled()
    assert counter.frame_count == 0  # there is nothing to compile
    assert_same(values(after), values(before))
