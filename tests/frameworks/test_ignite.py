"""ignite: its trainer, its checkpoints, and the moment in an iteration at which to log the rate."""

from __future__ import annotations

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
from torch import nn

engine = imported("ignite.engine")
handlers = imported("ignite.handlers")
Events = engine.Events


class Run:
    """``backend=None`` is torch with its CyclicLR, attached as users of ignite do."""

    def __init__(self, backend, *, listed=False, **options):
        self.model = build_model()
        self.opt = inner(self.model.parameters())
        scheduler = None
        if backend is None:
            scheduler = cyclic_lr(self.opt)
        else:
            self.opt = wrap(self.opt, backend)
            scheduler = self.opt.scheduler if listed else None
        self.trainer = engine.create_supervised_trainer(
            self.model, self.opt, nn.CrossEntropyLoss(), **options
        )
        self.started, self.completed = [], []
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self.note, self.started)
        if scheduler is not None:
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note, self.completed)

    def note(self, seen):
        seen.append(self.opt.param_groups[0]["lr"])

    def run(self, epochs=EPOCHS):
        self.trainer.run(build_loader(), max_epochs=epochs)
        return self

    def parts(self):
        """Return the objects that a checkpoint saves. No scheduler is among them."""
        return {"model": self.model, "optimizer": self.opt, "trainer": self.trainer}


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@backends
def test_the_same_course_as_with_a_scheduler(backend, listed):
    before, after = Run(None).run(), Run(backend, listed=listed).run()
    assert_served(after.opt, backend)
    assert after.opt.iteration == STEPS
    assert_like_torch(after.model, before.model, backend)
    # At the start of an iteration the rate is that of its step, at the end that of the next step.
    assert_rates(after.started, before.started)
    assert_rates(after.started, expected_rates()[:STEPS])
    assert_rates(after.completed, before.completed)
    assert_rates(after.completed, expected_rates()[1:])


@backends
def test_ignites_own_handlers_find_the_rate(backend):
    run = Run(backend)
    logged = []

    class Logger:
        def add_scalar(self, name, value, step):
            logged.append((name, value, step))

    handler = imported("ignite.handlers.tensorboard_logger").OptimizerParamsHandler(run.opt)
    logger = object.__new__(imported("ignite.handlers.tensorboard_logger").TensorboardLogger)
    logger.writer = Logger()
    run.trainer.add_event_handler(
        Events.ITERATION_STARTED, handler, logger, Events.ITERATION_STARTED
    )
    run.run(2)
    assert [name for name, _, _ in logged] == ["lr/group_0"] * 2 * EPOCH
    assert [value for _, value, _ in logged] == run.started

    # ignite's wrapper of schedulers writes values into the groups that they already hold.
    other = Run(backend)
    follow = handlers.LRScheduler(other.opt.scheduler)
    other.trainer.add_event_handler(Events.ITERATION_STARTED, follow)
    other.run(2)
    assert other.started == run.started
    assert_same(values(other.model), values(run.model))


@backends
def test_checkpoint_and_resume_in_mid_cycle(backend, tmp_path):
    whole = Run(backend)
    checkpoint = handlers.Checkpoint(whole.parts(), handlers.DiskSaver(str(tmp_path)), n_saved=None)
    whole.trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    whole.run()
    ours = torch.load(tmp_path / f"checkpoint_{EPOCH}.pt", weights_only=True)
    assert ours["optimizer"]["param_groups"][0]["clr_step"] == EPOCH  # of a cycle of 7
    assert_same_checkpoint(ours["optimizer"], Run(None).run(1).opt.state_dict())
    for epoch in range(1, EPOCHS):
        resumed = Run(backend)
        saved = torch.load(tmp_path / f"checkpoint_{epoch * EPOCH}.pt", weights_only=True)
        handlers.Checkpoint.load_objects(resumed.parts(), saved)
        resumed.run()
        assert_same(values(resumed.model), values(whole.model))
        assert resumed.started == whole.started[epoch * EPOCH :]


@backends
def test_accumulated_batches_are_one_step(backend):
    before, after = build_model(), Run(backend, gradient_accumulation_steps=2).run()
    assert after.opt.iteration == STEPS // 2
    # Users of ignite step a scheduler as often.
    opt = inner(before.parameters())
    scheduler = cyclic_lr(opt)
    trainer = engine.create_supervised_trainer(
        before, opt, nn.CrossEntropyLoss(), gradient_accumulation_steps=2
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: scheduler.step())
    trainer.run(build_loader(), max_epochs=EPOCHS)
    assert_like_torch(after.model, before, backend)


@backends
def test_hooks_and_profiler_see_a_step_once(backend):
    watch = Watch()
    run = Run(backend)
    watch.register(run.opt)
    with watch:
        run.run(1)
    watch.check(run.opt, EPOCH)
