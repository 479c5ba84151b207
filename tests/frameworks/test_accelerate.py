"""accelerate: the changed line before ``prepare``, with or without a scheduler beside it."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from cases import assert_same
from framework_helpers import (
    EPOCH,
    EPOCHS,
    STEPS,
    Watch,
    assert_like_torch,
    assert_rates,
    assert_same_checkpoint,
    assert_served,
    backends,
    build_loader,
    build_model,
    cyclic_lr,
    expected_rates,
    imported,
    inner,
    values,
    wrap,
)
from torch.nn import functional

accelerate = imported("accelerate")
state = imported("accelerate.state")


def reset():
    """accelerate keeps its settings for the whole process."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def _own_settings():
    reset()
    yield
    reset()


class Run:
    """A training script as users of accelerate write it.

    ``backend=None`` is torch with its CyclicLR. ``listed`` says whether opt.scheduler is
    prepared and stepped in its place.
    """

    def __init__(self, backend, *, listed=False, clip=None, scaler=None, watch=None, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.accelerator.scaler = scaler  # it has one on GPUs only
        self.clip = clip
        model, opt, self.scheduler = build_model(), None, None
        opt = inner(model.parameters())
        if backend is None:
            self.own = self.scheduler = cyclic_lr(opt)
        else:
            self.own = opt = wrap(opt, backend)
            self.scheduler = opt.scheduler if listed else None
        if watch is not None:
            watch.register(opt)
        self.model, self.opt, self.loader = self.accelerator.prepare(model, opt, build_loader())
        if self.scheduler is not None:
            self.scheduler = self.accelerator.prepare(self.scheduler)
        self.used, self.shown = [], []
        self.overflow_at, self.skipped = set(), set()

    def epochs(self, number):
        for _ in range(number):
            for features, labels in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = functional.cross_entropy(self.model(features), labels)
                    self.accelerator.backward(loss)
                    if len(self.used) in self.overflow_at:
                        next(self.model.parameters()).grad[0] = torch.inf
                    if self.clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                    if self.accelerator.sync_gradients:
                        self.used.append(self.opt.param_groups[0]["lr"])
                    self.opt.step()
                    if self.opt.step_was_skipped:
                        self.skipped.add(len(self.used) - 1)
                    if self.scheduler is not None:
                        self.scheduler.step()
                        self.shown.append(self.scheduler.get_last_lr()[0])
                    self.opt.zero_grad()
        return self

    @property
    def bare(self):
        return self.accelerator.unwrap_model(self.model)


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["", "clipped"])
@backends
def test_the_same_course_as_with_a_scheduler(backend, clip, listed):
    before = Run(None, clip=clip).epochs(EPOCHS)
    reset()
    after = Run(backend, clip=clip, listed=listed).epochs(EPOCHS)
    assert_served(after.own, backend)
    assert after.opt.optimizer is after.own
    assert_like_torch(after.bare, before.bare, backend)
    assert_rates(after.used, before.used)
    assert after.own.iteration == STEPS
    if listed:
        assert_rates(after.shown, before.shown)


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@backends
def test_accumulated_batches_are_one_step(backend, listed):
    before = Run(None, gradient_accumulation_steps=2).epochs(EPOCHS)
    reset()
    after = Run(backend, gradient_accumulation_steps=2, listed=listed).epochs(EPOCHS)
    assert_like_torch(after.bare, before.bare, backend)
    assert_rates(after.used, before.used)
    assert after.own.iteration == 3 * EPOCHS  # of 5 batches; the last one of an epoch counts


@backends
def test_bf16(backend):
    before = Run(None, mixed_precision="bf16").epochs(EPOCHS)
    reset()
    after = Run(backend, mixed_precision="bf16").epochs(EPOCHS)
    reset()
    if backend == "torch":
        assert_like_torch(after.bare, before.bare, backend)
    # Rounding in an update may change the rounding of a later activation to 8 bits.
    torch.testing.assert_close(values(after.bare), values(before.bare), rtol=0.05, atol=0.005)
    full = Run(backend).epochs(EPOCHS)
    assert any((a != b).any() for a, b in zip(values(full.bare), values(after.bare), strict=True))


