"""Check the arguments of lr_range_test."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clr_optim.checks import (
    check_int,
    check_number,
)
from clr_optim.optimizer import CyclicalOptimizer


def check_model(model: nn.Module) -> None:
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError(
            "model has lazy parameters, which have no values yet: run one batch through it first"
        )
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError("model has no parameter with requires_grad: there is nothing to train")


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """The optimizer to wrap."""
    inner = optimizer.optimizer if isinstance(optimizer, CyclicalOptimizer) else optimizer
    name = type(inner).__name__
    try:
        closure = inspect.signature(type(inner).step).parameters.get("closure")
    except (TypeError, ValueError):
        closure = None
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer is a {name}, whose step needs a closure and searches for its own way: a "
            "range test says nothing about it; use one of gradient descent's kind"
        )
    own = {id(param) for param in model.parameters() if param.requires_grad}
    if not any(id(param) in own for group in inner.param_groups for param in group["params"]):
        raise ValueError(
            f"optimizer: none of the {name}'s parameters is a trainable one of the model: build it "
            "from this model's parameters(), after the model was wrapped or moved"
        )
    return inner


def as_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"device must be one that is here, such as 'cpu' or 'cuda:0', got {device!r} ({error})"
        ) from error


def check_loader(name: str, loader: object) -> None:
    if loader is None and name == "val_loader":
        return
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} must be an iterable of batches, got {loader!r}")
    if _length(loader) == 0:
        raise no_batches(name)
    if name == "val_loader" and isinstance(loader, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be gone through only once, and every validation "
            "goes through it: give a DataLoader or a list"
        )


def no_batches(name: str) -> ValueError:
    return ValueError(
        f"{name} is empty: it has no batch (a DataLoader with drop_last=True has none if the data "
        "are fewer than batch_size)"
    )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def check_length(num_steps: object, epochs: object, loader: Iterable[Any], accumulate: int) -> int:
    if (num_steps is None) == (epochs is None):
        raise ValueError(
            f"num_steps={num_steps!r} and epochs={epochs!r}: give the test's length by one of them"
        )
    if num_steps is not None:
        return check_int("num_steps", num_steps, minimum=2)
    length = _length(loader)
    if length is None:
        raise ValueError(f"epochs={epochs!r} needs a loader with a length: give num_steps instead")
    steps = int(check_number("epochs", epochs, open_minimum=True) * length / accumulate)
    if steps < 2:
        raise ValueError(
            f"epochs={epochs!r} of {length} batches, {accumulate} a step, make {steps} steps: at "
            "least 2 are needed; raise epochs"
        )
    return steps
