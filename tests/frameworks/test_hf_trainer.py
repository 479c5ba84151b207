"""The Trainer of transformers: the changed line, and the pair passed to ``optimizers=``."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import assert_same
from framework_helpers import (
    BATCH,
    EPOCH,
    EPOCHS,
    STEPS,
    TOP,
    Watch,
    assert_like_torch,
    assert_rates,
    assert_same_checkpoint,
    assert_served,
    backends,
    build_data,
    build_model,
    cyclic_lr,
    expected_rates,
    imported,
    inner,
    values,
    wrap,
)
from torch import nn
from torch.nn import functional

transformers = imported("transformers")
imported("transformers.trainer")
state = imported("accelerate.state")


@pytest.fixture(autouse=True)
def _own_settings():
    """accelerate, beneath the Trainer, keeps its settings for the whole process."""
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


class Plain(nn.Module):
    """A model outside transformers. The Trainer takes anything that returns a loss."""

    def __init__(self):
        super().__init__()
        self.net = build_model()

    def forward(self, features, labels):
        logits = self.net(features)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def plain():
    rows = zip(*build_data(), strict=True)
    return Plain(), [{"features": features, "labels": label} for features, label in rows]


def language_model():
    """Return a model made from a configuration, without any download."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(12, (BATCH * EPOCH, 6), generator=torch.Generator().manual_seed(4))
    return model, [{"input_ids": row, "labels": row} for row in tokens]


def sgd(params):
    return torch.optim.SGD(params, lr=TOP, momentum=0.9)


class Rates(transformers.TrainerCallback):
    """Notes the rate of each step."""

    def __init__(self):
        self.used = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.used.append(optimizer.param_groups[0]["lr"])


class Run:
    """A Trainer with torch's CyclicLR (``backend=None``), or with the pair that ``pair`` makes."""

    def __init__(
        self, backend, folder, *, make=plain, pair=lambda opt: (opt, opt.scheduler), **args
    ):
        self.model, rows = make()
        # A key's bias has no gradient but rounding errors, of which Adam would make whole steps.
        opt = (inner if make is plain else sgd)(self.model.parameters())
        if backend is None:
            optimizers = opt, cyclic_lr(opt)
        else:
            opt = wrap(opt, backend)
            optimizers = pair(opt)
        self.own, self.rates = opt, Rates()
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            logging_steps=1,
            save_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **args,
        )
        self.trainer = transformers.Trainer(
            model=self.model,
            args=arguments,
            train_dataset=rows,
            optimizers=optimizers,
            callbacks=[self.rates],
        )

    def train(self, resume=None):
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return self

    @property
    def used(self):
        return self.rates.used

    @property
    def logged(self):
        history = self.trainer.state.log_history
        return [entry["learning_rate"] for entry in history if "learning_rate" in entry]


@pytest.mark.parametrize("make", [plain, language_model])
@backends
def test_the_same_course_as_with_a_scheduler(backend, make, tmp_path):
    # The Trainer clips by default.
    before = Run(None, tmp_path / "before", make=make).train()
    after = Run(backend, tmp_path / "after", make=make).train()
    assert_served(after.own, backend)
    assert after.own.iteration == STEPS
    assert_like_torch(after.model, before.model, backend)
    assert_rates(after.used, before.used)
    assert_rates(after.used, expected_rates()[:STEPS])


@backends
def test_the_logged_rate_is_what_the_step_used(backend, tmp_path):
    before = Run(None, tmp_path / "before").train()
    after = Run(backend, tmp_path / "after").train()
    assert before.logged == before.used
    assert after.logged == after.used


@backends
def test_the_trainers_own_scheduler_does_not_disturb_the_cycle(backend, tmp_path):
    expected = Run(backend, tmp_path / "with").train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = Run(backend, tmp_path / "without", pair=lambda opt: (opt, None)).train()
    assert [str(w.message)[:53] for w in caught] == [
        "lr was written from outside in parameter group 0 (0.0"
    ]
    assert_same(values(after.model), values(expected.model))
    assert after.own.iteration == STEPS
    assert_rates(after.own.get_last_lr(), expected_rates()[STEPS:])
    # The Trainer logs its own schedule: a straight line to 0.
    assert after.logged != pytest.approx(expected.used)


@backends
def test_accumulated_batches_are_one_step(backend, tmp_path):
    before = Run(None, tmp_path / "before", gradient_accumulation_steps=2).train()
    after = Run(backend, tmp_path / "after", gradient_accumulation_steps=2).train()
    assert_like_torch(after.model, before.model, backend)
    assert_rates(after.used, before.used)
    assert after.own.iteration == 3 * EPOCHS  # of 5 batches; the last one of an epoch counts


@backends
def test_bf16(backend, tmp_path):
    before = Run(None, tmp_path / "before", bf16=True).train()
    after = Run(backend, tmp_path / "after", bf16=True).train()
    if backend == "torch":
        assert_like_torch(after.model, before.model, backend)
    # Rounding in an update may change the rounding of a later activation to 8 bits.
    torch.testing.assert_close(values(after.model), values(before.model), rtol=0.05, atol=0.005)


@pytest.mark.parametrize("make", [plain, language_model])
@backends
def test_checkpoint_and_resume_in_mid_cycle(backend, make, tmp_path):
    Run(None, tmp_path / "before", make=make).train()
    whole = Run(backend, tmp_path / "after", make=make).train()
    before, after = (tmp_path / name / f"checkpoint-{EPOCH}" for name in ("before", "after"))
    assert {path.name for path in after.iterdir()} == {path.name for path in before.iterdir()}
    ours, expected = (torch.load(p / "optimizer.pt", weights_only=True) for p in (after, before))
    assert ours["param_groups"][0]["clr_step"] == EPOCH  # of a cycle of 7
    assert_same_checkpoint(ours, expected)
    for epoch in range(1, EPOCHS):
        resumed = Run(backend, tmp_path / "again", make=make)
        resumed.train(tmp_path / "after" / f"checkpoint-{epoch * EPOCH}")
        assert_same(values(resumed.model), values(whole.model))
        assert resumed.used == whole.used[epoch * EPOCH :]
        assert resumed.logged == whole.logged


@backends
def test_hooks_and_profiler_see_a_step_once(backend, tmp_path):
    watch = Watch()
    run = Run(backend, tmp_path)
    watch.register(run.own)
    with watch:
        run.train()
    watch.check(run.own, STEPS)
