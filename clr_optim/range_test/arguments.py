"""Check the arguments of lr_range_test, before anything has changed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clr_optim.checks import check_int, check_number
from clr_optim.keys import MAX
from clr_optim.optimizer import CyclicalOptimizer
from clr_optim.rules import reads_first_rate_alone

__all__ = [
    "DEFAULT_RANGE", "DEFAULT_STEPS", "as_device", "check_amp_dtype", "check_functions",
    "check_length", "check_loader",
    "check_model", "check_optimizer", "check_rates", "check_types", "check_validate_every",
    "check_validation", "choose_range", "no_batches", "peak_rate",
]  # fmt: skip

#: The range of a test without a range, for ``mode="exponential"``: from rates far too small to
#: rates far too large for any optimizer. 83 steps per power of ten.
DEFAULT_RANGE = (1e-5, 10.0)
DEFAULT_STEPS = 500


def choose_range(
    start_lr: object, end_lr: object, mode: object, num_steps: object, epochs: object
) -> tuple[object, object, object, object]:
    """Return range, mode and number of steps; defaults replace what the user left out."""
    if mode is None:
        mode = "exponential" if start_lr is None or end_lr is None else "linear"
    if mode == "linear" and (start_lr is None or end_lr is None):
        raise ValueError(
            f"start_lr={start_lr!r} and end_lr={end_lr!r}: give both for mode='linear', as in "
            "start_lr=0.0, end_lr=1.0, or leave out mode"
        )
    if start_lr is None and end_lr is None and num_steps is None and epochs is None:
        num_steps = DEFAULT_STEPS
    start_lr = DEFAULT_RANGE[0] if start_lr is None else start_lr
    end_lr = DEFAULT_RANGE[1] if end_lr is None else end_lr
    return start_lr, end_lr, mode, num_steps


def check_types(model: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")


def check_rates(start_lr: object, end_lr: object, mode: str) -> tuple[float, float]:
    """Return both rates as numbers."""
    start = check_number("start_lr", start_lr, open_minimum=mode == "exponential")
    end = check_number("end_lr", end_lr)
    if start >= end:
        raise ValueError(
            f"start_lr={start!r} must be below end_lr={end!r}: the rate rises; swap the two"
        )
    if mode == "exponential" and math.isinf(end / start):
        raise ValueError(
            f"start_lr={start!r} is too far below end_lr={end!r}, whose ratio is beyond the "
            "largest float: raise start_lr"
        )
    return start, end


def check_model(model: nn.Module) -> None:
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError(
            "model has lazy parameters, which have no values yet: run one batch through it first"
        )
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError("model has no parameter with requires_grad: there is nothing to train")


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Return the optimizer to wrap: for a :class:`~clr_optim.CyclicalOptimizer`, the one inside."""
    inner = optimizer.optimizer if isinstance(optimizer, CyclicalOptimizer) else optimizer
    name = type(inner).__name__
    if isinstance(optimizer, CyclicalOptimizer) and optimizer._shared.in_backward.is_active:
        raise ValueError(
            "optimizer updates its parameters in the backward pass (step_in_backward()), so that "
            "the test's rates would have no effect: call remove() of its handle before the test, "
            "and step_in_backward() after it"
        )
    if reads_first_rate_alone(inner):
        raise ValueError(
            f"optimizer is a {name}, which reads lr at its first step only, so that the test's "
            "rates would have no effect: use another optimizer"
        )
    try:
        closure = inspect.signature(type(inner).step).parameters.get("closure")
    except (TypeError, ValueError):
        closure = None
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer is a {name}, whose step needs a closure and chooses its own step length: "
            "a range test cannot find its bounds; use an optimizer that takes one gradient per step"
        )
    trained = {id(param) for param in model.parameters() if param.requires_grad}
    if not any(id(param) in trained for group in inner.param_groups for param in group["params"]):
        raise ValueError(
            f"optimizer: none of the {name}'s parameters is a trainable parameter of the model: "
            "build the optimizer from this model's parameters(), after wrapping or moving the model"
        )
    return inner


def check_functions(loss_fn: object, step_fn: object, target_key: object) -> None:
    if step_fn is not None and loss_fn is not None:
        raise ValueError(
            "step_fn and loss_fn are both given: step_fn returns the loss; leave out loss_fn"
        )
    for name, function in (("step_fn", step_fn), ("loss_fn", loss_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r}")
    if target_key is not None and loss_fn is None:
        raise ValueError(
            f"target_key={target_key!r} has no effect without a loss_fn: leave it out, or give one"
        )


def check_validation(metric: str, val_loader: object, validate_every: object) -> None:
    validates = metric.startswith("validation")
    if validates and val_loader is None:
        raise ValueError(f"metric={metric!r} needs a val_loader: give one, or metric='loss'")
    if not validates and val_loader is not None:
        raise ValueError(
            f"val_loader has no effect with metric={metric!r}: use 'validation_loss' or "
            "'validation_accuracy'"
        )
    if validate_every is not None and not validates:
        raise ValueError(f"validate_every={validate_every!r} has no effect with metric={metric!r}")


def check_validate_every(validate_every: object, steps: int) -> int:
    """Return the steps between two validations. By default there are about 50 validations."""
    if validate_every is None:
        return max(1, steps // 50)
    every = check_int("validate_every", validate_every, minimum=1)
    if every > steps:
        raise ValueError(
            f"validate_every={every} is beyond the end, at step {steps}: lower validate_every"
        )
    return every


def check_amp_dtype(amp_dtype: object) -> None:
    if not any(amp_dtype is dtype for dtype in (None, torch.float16, torch.bfloat16)):
        raise ValueError(
            f"amp_dtype must be torch.float16, torch.bfloat16 or None, got {amp_dtype!r}"
        )


def as_device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        if found.type == "meta":
            raise ValueError("tensors there have no values")
        return found
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"device must be a device of this machine, such as 'cpu' or 'cuda:0', got {device!r} "
            f"({' '.join(str(error).split())})"
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
            f"{name} is an iterator, which yields its batches only once, and each validation "
            "needs all batches: give a DataLoader or a list"
        )


def no_batches(name: str) -> ValueError:
    """Return the error for a loader without batches."""
    return ValueError(
        f"{name} is empty: it has no batch (a DataLoader with drop_last=True has no batch if the "
        "dataset is smaller than batch_size)"
    )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def check_length(num_steps: object, epochs: object, loader: Iterable[Any], accumulate: int) -> int:
    """Return the length of the test in steps."""
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
            f"epochs={epochs!r} of {length} batches, {accumulate} per step, make {steps} steps: at "
            "least 2 are needed; raise epochs"
        )
    return steps


def peak_rate(group: Mapping[str, Any]) -> float:
    """Return the rate that the user chose for a group, not the present rate of a schedule."""
    for key in (MAX, "initial_lr", "lr"):
        if key in group:
            return float(group[key])
    raise ValueError("optimizer: a parameter group has no 'lr': give each group a rate")