def test_fp16_is_not_to_be_had_on_a_cpu():
    # So the next test gives the accelerator a scaler for the CPU.
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16")
    assert accelerator.scaler is None
    assert not accelerator.native_amp


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@backends
def test_overflows_do_not_move_the_cycle(backend, listed):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run = Run(backend, listed=listed, scaler=scaler)
    run.overflow_at = {0, 3, 4}
    run.epochs(2)
    assert run.own.iteration == 2 * EPOCH - 3
    rates = expected_rates()
    taken = [len(set(range(i)) - run.overflow_at) for i in range(2 * EPOCH)]
    assert_rates(run.used, [rates[k] for k in taken])
    assert run.skipped == run.overflow_at


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@backends
def test_save_state_and_load_state_in_mid_cycle(backend, listed, tmp_path):
    before = Run(None).epochs(1)
    before.accelerator.save_state(tmp_path / "before")
    reset()
    whole = Run(backend, listed=listed)
    for epoch in range(EPOCHS):
        whole.accelerator.save_state(tmp_path / str(epoch))
        whole.epochs(1)
    reset()
    ours = torch.load(tmp_path / "1" / "optimizer.bin", weights_only=True)
    expected = torch.load(tmp_path / "before" / "optimizer.bin", weights_only=True)
    assert ours["param_groups"][0]["clr_step"] == EPOCH  # of a cycle of 7
    assert_same_checkpoint(ours, expected)
    names = {path.name for path in (tmp_path / "before").iterdir()}
    assert {path.name for path in (tmp_path / "1").iterdir()} == (
        names if listed else names - {"scheduler.bin"}
    )
    for epoch in range(EPOCHS):
        resumed = Run(backend, listed=listed)
        resumed.accelerator.load_state(tmp_path / str(epoch))
        resumed.epochs(EPOCHS - epoch)
        assert_same(values(resumed.bare), values(whole.bare))
        assert resumed.used == whole.used[epoch * EPOCH :]
        reset()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@backends
def test_hooks_and_profiler_see_a_step_once(backend, scaled):
    watch = Watch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
    run = Run(backend, watch=watch, scaler=scaler)
    with watch:
        run.epochs(1)
    watch.check(run.own, EPOCH)


# ---- several processes


def _on_a_rank(backend, listed, options):
    """Return rates and parameters of one rank in a run on all ranks."""
    import torch.distributed as dist

    reset()
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    # accelerate's launcher would set these.
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": "0", "ACCELERATE_USE_CPU": "yes"}  # not used, since a group exists
    with mock.patch.dict(os.environ, env):
        run = Run(backend, listed=listed, **options).epochs(EPOCHS)
        assert run.accelerator.num_processes == int(world)
        reset()
    if backend is not None:
        assert_served(run.own, backend)
        assert run.own.iteration == len(run.used)
    return run.used, run.bare.state_dict()


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
@backends
def test_on_two_processes_a_step_is_a_step(ranks, backend, split):
    options = {"dataloader_config": accelerate.DataLoaderConfiguration(split_batches=split)}
    steps = EPOCHS * (EPOCH if split else 3)  # the two share 5 batches
    runs = [ranks.run(2, _on_a_rank, backend, listed, options) for listed in (False, True)]
    for answers in runs:
        for used, parameters in answers:
            assert_rates(used, expected_rates()[:steps])
            assert_same(list(parameters.values()), list(runs[0][0][1].values()))
    # torch's scheduler, prepared as accelerate's documentation says, moves once for each process.
    # Only with split batches is its pace the same.
    ((used, parameters), _) = ranks.run(2, _on_a_rank, None, True, options)
    if split:
        assert_rates(used, expected_rates()[:steps])
        after, before = build_model(), build_model()
        after.load_state_dict(runs[0][0][1])
        before.load_state_dict(parameters)
        assert_like_torch(after, before, backend)
    else:
        assert_rates(used, expected_rates(2 * steps)[::2])
