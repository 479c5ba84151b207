"""Turn a batch into a loss and its gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clr_optim.checks import check_number
from clr_optim.range_test.arguments import no_batches
from clr_optim.range_test.ranks import Ranks

__all__ = ["Forward", "StepFn"]

StepFn = Callable[[Any, Any], Any]


class Forward:
    """Compute losses, as sums ``[loss, correct, count, batches]`` over batches and ranks.

    Args:
        model, loss_fn, step_fn, target_key: as in :func:`~clr_optim.lr_range_test`.
        wants_accuracy: whether to count correct answers.
        device: the device of the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        step_fn: StepFn | None,
        target_key: str | None,
        wants_accuracy: bool,
        device: torch.device,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._step_fn = step_fn
        self._target_key = target_key
        self._wants_accuracy = wants_accuracy
        self._device = device

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, checked."""
        return self._losses(batch, None)[0]

    def train(
        self,
        batches: Iterator[Any],
        accumulate: int,
        amp_dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        ranks: Ranks,
    ) -> list[float]:
        """Add the gradients of the mean loss over some batches.

        Args:
            batches: yields the batches.
            accumulate: number of batches.
            amp_dtype: autocast to this dtype.
            scaler: scales the losses.
            ranks: add the sums.
        """
        total = [0.0] * 4
        for i in range(accumulate):
            batch = next(batches)
            last = i + 1 == accumulate
            no_sync = getattr(self._model, "no_sync", None)
            with contextlib.nullcontext() if last or no_sync is None else no_sync():
                loss, correct, count = self._losses(batch, amp_dtype)
                if not loss.requires_grad:
                    raise ValueError(
                        "the loss does not depend on a parameter with requires_grad: compute the "
                        "loss from the model's output, without detach() or no_grad()"
                    )
                value = float(loss.detach())
                total = [a + b for a, b in zip(total, (value, correct, count, 1.0), strict=True)]
                # Go on even if the loss is not finite: the other ranks wait for the sums.
                share = loss / accumulate
                (share if scaler is None else scaler.scale(share)).backward()  # type: ignore[no-untyped-call]
        return ranks.sums(total)

    def validate(
        self, loader: Iterable[Any], amp_dtype: torch.dtype | None, ranks: Ranks
    ) -> list[float]:
        """Pass over the loader in eval mode."""
        flags = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        total = [0.0] * 4
        with torch.no_grad():
            for batch in loader:
                loss, correct, count = self._losses(batch, amp_dtype)
                total = [
                    a + b for a, b in zip(total, (float(loss), correct, count, 1.0), strict=True)
                ]
        for module, flag in flags:
            module.training = flag
        total = ranks.sums(total)
        if total[3] == 0.0:
            raise no_batches("val_loader")
        return total

    def _losses(self, batch: Any, amp_dtype: torch.dtype | None) -> tuple[Tensor, float, float]:
        """Return ``(loss, correct, count)`` of a batch, checked."""
        batch = _moved(batch, self._device)
        autocast: Any = contextlib.nullcontext()
        if amp_dtype is not None:
            autocast = torch.autocast(self._device.type, dtype=amp_dtype)
        with autocast:
            loss, correct, count = self._outcome(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = (
                f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            )
            raise ValueError(
                f"the loss must be one number, a scalar tensor, got {given}: return the mean loss"
            )
        if not self._wants_accuracy:
            return loss.reshape(()), 0.0, 1.0
        correct = check_number("correct of (loss, correct, count)", correct)
        count = check_number("count of (loss, correct, count)", count, open_minimum=True)
        return loss.reshape(()), correct, count

    def _outcome(self, batch: Any) -> tuple[Any, Any, Any]:
        """Return ``(loss, correct, count)`` as the user's functions compute them."""
        if self._step_fn is not None:
            return self._outcome_of_step_fn(self._step_fn(self._model, batch))
        target: Any
        if isinstance(batch, Mapping):
            if self._loss_fn is None:
                if self._wants_accuracy:
                    raise ValueError(
                        "accuracy needs a loss_fn, or a step_fn that returns (loss, correct, "
                        "count): the model returned only a loss"
                    )
                return self._loss_of_model(self._call_model((), batch)), 0.0, 1.0
            place: Any = "labels" if self._target_key is None else self._target_key
            if place not in batch:
                raise ValueError(
                    f"target_key={place!r} is not in the batch, which has "
                    f"{sorted(map(str, batch))}: give the key of loss_fn's target, or a step_fn"
                )
            target = batch[place]
            named = {k: v for k, v in batch.items() if k != place}
            output = self._call_model((), named)
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            if self._target_key is not None:
                raise ValueError(
                    f"target_key={self._target_key!r} has no effect: a batch is a "
                    f"{type(batch).__name__}, whose last entry is the target; leave it out"
                )
            place, target = -1, batch[-1]
            output = self._call_model(batch[:-1], {})
        else:
            size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ValueError(
                f"a batch is a {type(batch).__name__}{size}, and neither a tuple (*inputs, target) "
                "nor a dictionary: give step_fn=lambda model, batch: ... that returns the loss"
            )
        if self._loss_fn is None:
            raise ValueError(
                "loss_fn=None needs a step_fn, or batches that are dictionaries and a model that "
                "returns the loss"
            )
        with _call_in_errors(f"loss_fn(output, batch[{place!r}])"):
            loss = self._loss_fn(output, target)
        if not self._wants_accuracy:
            return loss, 0.0, 1.0
        if (
            not isinstance(output, Tensor)
            or not isinstance(target, Tensor)
            or target.is_floating_point()
            or output.dim() != target.dim() + 1
        ):
            raise ValueError(
                "accuracy needs scores of shape (n, classes, ...), and targets that are whole "
                "numbers of shape (n, ...): give a step_fn that returns (loss, correct, count)"
            )
        correct = (output.detach().argmax(dim=1) == target).sum()
        return loss, correct, target.numel()

    def _outcome_of_step_fn(self, outcome: Any) -> tuple[Any, Any, Any]:
        """Return ``(loss, correct, count)`` from the result of ``step_fn``."""
        if outcome is None:
            raise ValueError("step_fn returned None: it must return the loss, a scalar tensor")
        if isinstance(outcome, Mapping):
            if "loss" not in outcome:
                raise ValueError(
                    f"step_fn returned a dictionary with no 'loss', but with "
                    f"{sorted(map(str, outcome))}: return the loss, or a dictionary with 'loss'"
                )
            outcome = outcome["loss"]
        if isinstance(outcome, (tuple, list)):
            if len(outcome) != 3:
                raise ValueError(
                    "step_fn must return the loss or (loss, correct, count), got "
                    f"{len(outcome)} values"
                )
            return outcome[0], outcome[1], outcome[2]
        if self._wants_accuracy:
            raise ValueError(
                "for an accuracy step_fn must return (loss, correct, count), got a loss alone"
            )
        return outcome, 0.0, 1.0

    def _call_model(self, inputs: Sequence[Any], named: Mapping[Any, Any]) -> Any:
        """Return the model's output for a batch, or raise if the batch does not fit."""
        signature = None
        with contextlib.suppress(TypeError, ValueError):  # not every callable has one
            signature = inspect.signature(self._model.forward)
        try:
            if signature is not None:
                signature.bind(*inputs, **named)
        except TypeError as error:
            given = [*(type(value).__name__ for value in inputs), *map(str, named)]
            raise ValueError(
                f"a batch does not fit {type(self._model).__name__}.forward{signature}: its inputs "
                f"are {', '.join(given)} ({error}); give step_fn=lambda model, batch: ... that "
                "returns the loss"
            ) from error
        with _call_in_errors("model(*batch[:-1])" if inputs else "model(**batch)"):
            return self._model(*inputs, **named)

    def _loss_of_model(self, output: Any) -> Any:
        """Return the loss in the model's output."""
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is None:
            raise ValueError(
                f"{type(self._model).__name__} returned a {type(output).__name__} without a loss: "
                "give a loss_fn, or step_fn=lambda model, batch: ... that returns the loss"
            )
        return found


@contextlib.contextmanager
def _call_in_errors(call: str) -> Iterator[None]:
    """Add to an error a note that quotes the call."""
    try:
        yield
    except Exception as error:
        error.add_note(f"lr_range_test called {call}: for other batches give step_fn")
        raise


def _moved(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on the device."""
    if callable(getattr(batch, "to", None)):
        moved = batch.to(device)
        return batch if moved is None else moved  # a `to` without a result moves the batch itself
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        values = [_moved(value, device) for value in batch]
        return tuple(values) if isinstance(batch, tuple) else values
    return batch
