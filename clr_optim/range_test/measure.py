"""The LR range test: train for a while as the rate rises, and put everything back.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clr_optim.checks import (
    LAST_STEP,
    check_bool,
    check_choice,
    check_int,
    check_number,
)
from clr_optim.optimizer import CyclicalOptimizer
from clr_optim.range_test.arguments import (
    as_device,
    check_length,
    check_loader,
    check_model,
    check_optimizer,
    no_batches,
)
from clr_optim.range_test.divergence import Divergence
from clr_optim.range_test.forward import Forward, StepFn
from clr_optim.range_test.progress import ProgressLine
from clr_optim.range_test.ranks import Ranks
from clr_optim.range_test.result import METRICS, MODES, RangeTest
from clr_optim.range_test.snapshot import Snapshot
from clr_optim.schedule import ramp

# Overflows in a row under a GradScaler, each halving the scale, after which training is lost.
_MAX_OVERFLOWS = 50


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    start_lr: float,
    end_lr: float,
    num_steps: int | None = None,
    epochs: float | None = None,
    mode: str = "linear",
    metric: str = "loss",
    step_fn: StepFn | None = None,
    target_key: str = "labels",
    accumulate: int = 1,
    val_loader: Iterable[Any] | None = None,
    validate_every: int | None = None,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    max_grad_norm: float | None = None,
    backend: str | None = None,
    offload: bool = False,
    diverge_factor: float = 3.0,
    smoothing: float = 0.05,
    average_ranks: bool | None = None,
    progress: bool | None = None,
) -> RangeTest:
    """Train for a while as the rate rises, measure, and put everything back as it was.

    The test puts back bit for bit, also after an exception or Ctrl-C, and into the same objects:

    - parameters and buffers with shape, stride, dtype and memory, gradients, ``requires_grad``;
    - the optimizer's groups, attributes and state of any type (what Python cannot look into, by a
      deep copy in its place);
    - attributes of all submodules: tensors, arrays, containers, generators of random numbers, and
      objects of other classes that hold nothing but such data; and ``get_extra_state``;
    - of loaders, samplers and datasets: attributes, and the data that they lead to;
    - the random state of torch (CPU and the model's GPUs), Python and NumPy.

    Workers that persist keep their state: the test starts workers of its own, or warns where it
    cannot. Hooks are kept, and run.

    The test leaves as they are: objects that hold a file, a lock, a thread, a stream, a graph or
    other things that cannot be copied (if training changes one in a module, give the module
    ``get_extra_state`` and ``set_extra_state``); data of a loader, or of an object in a module,
    beyond 20,000 objects, or beyond both 64 MiB and the model's size; batches taken from an
    iterator; global variables, and variables of your functions. A warning names what could not be
    put back.

    The optimizer's step runs in :class:`~clr_optim.CyclicalOptimizer`, on the kernels that will
    train. Parameter groups keep the ratio of their rates; ``start_lr`` and ``end_lr`` are those
    of the group with the largest, and the others stay below. A model in eval mode is put in train
    mode; of one in train mode, submodules in eval mode stay so.

    The loss is that of each step's batch before its update. If the mean of the last ten or so grows
    to ``diverge_factor`` times its lowest and out of the losses' noise, or a loss is no longer
    finite, the test ends (``result.diverged``); Ctrl-C ends it too and keeps what was measured
    (``result.interrupted``).

    Under DistributedDataParallel and FSDP2 every rank calls this with its part of the data;
    measurements are averaged, so that all ranks get the same result. (Ctrl-C or an exception on
    one rank alone leaves the others waiting, as in any training.)

    Args:
        model: the model, on its device.
        optimizer: its optimizer, or a :class:`~clr_optim.CyclicalOptimizer`, of which the wrapped
            one is tested, with its ``max_grad_norm`` and backend.
        loader: batches, gone through again from the start when it ends. A batch is a tuple or list
            ``(*inputs, target)`` for ``loss_fn(model(*inputs), target)``, or a dictionary for
            ``loss_fn(model(**rest), batch[target_key])``. All else: ``step_fn``.
        loss_fn: as above; ``None`` for dictionaries of which the model itself returns the loss
            (``output.loss`` or ``output["loss"]`` of ``model(**batch)``).
        start_lr, end_lr: the range of rates, >= 0, or > 0 for ``mode="exponential"``.
        num_steps, epochs: length in optimizer steps (an integer >= 2) or epochs (a number > 0, for
            loaders with a length): one of them. The paper took 8 epochs, of 500 steps each. With
            fewer than 60 steps for each power of ten the rates found are too large.
        mode: ``"linear"``, as in the paper, or ``"exponential"``, for ranges over decades.
        metric: ``"loss"`` or ``"accuracy"`` (in percent) of the batches trained on, or
            ``"validation_loss"`` or ``"validation_accuracy"`` after every ``validate_every`` steps.
        step_fn: ``step_fn(model, batch)`` instead of ``loss_fn``: returns the loss, a dictionary
            with ``"loss"``, or ``(loss, correct, count)`` where accuracy is asked for. A Lightning
            module's: ``lambda model, batch: model.training_step(batch, 0)``.
        target_key: of dictionaries.
        accumulate: batches per optimizer step, whose losses are averaged.
        val_loader: batches for validation, all of them each time.
        validate_every: steps; ``None`` makes about 50 validations.
        device: where batches are moved; ``None`` is that of the model's first parameter.
        amp_dtype: autocast to this dtype; ``torch.float16`` comes with a GradScaler, and steps
            that it skips are not counted.
        max_grad_norm, backend: as in :class:`~clr_optim.CyclicalOptimizer`.
        offload: keep the copy of all that is put back in the CPU's memory.
        diverge_factor: > 1. Of a small minimum this is too little to go by: the mean must rise by
            ``diverge_factor - 1`` times its largest fall, too, and by six standard deviations of
            the losses' noise. Losses of both signs, and all losses before the tenth, have no other
            scale. ``math.inf`` waits for a loss that is not finite.
        smoothing: of the result.
        average_ranks: whether to average over all ranks; ``None`` does so for
            DistributedDataParallel and DTensors, over theirs.
        progress: a line on stderr; ``None`` if that is a terminal.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
        BaseException: what loader, model or optimizer raise, after all has been put back.

    Source: arXiv 1506.01186, section 3.3.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)  # its loss: (3·w₀)²/2 + w₁²/2, curved by 9 at most
        >>> data = [(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> result = lr_range_test(model, torch.optim.SGD(model.parameters(), lr=0.1), data,
        ...                        nn.functional.mse_loss, start_lr=1e-3, end_lr=10.0,
        ...                        num_steps=100, mode="exponential")
        >>> result.diverged
        True
        >>> 1 / 9 < result.suggest().max_lr < 2 / 9
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    check_choice("mode", mode, MODES)
    check_choice("metric", metric, METRICS)
    start_lr = check_number("start_lr", start_lr, open_minimum=mode == "exponential")
    end_lr = check_number("end_lr", end_lr)
    if start_lr >= end_lr:
        raise ValueError(
            f"start_lr={start_lr!r} must be below end_lr={end_lr!r}: the rate rises; swap the two"
        )
    accumulate = check_int("accumulate", accumulate, minimum=1, maximum=LAST_STEP)
    diverge_factor = check_number(
        "diverge_factor", diverge_factor, minimum=1.0, open_minimum=True, finite=False
    )
    smoothing = check_number("smoothing", smoothing, maximum=1.0)
    check_bool("offload", offload)
    check_model(model)
    inner = check_optimizer(model, optimizer)
    if step_fn is not None and loss_fn is not None:
        raise ValueError("step_fn and loss_fn are both given: step_fn returns the loss by itself")
    for name, function in (("step_fn", step_fn), ("loss_fn", loss_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r}")
    validates = metric.startswith("validation")
    if validates != (val_loader is not None):
        raise ValueError(
            f"metric={metric!r} needs a val_loader: give one, or metric='loss'"
            if validates
            else f"val_loader has no effect with metric={metric!r}: use 'validation_loss' or "
            "'validation_accuracy'"
        )
    if validate_every is not None and not validates:
        raise ValueError(f"validate_every={validate_every!r} has no effect with metric={metric!r}")
    if progress is not None:
        check_bool("progress", progress)
    if not any(amp_dtype is dtype for dtype in (None, torch.float16, torch.bfloat16)):
        raise ValueError(
            f"amp_dtype must be torch.float16, torch.bfloat16 or None, got {amp_dtype!r}"
        )
    for name, batches in (("loader", loader), ("val_loader", val_loader)):
        check_loader(name, batches)
    here = next(model.parameters()).device if device is None else as_device(device)
    ranks = Ranks(model, average_ranks, here)
    steps = ranks.largest(check_length(num_steps, epochs, loader, accumulate))
    every = 0
    if validates and validate_every is None:
        every = max(1, steps // 50)
    elif validates:
        every = check_int("validate_every", validate_every, minimum=1)
        if every > steps:
            raise ValueError(f"validate_every={every} is beyond the end, at step {steps}: lower it")

    groups = inner.param_groups
    rates = [own_rate(group) for group in groups]
    largest = max(rates)
    ratios = [rate / largest if largest > 0.0 else 1.0 for rate in rates]
    reference = ratios.index(1.0)
    given = optimizer if isinstance(optimizer, CyclicalOptimizer) else None
    if given is not None:
        max_grad_norm = given._max_grad_norm if max_grad_norm is None else max_grad_norm
        backend = given._backend if backend is None else backend

    result = RangeTest(
        [], [], mode=mode, metric=metric, num_steps=steps, smoothing=smoothing, ratios=ratios
    )
    forward = Forward(model, loss_fn, step_fn, target_key, metric.endswith("accuracy"), here)
    called = [getattr(function, "__self__", function) for function in (loss_fn, step_fn)]
    modules = [m for m in (model, *called) if isinstance(m, nn.Module)]
    snapshot = Snapshot(modules, optimizer, [loader, val_loader], here, offload)
    try:
        snapshot.set_workers_aside()
        # A cycle that the optimizer is in the middle of is not the ramp's.
        for group in groups:
            for key in [key for key in group if key.startswith("clr_")]:
                del group[key]
        if not model.training:
            model.train()
        ours = CyclicalOptimizer(
            inner,
            ramp(steps, mode=mode, ratio=None if mode == "linear" else end_lr / start_lr),
            base_lr=[start_lr * ratio for ratio in ratios],
            max_lr=[end_lr * ratio for ratio in ratios],
            max_grad_norm=max_grad_norm,
            backend="auto" if backend is None else backend,
        )
        scaler = torch.amp.GradScaler(here.type) if amp_dtype is torch.float16 else None
        line = ProgressLine(result, progress)
        batches = _endless(loader)
        stop = Divergence(diverge_factor)
        overflows = 0
        try:
            while ours.iteration < steps and not result.diverged:
                step, lr = ours.iteration, ours.get_last_lr()[reference]
                for param in snapshot.params:
                    param.grad = None
                sums = forward.train(batches, accumulate, amp_dtype, scaler, ranks)
                loss = sums[0] / sums[3]
                if stop.is_reached(loss):
                    if not result.lrs and step == 0:
                        raise ValueError(
                            f"the loss of the first batch is {loss}: no rate can mend that; look "
                            "at the data, the model and loss_fn"
                        )
                    result.diverged = True
                if not math.isfinite(loss):
                    break
                if scaler is None:
                    ours.step()
                else:
                    scaler.step(ours)
                    scaler.update()
                    if ours.iteration == step:
                        overflows += 1
                        result.diverged = overflows > _MAX_OVERFLOWS
                        continue
                    overflows = 0
                if every:
                    if (step + 1) % every:
                        continue
                    assert val_loader is not None
                    sums = forward.validate(val_loader, amp_dtype, ranks)
                value = _value(metric, sums)
                if math.isfinite(value):
                    result.lrs.append(lr)
                    result.values.append(value)
                    result.steps.append(step)
                else:
                    result.diverged = True
                line.show()
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            line.close()
    finally:
        interrupted = False
        while True:
            # What is half put back must not be left so.
            try:
                snapshot.restore()
                break
            except KeyboardInterrupt:
                interrupted = True
        result.interrupted |= interrupted
    return result


def _value(metric: str, sums: Sequence[float]) -> float:
    loss, correct, count, batches = sums
    return 100.0 * correct / count if metric.endswith("accuracy") else loss / batches


def own_rate(group: Mapping[str, Any]) -> float:
    """The rate that the user chose for a group, whatever a schedule has made of it since."""
    for key in ("clr_max_lr", "initial_lr", "lr"):
        if key in group:
            return float(group[key])
    raise ValueError("optimizer: a parameter group has no 'lr', so there is no rate to test")


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches, again and again."""
    seen = 0
    while True:
        before = seen
        for batch in loader:
            seen += 1
            yield batch
        if seen == 0:
            raise no_batches("loader")
        if seen == before:
            raise ValueError(
                f"loader ended after {seen} batches and cannot be started again: give an iterable "
                "that can (a DataLoader, a list), or fewer num_steps"
            )


# Pickles and documentation name the public module. doctest looks for the name under __test__.
lr_range_test.__module__ = "clr_optim.range_test"
__test__ = {"lr_range_test": lr_range_test}
