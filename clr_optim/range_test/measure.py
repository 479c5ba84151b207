"""The LR range test: train while the rate rises, measure, and put everything back.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clr_optim.checks import LAST_STEP, check_bool, check_choice, check_int, check_number
from clr_optim.optimizer import CyclicalOptimizer
from clr_optim.range_test.arguments import (
    as_device,
    check_amp_dtype,
    check_functions,
    check_length,
    check_loader,
    check_model,
    check_optimizer,
    check_rates,
    check_types,
    check_validate_every,
    check_validation,
    choose_range,
    no_batches,
    peak_rate,
)
from clr_optim.range_test.divergence import Divergence
from clr_optim.range_test.forward import Forward, StepFn
from clr_optim.range_test.progress import ProgressLine
from clr_optim.range_test.ranks import Ranks
from clr_optim.range_test.result import METRICS, MODES, RangeTest
from clr_optim.range_test.snapshot import Snapshot
from clr_optim.schedule import ramp

__all__ = ["lr_range_test"]

# Each overflow under a GradScaler halves the scale. More overflows in a row end the test.
_MAX_OVERFLOWS = 50


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    start_lr: float | None = None,
    end_lr: float | None = None,
    num_steps: int | None = None,
    epochs: float | None = None,
    mode: str | None = None,
    metric: str = "loss",
    step_fn: StepFn | None = None,
    target_key: str | None = None,
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
    """Train while the rate rises, measure, and put everything back.

    The test puts everything back bit for bit and into the same objects, also after an exception or
    Ctrl-C:

    - parameters and buffers with shape, stride, dtype and memory, gradients, ``requires_grad``;
    - the optimizer's groups, attributes and state of any type. A deep copy replaces an object that
      Python cannot see into;
    - attributes of all submodules: tensors, arrays, containers, random generators, and objects of
      other classes that hold only such data; and ``get_extra_state``;
    - attributes of loaders, samplers and datasets, and their data;
    - the random state of torch (CPU and the model's GPUs), Python and NumPy.

    Persistent workers keep their state: the test starts new workers, or warns if it cannot. Hooks
    stay, and run.

    The test does not put back:

    - objects that hold a file, a lock, a thread, a stream, a graph or other things without a copy.
      If training changes such an object in a module, give the module ``get_extra_state`` and
      ``set_extra_state``;
    - data of a loader, or of an object in a module, beyond 20,000 objects, or beyond both 64 MiB
      and the model's size;
    - batches taken from an iterator;
    - global variables, and variables of the user's functions.

    A warning names failures to put back.

    The optimizer's step runs in :class:`~clr_optim.CyclicalOptimizer`, on the kernels that will
    train. Parameter groups keep the ratio of their rates. ``start_lr`` and ``end_lr`` are the rates
    of the group with the largest rate. A model in eval mode is put in train mode. In a model in
    train mode, submodules in eval mode stay in eval mode.

    The loss is the loss of each step's batch before its update. The test ends if a loss is not
    finite, or if the mean of about ten losses grows to ``diverge_factor`` times its lowest value
    and beyond the losses' noise (``result.diverged``). Ctrl-C ends the test too, and keeps the
    measurements (``result.interrupted``).

    Under DistributedDataParallel and FSDP2 every rank calls the function with its part of the data.
    The test averages over the ranks, so that all ranks get the same result. (Ctrl-C or an exception
    on a single rank leaves the others waiting, as in any training.)

    Args:
        model: the model, on its device.
        optimizer: the model's optimizer. For a :class:`~clr_optim.CyclicalOptimizer` the test uses
            the wrapped optimizer, and its ``max_grad_norm``, ``master_weights`` and backend.
        loader: batches; at its end the loader starts again. A batch is a tuple or list
            ``(*inputs, target)`` for ``loss_fn(model(*inputs), target)``, or a dictionary for
            ``loss_fn(model(**rest), batch[target_key])``. Other batches need ``step_fn``.
        loss_fn: as above; ``None`` if the model itself returns the loss of a dictionary
            (``output.loss`` or ``output["loss"]`` of ``model(**batch)``).
        start_lr, end_lr: the range of rates, >= 0, or > 0 for ``mode="exponential"``. The defaults
            are 1e-5 and 10, which hold the bounds of most optimizers.
        num_steps, epochs: length in optimizer steps (an integer >= 2) or in epochs (a number > 0,
            for loaders with a length): one of the two; without ``start_lr`` and ``end_lr`` the
            default is 500 steps. The paper's test took 8 epochs of 500 steps. With fewer than 60
            steps per power of ten the rates found are too large.
        mode: ``"linear"``, as in the paper, or ``"exponential"``, for ranges over decades. ``None``
            is ``"linear"`` if both ends of the range are given, else ``"exponential"``.
        metric: ``"loss"`` or ``"accuracy"`` (in percent) of the training batches, or
            ``"validation_loss"`` or ``"validation_accuracy"`` after every ``validate_every`` steps.
        step_fn: ``step_fn(model, batch)`` instead of ``loss_fn``: returns the loss, a dictionary
            with ``"loss"``, or for an accuracy ``(loss, correct, count)``. For a Lightning module:
            ``lambda model, batch: model.training_step(batch, 0)``.
        target_key: the target's key in dictionaries for ``loss_fn``; ``None`` is ``"labels"``.
        accumulate: batches per optimizer step. Their losses are averaged.
        val_loader: batches for validation. Each validation uses all of them.
        validate_every: steps between two validations; ``None`` makes about 50 validations.
        device: device of the batches; ``None``: the device of the model's first parameter.
        amp_dtype: autocast to this dtype. ``torch.float16`` adds a GradScaler, whose skipped steps
            do not count.
        max_grad_norm, backend: as in :class:`~clr_optim.CyclicalOptimizer`.
        offload: whether to keep all copies in the CPU's memory.
        diverge_factor: > 1. The mean must also rise by ``diverge_factor - 1`` times its largest
            fall, and by six standard deviations of the losses' noise, which decide if the lowest
            mean is near 0. The first nine losses end no test. ``math.inf`` waits for a loss that
            is not finite.
        smoothing: as in :class:`RangeTest`.
        average_ranks: whether to average over all ranks; ``None`` averages over the ranks of
            DistributedDataParallel and DTensors.
        progress: whether to show a line on stderr; ``None``: if stderr is a terminal.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
        BaseException: an error of the loader, model or optimizer, after everything was put back.

    Source: arXiv 1506.01186, section 3.3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)  # its loss: (3·w₀)²/2 + w₁²/2, curvature <= 9
        >>> data = [(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> result = lr_range_test(model, torch.optim.SGD(model.parameters(), lr=0.1), data,
        ...                        nn.functional.mse_loss)
        >>> result.diverged
        True
        >>> 1 / 9 < result.suggest().max_lr < 2 / 9
        True
    """
    check_types(model, optimizer)
    start, end, chosen, length = choose_range(start_lr, end_lr, mode, num_steps, epochs)
    mode = check_choice("mode", chosen, MODES)
    check_choice("metric", metric, METRICS)
    start_lr, end_lr = check_rates(start, end, mode)
    accumulate = check_int("accumulate", accumulate, minimum=1, maximum=LAST_STEP)
    diverge_factor = check_number(
        "diverge_factor", diverge_factor, minimum=1.0, open_minimum=True, finite=False
    )
    smoothing = check_number("smoothing", smoothing, maximum=1.0)
    check_bool("offload", offload)
    check_model(model)
    inner = check_optimizer(model, optimizer)
    check_functions(loss_fn, step_fn, target_key)
    check_validation(metric, val_loader, validate_every)
    if progress is not None:
        check_bool("progress", progress)
    check_amp_dtype(amp_dtype)
    check_loader("loader", loader)
    check_loader("val_loader", val_loader)
    here = next(model.parameters()).device if device is None else as_device(device)
    ranks = Ranks(model, average_ranks, here)
    steps = ranks.largest(check_length(length, epochs, loader, accumulate))
    every = 0 if val_loader is None else check_validate_every(validate_every, steps)

    groups = inner.param_groups
    rates = [peak_rate(group) for group in groups]
    largest = max(rates)
    ratios = [rate / largest if largest > 0.0 else 1.0 for rate in rates]
    masters = False
    if isinstance(optimizer, CyclicalOptimizer):
        settings = optimizer._shared.settings
        max_grad_norm = settings.max_grad_norm if max_grad_norm is None else max_grad_norm
        backend = settings.backend if backend is None else backend
        masters = settings.master_weights

    result = RangeTest(
        [], [], mode=mode, metric=metric, num_steps=steps, smoothing=smoothing, ratios=ratios
    )
    forward = Forward(model, loss_fn, step_fn, target_key, metric.endswith("accuracy"), here)
    owners = [getattr(function, "__self__", function) for function in (loss_fn, step_fn)]
    modules = [m for m in (model, *owners) if isinstance(m, nn.Module)]
    snapshot = Snapshot(modules, optimizer, [loader, val_loader], here, offload)
    try:
        snapshot.set_workers_aside()
        # The user's cycle must not continue in the test.
        for group in groups:
            for key in [key for key in group if key.startswith("clr_")]:
                del group[key]
        if not model.training:
            model.train()
        cyclical = CyclicalOptimizer(
            inner,
            ramp(steps, mode=mode, ratio=None if mode == "linear" else end_lr / start_lr),
            base_lr=[start_lr * ratio for ratio in ratios],
            max_lr=[end_lr * ratio for ratio in ratios],
            max_grad_norm=max_grad_norm,
            master_weights=masters,
            backend="auto" if backend is None else backend,
        )
        line = ProgressLine(result, progress)
        training = _Training(
            result=result,
            optimizer=cyclical,
            reference_group=ratios.index(1.0),
            params=snapshot.params,
            forward=forward,
            batches=_endless(loader),
            accumulate=accumulate,
            val_loader=val_loader,
            validate_every=every,
            amp_dtype=amp_dtype,
            scaler=torch.amp.GradScaler(here.type) if amp_dtype is torch.float16 else None,
            ranks=ranks,
            divergence=Divergence(diverge_factor),
            line=line,
        )
        try:
            while cyclical.iteration < steps and not result.diverged:
                training.step()
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            line.close()
    finally:
        result.interrupted |= _restore(snapshot)
    return result


@dataclass
class _Training:
    """A training that measures into a result.

    Args:
        result: the result, which grows.
        optimizer: steps at the rising rate.
        reference_group: number of the parameter group whose rate is measured.
        params: all parameters, whose gradients each step drops first.
        forward, batches, accumulate, amp_dtype, scaler, ranks: as for :meth:`Forward.train`.
        val_loader: the batches for validation.
        validate_every: steps between two validations; 0: no validation.
        divergence: ends the test.
        line: shows the progress.
        overflows: steps in a row that the scaler has skipped.
    """

    result: RangeTest
    optimizer: CyclicalOptimizer[Any]
    reference_group: int
    params: list[Tensor]
    forward: Forward
    batches: Iterator[Any]
    accumulate: int
    val_loader: Iterable[Any] | None
    validate_every: int
    amp_dtype: torch.dtype | None
    scaler: torch.amp.GradScaler | None
    ranks: Ranks
    divergence: Divergence
    line: ProgressLine
    overflows: int = 0

    def step(self) -> None:
        """Take one step, and measure."""
        result, step = self.result, self.optimizer.iteration
        lr = self.optimizer.get_last_lr()[self.reference_group]
        for param in self.params:
            param.grad = None
        sums = self.forward.train(
            self.batches, self.accumulate, self.amp_dtype, self.scaler, self.ranks
        )
        loss = sums[0] / sums[3]
        if self.divergence.is_reached(loss):
            if not result.lrs and step == 0:
                raise ValueError(
                    f"the loss of the first batch is {loss}, before any step: look at the data, "
                    "the model and loss_fn"
                )
            result.diverged = True
        if not math.isfinite(loss) or not self._update(step):
            return
        if self.validate_every:
            if (step + 1) % self.validate_every:
                return
            assert self.val_loader is not None
            sums = self.forward.validate(self.val_loader, self.amp_dtype, self.ranks)
        value = _value(result.metric, sums)
        if math.isfinite(value):
            result.lrs.append(lr)
            result.values.append(value)
            result.steps.append(step)
        else:
            result.diverged = True
        self.line.show()

    def _update(self, step: int) -> bool:
        """Update the parameters, and return whether the scaler took the step."""
        if self.scaler is None:
            self.optimizer.step()
            return True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.optimizer.iteration == step:
            self.overflows += 1
            self.result.diverged = self.overflows > _MAX_OVERFLOWS
            return False
        self.overflows = 0
        return True


def _restore(snapshot: Snapshot) -> bool:
    """Put everything back. After Ctrl-C begin anew, and return True."""
    interrupted = False
    while True:
        try:
            snapshot.restore()
            break
        except KeyboardInterrupt:
            interrupted = True
    return interrupted


def _value(metric: str, sums: Sequence[float]) -> float:
    loss, correct, count, batches = sums
    return 100.0 * correct / count if metric.endswith("accuracy") else loss / batches


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the loader's batches again and again."""
    count = 0
    while True:
        before = count
        for batch in loader:
            count += 1
            yield batch
        if count == 0:
            raise no_batches("loader")
        if count == before:
            raise ValueError(
                f"loader ended after {count} batches and cannot be started again: give an iterable "
                "that can (a DataLoader, a list), or fewer num_steps"
            )


# Pickles and documentation name the public module.
lr_range_test.__module__ = "clr_optim.range_test"
