"""Wrong arguments of lr_range_test raise an error that names the remedy, and change nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from range_test_helpers import linear_model, make_data, same
from torch import Tensor, nn
from torch.nn import functional

from clr_optim import CyclicalOptimizer
from clr_optim.range_test import lr_range_test


def _requires_nothing() -> nn.Module:
    return linear_model().requires_grad_(False)


def _with_hooks(model: nn.Module) -> CyclicalOptimizer[Any]:
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters()), backend="native")
    opt.step_in_backward()
    return opt


class Once:
    """An iterable that is no iterator, and yields its batches only once."""

    def __init__(self) -> None:
        self.batches = iter(make_data(2))

    def __iter__(self):
        yield from self.batches


def twice_a_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "model must be a torch.nn.Module", {"model": "model"}),
    (TypeError, "optimizer must be a torch.optim.Optimizer", {"optimizer": 1}),
    (ValueError, "start_lr=0.1 must be below end_lr=0.1.*swap", {"start_lr": 0.1}),
    (ValueError, "start_lr must be .* got -1", {"start_lr": -1}),
    (ValueError, "start_lr must be a finite number > 0", {"start_lr": 0, "mode": "exponential"}),
    (ValueError, "end_lr must be", {"end_lr": math.inf}),
    (
        ValueError,
        "start_lr=1e-320 is too far below end_lr=10.0.*raise start_lr",
        {"start_lr": 1e-320, "end_lr": 10.0, "mode": "exponential"},
    ),
    (ValueError, "target_key='y' has no effect: a batch is a tuple", {"target_key": "y"}),
    (
        ValueError,
        "target_key='y' has no effect without a loss_fn",
        {"target_key": "y", "loss_fn": None, "step_fn": lambda model, batch: 1.0},
    ),
    (ValueError, r"device must be a device of this machine.*'meta' \(", {"device": "meta"}),
    *(
        (error, words, {"loss_fn": None, "metric": "accuracy", "step_fn": step_fn})
        for error, words, step_fn in (
            (
                TypeError,
                "correct of .loss, correct, count. must be a number, got None",
                lambda model, batch: (model(batch[0]).sum(), None, 3),
            ),
            (
                TypeError,
                "count of .loss, correct, count. must be a number, got None",
                lambda model, batch: (model(batch[0]).sum(), 1, None),
            ),
            (
                ValueError,
                "count of .loss, correct, count. must be a finite number > 0, got 0",
                lambda model, batch: (model(batch[0]).sum(), 1, 0),
            ),
        )
    ),
    (
        ValueError,
        "optimizer is a Rprop, which reads lr at its first step only",
        {"optimizer": "rprop"},
    ),
    (ValueError, "start_lr=None and end_lr=0.1: give both", {"start_lr": None, "mode": "linear"}),
    (ValueError, "num_steps=None and epochs=None", {"start_lr": None, "num_steps": None}),
    (ValueError, "mode must be one of", {"mode": "log"}),
    (ValueError, "metric must be one of", {"metric": "f1"}),
    (ValueError, "num_steps must be an integer >= 2, got 0", {"num_steps": 0}),
    (ValueError, "num_steps=6 and epochs=1.*one of them", {"epochs": 1}),
    (ValueError, "num_steps=None and epochs=None", {"num_steps": None}),
    (ValueError, "epochs must be", {"num_steps": None, "epochs": 0}),
    (ValueError, "raise epochs", {"num_steps": None, "epochs": 0.25}),
    (ValueError, "num_steps instead", {"num_steps": None, "epochs": 1, "loader": iter([])}),
    (ValueError, "loader is empty", {"loader": []}),
    (ValueError, "loader is empty", {"loader": iter([])}),
    (TypeError, "loader must be an iterable", {"loader": 3}),
    (ValueError, "ended after 4 batches.*fewer num_steps", {"loader": "iterator"}),
    (ValueError, "ended after 2 batches.*DataLoader", {"loader": "once"}),
    (ValueError, "needs a val_loader", {"metric": "validation_loss"}),
    (ValueError, "val_loader has no effect", {"val_loader": [1]}),
    (ValueError, "val_loader is empty", {"val_loader": [], "metric": "validation_loss"}),
    (ValueError, "only once", {"val_loader": iter([1]), "metric": "validation_loss"}),
    (ValueError, "validate_every=3 has no effect", {"validate_every": 3}),
    (
        ValueError,
        "validate_every=9 is beyond",
        {"validate_every": 9, "metric": "validation_loss", "val_loader": [1]},
    ),
    (ValueError, "accumulate must be", {"accumulate": 0}),
    (ValueError, "diverge_factor must be", {"diverge_factor": 1.0}),
    (ValueError, "smoothing must be", {"smoothing": 2.0}),
    (TypeError, "offload must be True or False", {"offload": 1}),
    (ValueError, "amp_dtype must be", {"amp_dtype": torch.float64}),
    (ValueError, "init_process_group", {"average_ranks": True}),
    (ValueError, "scalar tensor, got a tensor of shape", {"loss_fn": twice_a_loss}),
    (ValueError, "scalar tensor, got 1.0", {"loss_fn": lambda output, target: 1.0}),
    (ValueError, "without detach", {"loss_fn": lambda output, target: torch.zeros(())}),
    (ValueError, "first batch is nan", {"loss_fn": lambda output, _: output.sum() * math.nan}),
    (ValueError, "both given", {"step_fn": lambda model, batch: 0}),
    (TypeError, "loss_fn must be callable", {"loss_fn": 3}),
    (ValueError, "needs a step_fn", {"loss_fn": None}),
    (ValueError, "a batch is a Tensor.*step_fn", {"loader": [torch.zeros(8, 6)]}),
    (
        ValueError,
        r"target_key='labels' is not in the batch, which has \['x'\]",
        {"loader": [{"x": torch.zeros(8, 6)}]},
    ),
    (
        ValueError,
        "accuracy needs scores",
        {
            "metric": "accuracy",
            "loss_fn": lambda o, t: o.sum(),
            "loader": [(torch.ones(1, 6),) * 2],
        },
    ),
    (
        ValueError,
        "got a loss alone",
        {"metric": "accuracy", "loss_fn": None, "step_fn": lambda m, b: m(b[0]).sum()},
    ),
    (ValueError, "got 2 values", {"loss_fn": None, "step_fn": lambda m, b: (m(b[0]).sum(), 1)}),
    (ValueError, "nothing to train", {"model": "frozen"}),
    (ValueError, "lazy", {"model": "lazy"}),
    (ValueError, "LBFGS, whose step needs a closure", {"optimizer": "lbfgs"}),
    (ValueError, "none of the SGD's parameters", {"optimizer": "foreign"}),
    (ValueError, "step_in_backward.*call remove.. of its handle", {"optimizer": "in backward"}),
    (ValueError, "backend='gpu' must be one of", {"backend": "gpu"}),
    (TypeError, "loader must be an iterable of batches, got None", {"loader": None}),
    (ValueError, r"accumulate must be an integer <= 2\*\*63 - 1", {"accumulate": 2**70}),
    (ValueError, "device must be a device of this machine.*got ''", {"device": ""}),
    (ValueError, "device must be a device of this machine.*got 'abacus'", {"device": "abacus"}),
    (ValueError, "device must be a device of this machine.*got -1", {"device": -1}),
    (ValueError, "amp_dtype must be torch.float16, .* got array", {"amp_dtype": np.ones(2)}),
    (TypeError, "progress must be True or False, got 1", {"progress": 1}),
]


def wrong_arguments(change: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Return arguments of lr_range_test with ``change``, and the right model and optimizer."""
    model: Any = linear_model()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    special: dict[str, Any] = {
        "frozen": _requires_nothing,
        "lazy": lambda: nn.LazyLinear(3),
        "rprop": lambda: torch.optim.Rprop(model.parameters()),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters()),
        "foreign": lambda: torch.optim.SGD(linear_model().parameters()),
        "in backward": lambda: _with_hooks(model),
        "iterator": lambda: iter(make_data()),
        "once": Once,
    }
    arguments: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "loader": make_data(),
        "loss_fn": functional.cross_entropy,
        "start_lr": 0.01,
        "end_lr": 0.1,
        "num_steps": 6,
    }
    for name, value in change.items():
        known = special.get(value) if isinstance(value, str) else None
        arguments[name] = value if known is None else known()
    return arguments, model, optimizer


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=lambda value: None)
def test_wrong_input_is_refused_and_changes_nothing(error, message, change):
    arguments, model, optimizer = wrong_arguments(change)
    before = copy.deepcopy([*model.parameters(), torch.get_rng_state()])
    groups = copy.deepcopy({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    with pytest.raises(error, match=message):
        lr_range_test(**arguments)
    assert same(before, [*model.parameters(), torch.get_rng_state()])
    assert groups == {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert not optimizer.state


def test_a_device_that_this_machine_lacks_is_refused():
    """Not among the errors above: the reason in brackets is that of torch's build."""
    arguments, *_ = wrong_arguments({"device": "cuda:99"})
    words = r"device must be a device of this machine.* got 'cuda:99' \(."
    with pytest.raises(ValueError, match=words):
        lr_range_test(**arguments)
