"""Snapshots of a model at cycle ends, and the mean of their predictions."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clr_optim.checks import LAST_STEP, check_callable_of_one, check_int, check_path
from clr_optim.core.warn import callers_level
from clr_optim.optimizer import CyclicalOptimizer
from clr_optim.range_test.put_back import global_random_back

__all__ = ["Snapshots"]

_State = dict[str, Any]


class Snapshots:
    """Keep the model of the last cycle ends, and average the predictions of these models.

    At each cycle end a hook of the optimizer copies ``model.state_dict()``. The copies stay in the
    CPU's memory, or in files of ``folder``. The model itself never changes: predictions come from
    deep copies of the model.

    Args:
        optimizer: the :class:`CyclicalOptimizer` whose cycles end.
        model: the model to copy. ``DistributedDataParallel``, ``DataParallel`` and
            ``torch.compile`` are taken off.
        last: the number of snapshots to keep, at least 1. Older snapshots are removed.
        folder: a folder for the files ``snapshot-<step>.pt``, created if it does not exist.
            ``torch.load(file, weights_only=True)`` reads a file, which is whole or absent. Files
            of an earlier run count, so a resumed run keeps its snapshots. A new snapshot removes
            the snapshots of later steps, which a run leaves if it resumes from an earlier
            checkpoint. With several ranks rank 0 writes. ``None``: the CPU's memory.
        transform: a function of one model's output that returns the floating point tensor to
            average, as ``lambda logits: logits.softmax(dim=-1)``; ``None`` averages outputs.

    Raises:
        OSError: if ``folder`` cannot be created or written.
        TypeError: if an argument has the wrong type.
        ValueError: if ``last`` is below 1, if ``model`` has sharded parameters, if ``folder`` is a
            file, or if ``torch.load(file, weights_only=True)`` would refuse a value of the model.

    Source: Huang et al., *Snapshot Ensembles: Train 1, Get M for Free*, arXiv 1704.00109. The paper
    averages the softmax outputs of the last snapshots.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=2)
        >>> snapshots = Snapshots(opt, model, last=2, transform=lambda x: x.softmax(dim=-1))
        >>> for _ in range(12):
        ...     opt.zero_grad()
        ...     model(torch.ones(5, 3)).square().mean().backward()
        ...     opt.step()
        >>> len(snapshots), snapshots.steps
        (2, [8, 12])
        >>> snapshots.predict(torch.ones(5, 3)).shape
        torch.Size([5, 2])
        >>> newest = list(snapshots)[-1]  # a model in eval mode
        >>> torch.equal(newest.weight, model.weight)
        True
        >>> snapshots.remove()
    """

    def __init__(
        self,
        optimizer: CyclicalOptimizer[Any],
        model: nn.Module,
        *,
        last: int = 5,
        folder: str | os.PathLike[str] | None = None,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(optimizer, CyclicalOptimizer):
            raise TypeError(
                f"optimizer must be a CyclicalOptimizer, got {type(optimizer).__name__}: wrap it, "
                "as in CyclicalOptimizer(optimizer)"
            )
        self._model = _bare(model)
        self._last = check_int("last", last, minimum=1)
        if transform is not None:
            check_callable_of_one("transform", transform, "output")
        self._transform = transform
        self._store: _Store = _Memory()
        if folder is not None:
            path = check_path("folder", folder)
            _check_values(self._model.state_dict())
            self._store = _Folder(path)
        _warn_of_no_effect(optimizer, self._model, self.steps)
        # The handle holds the hooks weakly: the snapshots keep no optimizer alive.
        self._handle = optimizer._add_cycle_end_hook(self._take)

    @property
    def steps(self) -> list[int]:
        """The positions after the steps that ended the cycles, oldest snapshot first."""
        return self._store.steps()[-self._last :]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[nn.Module]:
        """Yield a separate model in eval mode for each snapshot, the oldest first."""
        for step in self.steps:
            yield self._model_at(step)

    def predict(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Return the mean over all snapshots of ``transform(model(*inputs, **kwargs))``.

        Models run one after another in eval mode and without gradients. One model beside the user's
        is in memory at a time. The random states of torch, Python and NumPy are afterwards as
        before. Sums of 16-bit outputs are in float32.

        Args:
            *inputs: the arguments of the model, on the model's device.
            **kwargs: likewise.

        Returns:
            A tensor of the shape and dtype of one model's transformed output.

        Raises:
            RuntimeError: before the first snapshot.
            TypeError: if an output is no floating point or complex tensor.
            ValueError: if a file is no snapshot of the model, or if outputs differ in shape.
        """
        steps = self.steps
        if not steps:
            raise RuntimeError("there is no snapshot yet: train to the end of a cycle first")
        total: Tensor | None = None
        put_backs = global_random_back({param.device for param in self._model.parameters()})
        try:
            with torch.no_grad():
                for step in steps:
                    output = self._output(self._model_at(step)(*inputs, **kwargs))
                    wide = output.to(torch.promote_types(output.dtype, torch.float32))
                    if total is not None and wide.shape != total.shape:
                        raise ValueError(
                            f"the snapshot of step {step} returned the shape {list(wide.shape)}, "
                            f"and earlier snapshots {list(total.shape)}: give transform=, a "
                            "function that returns tensors of one shape"
                        )
                    total = wide if total is None else total + wide
                assert total is not None
                return (total / len(steps)).to(output.dtype)
        finally:
            for put_back in put_backs:
                put_back()

    def remove(self) -> None:
        """Take no more snapshots. The present snapshots remain."""
        self._handle.remove()

    def _take(self, optimizer: Any) -> None:
        """Store the model as of the position, and remove old snapshots."""
        if not self._store.is_writer:
            return
        step = optimizer.iteration
        self._store.write(step, _copied(self._model.state_dict()))
        steps = self._store.steps()
        kept = [each for each in steps if each <= step][-self._last :]
        for each in set(steps).difference(kept):
            self._store.drop(each)

    def _model_at(self, step: int) -> nn.Module:
        # A new copy for each snapshot: autocast caches the weights that it casts, and buffers
        # outside the state_dict may change in a forward.
        try:
            model = copy.deepcopy(self._model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a module may raise anything
            name = type(error).__name__
            raise TypeError(
                f"model cannot be copied ({name}: {error}): give folder=, and load its files into "
                "a model that you build, by load_state_dict"
            ) from error
        name = self._store.name(step)
        try:
            state = self._store.read(step)
        except Exception as error:  # a damaged file raises errors of many types
            raise ValueError(
                f"{name} cannot be read ({type(error).__name__}): delete the file or give "
                "another folder"
            ) from error
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            why = " ".join(str(error).split("\n\t")[:2])  # of a line per tensor
            raise ValueError(
                f"{name} does not fit the model: delete the file or give another folder ({why})"
            ) from error
        return model.eval()

    def _output(self, output: Any) -> Tensor:
        source = "model"
        if self._transform is not None:
            source, output = "transform", self._transform(output)
        if not isinstance(output, Tensor):
            got = type(output).__name__
        elif not (output.is_floating_point() or output.is_complex()):
            got = f"a tensor of {output.dtype}"
        else:
            return output
        raise TypeError(
            f"the output of {source} must be a floating point tensor, got {got}: give transform=, "
            "a function of the model's output that returns the tensor to average"
        )


# ---- checks


def _bare(model: object) -> nn.Module:
    """Return the module inside DDP and torch.compile. Raise for sharded parameters."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or (
        isinstance(model, nn.Module) and "_orig_mod" in model._modules
    ):
        model = model._modules["_orig_mod" if "_orig_mod" in model._modules else "module"]
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: give the module whose "
            "parameters the optimizer updates"
        )
    members: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_modules()]
    kinds = ("DTensor", "FullyShardedDataParallel")  # torch may lack both classes
    sharded = next((name for name, member in members if type(member).__name__ in kinds), None)
    if sharded is not None:
        raise ValueError(
            f"model must be whole on each rank, and {sharded or 'the model'!r} is sharded: save "
            "snapshots by torch.distributed.checkpoint in opt.register_cycle_end_hook"
        )
    return model


def _check_values(state: _State) -> None:
    """Raise for a value that ``torch.load(file, weights_only=True)`` would refuse."""
    for key, value in state.items():
        if type(value) is Tensor or is_lazy(value):  # a lazy one has become an ordinary one
            continue
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:  # pickle raises errors of many types
            raise ValueError(
                f"model.state_dict()[{key!r}] is of type {type(value).__name__}, which "
                "torch.load(file, weights_only=True) refuses: leave out folder, or use tensors, "
                "numbers and strings in get_extra_state"
            ) from error


def _warn_of_no_effect(
    optimizer: CyclicalOptimizer[Any], model: nn.Module, steps: list[int]
) -> None:
    position = optimizer.iteration
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    later = [step for step in steps if step > position]
    message = None
    if later:
        message = (
            f"folder has snapshots of the steps {later}, and the optimizer is at step {position}: "
            "the next snapshot removes them; load the checkpoint before Snapshots, or give "
            "another folder"
        )
    elif optimizer.steps_to_cycle_end is None and not steps:
        message = (
            f"Snapshots has no effect: no cycle ends after step {position}; use a policy with "
            "cycles, such as 'triangular'"
        )
    elif not any(id(param) in trained for param in model.parameters()):
        message = (
            "the optimizer trains no parameter of the model, so that each snapshot has what other "
            "code puts into it: give the model whose parameters the optimizer updates, unless the "
            "model is a copy that your code moves"
        )
    if message is not None:
        warnings.warn(message, UserWarning, stacklevel=callers_level())


# ---- stores


def _copied(state: _State) -> _State:
    """Return a copy in the CPU's memory, which a machine without GPU can load."""
    copied = copy.copy(state)  # with the versions of the modules, an attribute
    for key, value in state.items():
        is_tensor = isinstance(value, Tensor)
        copied[key] = value.to("cpu", copy=True) if is_tensor else copy.deepcopy(value)
    return copied


class _Store(Protocol):
    """The states by their steps."""

    #: whether this rank writes
    is_writer: bool

    def steps(self) -> list[int]: ...
    def name(self, step: int) -> str: ...
    def read(self, step: int) -> _State: ...
    def write(self, step: int, state: _State) -> None: ...
    def drop(self, step: int) -> None: ...


class _Memory:
    """States in the CPU's memory."""

    is_writer = True

    def __init__(self) -> None:
        self._states: dict[int, _State] = {}

    def steps(self) -> list[int]:
        return sorted(self._states)

    def name(self, step: int) -> str:
        return f"the snapshot of step {step}"

    def read(self, step: int) -> _State:
        return self._states[step]

    def write(self, step: int, state: _State) -> None:
        self._states[step] = state

    def drop(self, step: int) -> None:
        del self._states[step]


class _Folder:
    """States in files, each whole or absent."""

    #: the step, and the end of a file's name while it is written
    _NAME = re.compile(r"snapshot-(0|[1-9][0-9]{0,18})\.pt(\.tmp)?")

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"folder must be a folder or a new path, got the file {str(path)!r}")
        dist = torch.distributed
        ranked = dist.is_available() and dist.is_initialized()
        self.is_writer = not ranked or dist.get_rank() == 0
        # An absolute path: other code may change the working directory.
        self._path = path.absolute()
        self._path.mkdir(parents=True, exist_ok=True)
        for entry in self._path.iterdir():
            if self._NAME.fullmatch(entry.name) and not entry.is_file():
                raise ValueError(
                    f"folder has {str(entry)!r}, which is no file: give another folder or remove it"
                )
        if self.is_writer and not os.access(self._path, os.W_OK):
            raise PermissionError(f"no permission to write into folder {str(path)!r}")

    def _file(self, step: int) -> Path:
        return self._path / f"snapshot-{step}.pt"

    def steps(self) -> list[int]:
        names = (self._NAME.fullmatch(entry.name) for entry in self._path.iterdir())
        steps = (int(name[1]) for name in names if name is not None and not name[2])
        return sorted(step for step in steps if step <= LAST_STEP)

    def name(self, step: int) -> str:
        return f"the snapshot {str(self._file(step))!r}"

    def read(self, step: int) -> _State:
        state: _State = torch.load(self._file(step), map_location="cpu", weights_only=True)
        return state

    def write(self, step: int, state: _State) -> None:
        for entry in self._path.iterdir():
            name = self._NAME.fullmatch(entry.name)
            if name is not None and name[2]:  # of a killed run
                entry.unlink()
        temporary = self._path / f"snapshot-{step}.pt.tmp"
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._file(step))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(self._path)

    def drop(self, step: int) -> None:
        self._file(step).unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Write the new names to disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
