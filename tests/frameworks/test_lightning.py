"""Lightning: the changed line in ``configure_optimizers``, and nothing else anywhere."""

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
from torch.nn import functional

L = imported("lightning.pytorch")
callbacks = imported("lightning.pytorch.callbacks")
plugins = imported("lightning.pytorch.plugins")
loggers = imported("lightning.pytorch.loggers")

pytestmark = [
    # Lightning raises these for any optimizer.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning"),
]


class Module(L.LightningModule):
    """A module as users write it. ``before`` is torch's CyclicLR. ``listed`` adds opt.scheduler."""

    def __init__(self, backend, *, listed=False, clip=None, watch=None, **options):
        super().__init__()
        self.net = build_model()
        self.backend, self.listed, self.clip, self.watch = backend, listed, clip, watch
        self.options = options
        self.used = []

    def configure_optimizers(self):
        opt = inner(self.parameters())
        if self.backend is None:
            schedulers = {"scheduler": cyclic_lr(opt), "interval": "step"}
            return {"optimizer": opt, "lr_scheduler": schedulers}
        opt = wrap(opt, self.backend, **self.options)
        if self.watch is not None:
            self.watch.register(opt)
        if self.listed:
            schedulers = {"scheduler": opt.scheduler, "interval": "step"}
            return {"optimizer": opt, "lr_scheduler": schedulers}
        return opt

    def training_step(self, batch, _):
        self.used.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        features, labels = batch
        return functional.cross_entropy(self.net(features), labels)


