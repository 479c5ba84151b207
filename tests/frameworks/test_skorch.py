"""skorch: a function that returns the wrapped optimizer, in place of an optimizer's class."""

from __future__ import annotations

import pickle

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
    values,
    wrap,
)
from torch import nn

skorch = imported("skorch")
callbacks = imported("skorch.callbacks")


def cyclical_adamw(params, backend, max_grad_norm=None, **options):
    """Return the wrapped optimizer. A function of the module, so that the net pickles."""
    return wrap(torch.optim.AdamW(params, **options), backend, max_grad_norm=max_grad_norm)


def cyclic(optimizer, last_epoch):
    return cyclic_lr(optimizer)


def follow(optimizer, last_epoch):
    return optimizer.scheduler


class Used(callbacks.Callback):
    """Notes the rate of each step."""

    def initialize(self):
        self.rates = []

    def on_grad_computed(self, net, named_parameters, **kwargs):
        self.rates.append(net.optimizer_.param_groups[0]["lr"])


def build_net(backend, *, listed=False, **options):
    """Return a net. ``backend=None`` is torch with its CyclicLR."""
    shared = {
        "module": build_model,
        "criterion": nn.CrossEntropyLoss,
        "lr": TOP,
        "optimizer__weight_decay": 0.1,
        "max_epochs": EPOCHS,
        "batch_size": BATCH,
        "train_split": None,
        "verbose": 0,
        "torch_load_kwargs": {"weights_only": True},
    }
    policy = cyclic if backend is None else follow
    schedule = callbacks.LRScheduler(policy=policy, step_every="batch")
    more = [("used", Used()), *([("schedule", schedule)] if listed or backend is None else [])]
    if backend is None:
        own = {"optimizer": torch.optim.AdamW}
    else:
        own = {"optimizer": cyclical_adamw, "optimizer__backend": backend}
    return skorch.NeuralNetClassifier(**shared, **own, callbacks=more, **options)


def fit(net, epochs=None):
    features, labels = build_data()
    if epochs is None:
        return net.fit(features.numpy(), labels.numpy())
    return net.partial_fit(features.numpy(), labels.numpy(), epochs=epochs)


def used(net):
    return dict(net.callbacks_)["used"].rates


@pytest.mark.parametrize("listed", [False, True], ids=["", "scheduler"])
@backends
def test_the_same_course_as_with_a_scheduler(backend, listed):
    before, after = fit(build_net(None)), fit(build_net(backend, listed=listed))
    assert_served(after.optimizer_, backend)
    assert after.optimizer_.iteration == STEPS
    assert_like_torch(after.module_, before.module_, backend)
    assert_rates(used(after), used(before))
    assert_rates(used(after), expected_rates()[:STEPS])
    features, labels = build_data()
    assert after.score(features.numpy(), labels.numpy()) > 0.5


@backends
def test_the_logged_rate_is_what_the_step_used(backend):
    before, after = fit(build_net(None)), fit(build_net(backend, listed=True))
    for net in (before, after):
        logged = [rate for rates in net.history[:, "batches", :, "event_lr"] for rate in rates]
        assert logged == used(net)


@backends
def test_parameters_reach_the_wrapped_optimizer(backend):
    net = build_net(backend, optimizer__max_grad_norm=1.0, optimizer__betas=(0.8, 0.9)).initialize()
    parameters = net.get_params()
    assert parameters["optimizer"] is cyclical_adamw
    assert parameters["optimizer__betas"] == (0.8, 0.9)
    assert net.optimizer_.param_groups[0]["betas"] == (0.8, 0.9)
    fit(net, 1)
    assert net.optimizer_.grad_norm is not None
    net.set_params(optimizer__weight_decay=0.2)  # skorch writes it into the groups
    assert net.optimizer_.param_groups[0]["weight_decay"] == 0.2
    # skorch writes the rate too, and the policy overrules it. set_bounds is the way.
    net.set_params(lr=0.5)
    with pytest.warns(UserWarning, match=r"lr was written from outside in parameter group 0 \(0.5"):
        fit(net, 1)
    assert_rates(used(net), expected_rates()[: 2 * EPOCH])


@backends
def test_save_and_load_in_mid_cycle(backend, tmp_path):
    before, whole = build_net(None).initialize(), build_net(backend).initialize()
    names = {key: str(tmp_path / key) for key in ("f_params", "f_optimizer")}
    for epoch in range(EPOCHS):
        fit(whole, 1)
        if epoch == 0:
            fit(before, 1)
            whole.save_params(**names)
            pickled = pickle.dumps(whole)
    ours = torch.load(names["f_optimizer"], weights_only=True)
    assert ours["param_groups"][0]["clr_step"] == EPOCH  # of a cycle of 7
    assert_same_checkpoint(ours, before.optimizer_.state_dict())

    loaded = build_net(backend).initialize()
    loaded.load_params(**names)
    unpickled = pickle.loads(pickled)
    del used(unpickled)[:]
    for resumed in (loaded, unpickled):
        fit(resumed, EPOCHS - 1)
        assert_same(values(resumed.module_), values(whole.module_))
        assert used(resumed) == used(whole)[EPOCH:]


@backends
def test_hooks_and_profiler_see_a_step_once(backend):
    watch = Watch()
    net = build_net(backend).initialize()
    watch.register(net.optimizer_)
    with watch:
        fit(net, 1)
    watch.check(net.optimizer_, EPOCH)