class Manual(Module):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, i):
        opt = self.optimizers()
        loss = super().training_step(batch, i)
        opt.zero_grad()
        self.manual_backward(loss)
        if self.clip is not None:
            self.clip_gradients(opt, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        opt.step()
        if self.lr_schedulers() is not None:
            self.lr_schedulers().step()


class Memory(loggers.Logger):
    """Notes what a LearningRateMonitor logs, in order."""

    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def fit(module, *, epochs=EPOCHS, monitor=False, resume=None, folder=None, **options):
    """Fit, and return the trainer."""
    more = [callbacks.LearningRateMonitor("step")] if monitor else []
    if folder is not None:
        more.append(callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=Memory() if monitor else False,
        callbacks=more,
        log_every_n_steps=1,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, build_loader(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@pytest.mark.parametrize("kind", [Module, Manual], ids=["automatic", "manual"])
@backends
def test_the_same_course_as_with_a_scheduler(backend, kind, listed):
    before, after = kind(None), kind(backend, listed=listed)
    twin, ours = fit(before, monitor=True), fit(after, monitor=True)
    assert_served(ours.optimizers[0], backend)
    assert_like_torch(after.net, before.net, backend)
    assert ours.global_step == ours.optimizers[0].iteration == STEPS
    assert_rates(after.used, before.used)

    # The monitor logs the rate that the step used. It looks through a wrapper to the name of the
    # wrapped optimizer. If it finds the wrapper by a scheduler, it takes the wrapper's name too.
    names = ["lr-AdamW", "lr-CyclicalOptimizer"] if listed else ["lr-AdamW"]
    assert all(sorted(entry) == names for entry in ours.logger.logged)
    for name in names:
        assert [entry[name] for entry in ours.logger.logged] == after.used
    assert_rates(after.used, [entry["lr-AdamW"] for entry in twin.logger.logged])


@pytest.mark.parametrize("kind", [Module, Manual], ids=["automatic", "manual"])
@backends
def test_clipping_by_norm(backend, kind):
    limit = 0.05
    options = {"gradient_clip_val": limit} if kind is Module else {}
    before, after, own = kind(None, clip=limit), kind(backend, clip=limit), kind(backend)
    fit(before, **options)
    trainer = fit(after, **options)
    assert_served(trainer.optimizers[0], backend)
    assert_like_torch(after.net, before.net, backend)
    own.options["max_grad_norm"] = limit  # in place of Lightning's
    trainer = fit(own)
    assert trainer.optimizers[0].grad_norm > limit
    assert_like_torch(own.net, before.net, backend)


@backends
def test_clipping_by_value(backend):
    before, after = Module(None), Module(backend)
    for module in (before, after):
        fit(module, gradient_clip_val=0.005, gradient_clip_algorithm="value")
    assert_like_torch(after.net, before.net, backend)


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@backends
def test_accumulated_batches_are_one_step(backend, listed):
    before, after = Module(None), Module(backend, listed=listed)
    fit(before, accumulate_grad_batches=2)
    trainer = fit(after, accumulate_grad_batches=2)
    assert_like_torch(after.net, before.net, backend)
    assert_rates(after.used, before.used)
    assert trainer.optimizers[0].iteration == 3 * EPOCHS  # of 5 batches; an epoch's last one counts


def plugin(precision, scale):
    """Return the plugin with a scaler. Lightning builds it without one on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if precision == "16-mixed" else None
    return plugins.MixedPrecision(precision, "cpu", scaler)


@backends
def test_bf16_mixed(backend):
    before, after = Module(None), Module(backend)
    for module in (before, after):
        fit(module, precision="bf16-mixed")
    # Rounding in an update may change the rounding of a later activation to 8 bits.
    if backend == "torch":
        assert_like_torch(after.net, before.net, backend)
    torch.testing.assert_close(values(after), values(before), rtol=0.05, atol=0.005)
    full = Module(backend)
    fit(full)
    assert any((a != b).any() for a, b in zip(values(full), values(after), strict=True))


def test_16_mixed_is_not_to_be_had_on_a_cpu():
    # So the other tests give the trainer a plugin with a scaler for the CPU.
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU"):
        L.Trainer(accelerator="cpu", precision="16-mixed", logger=False)


@pytest.mark.parametrize("clip", [None, 0.05])
@backends
def test_16_mixed(backend, clip):
    before, after = Module(None), Module(backend)
    for module in (before, after):
        fit(module, plugins=[plugin("16-mixed", 2.0**8)], gradient_clip_val=clip)
    if backend == "torch":
        assert_like_torch(after.net, before.net, backend)
    torch.testing.assert_close(values(after), values(before), rtol=0.01, atol=0.001)


@backends
def test_16_mixed_overflows_do_not_move_the_cycle(backend, tmp_path):
    module = Module(backend)
    trainer = fit(module, plugins=[plugin("16-mixed", 2.0**20)], folder=tmp_path)
    scaler = trainer.precision_plugin.scaler
    skipped = round(20 - torch.tensor(scaler.get_scale()).log2().item())
    assert 0 < skipped < EPOCH
    opt = trainer.optimizers[0]
    assert opt.iteration == STEPS - skipped
    # The first rate waits for the first step. Lightning's own count, and CyclicLR, would go on.
    assert module.used[: skipped + 1] == [opt.lr_at(0)[0]] * (skipped + 1)
    assert_rates(module.used[skipped:], expected_rates()[: STEPS - skipped])
    assert trainer.global_step == STEPS

    resumed = Module(backend)
    saved = tmp_path / f"step={2 * EPOCH}.ckpt"
    again = fit(resumed, plugins=[plugin("16-mixed", 2.0**20)], resume=saved, folder=tmp_path)
    assert_same(values(resumed), values(module))
    assert resumed.used == module.used[2 * EPOCH :]
    assert again.precision_plugin.scaler.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@pytest.mark.parametrize("kind", [Module, Manual], ids=["automatic", "manual"])
@backends
def test_checkpoint_and_resume_in_mid_cycle(backend, kind, listed, tmp_path):
    before, whole = kind(None), kind(backend, listed=listed)
    fit(before, folder=tmp_path / "before")
    fit(whole, folder=tmp_path / "after")
    ours = torch.load(tmp_path / "after" / f"step={EPOCH}.ckpt", weights_only=True)
    expected = torch.load(tmp_path / "before" / f"step={EPOCH}.ckpt", weights_only=True)
    assert ours.keys() == expected.keys()
    assert ours["optimizer_states"][0]["param_groups"][0]["clr_step"] == EPOCH  # of a cycle of 7
    assert_same_checkpoint(ours["optimizer_states"][0], expected["optimizer_states"][0])

    for epoch in range(1, EPOCHS):
        resumed = kind(backend, listed=listed)
        saved = tmp_path / "after" / f"step={epoch * EPOCH}.ckpt"
        trainer = fit(resumed, resume=saved, folder=tmp_path / "after")
        assert_same(values(resumed), values(whole))
        assert resumed.used == whole.used[epoch * EPOCH :]
        assert trainer.optimizers[0].iteration == STEPS


@pytest.mark.parametrize("kind", [Module, Manual], ids=["automatic", "manual"])
@backends
def test_hooks_and_profiler_see_a_step_once(backend, kind):
    watch = Watch()
    module = kind(backend, watch=watch)
    with watch:
        trainer = fit(module, epochs=1)
    watch.check(trainer.optimizers[0], EPOCH)
