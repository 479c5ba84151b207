"""Torch's own operations on the fake device: on the CPU, over the same memory, in stream order.

Each operation with a kernel for CUDA gets another one, which appends the operation to the current
stream. When the stream reaches the operation, the CPU computes it on tensors over the device's
memory. Views, allocations and plain copies stay torch's own: they launch no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from fake_gpu import device

__all__ = ["install"]

#: Operations that launch no kernel, beside views.
_OWN = {
    "aten::_efficientzerotensor", "aten::_local_scalar_dense", "aten::empty",
    "aten::empty_strided", "aten::is_set_to", "aten::record_stream", "aten::resize_", "aten::set_",
}  # fmt: skip

_numbers = itertools.count()
_operations: dict[int, Callable[[], None]] = {}
_captured: set[int] = set()


# ---- tensors


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU over the memory of a tensor of the device."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    shared = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), _CPU, storage.nbytes()
    )
    alias = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return alias.set_(shared, tensor.storage_offset(), tensor.shape, tensor.stride())


_NUMBER = (int, float, complex)
_CPU, _META = torch.device("cpu"), torch.device("meta")


def is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _wrapped(number: complex, tensors: list[Tensor]) -> Tensor:
    """Return a number as a tensor of the dtype in which torch would compute with it."""
    dtype = torch.tensor(number).dtype
    for tensor in tensors:
        if torch.can_cast(dtype, tensor.dtype):
            return torch.tensor(number, dtype=tensor.dtype)
    return torch.tensor(number)


def _input(value: Any) -> Any:
    """Return the argument with which the CPU will compute; a launch reads CPU tensors at once."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            return on_cpu(value)
        return value.clone()
    return _CPU if isinstance(value, torch.device) else value


def _without_memory(value: Any) -> Any:
    """Return the argument with which torch computes the results' shapes alone."""
    if is_on_device(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return _META if isinstance(value, torch.device) else value


def _kind(value: Any) -> Any:
    """Return the part of an argument that decides shapes and dtypes of the results."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value), value


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to an argument, or to each member of a list of arguments."""
    if isinstance(value, (list, tuple)):
        return [_map(function, each) for each in value]
    return function(value)


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors among arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


# ---- the queue


def _append(name: str, stream: int, work: Callable[[], None]) -> None:
    number = next(_numbers)
    _operations[number] = work
    if device.append(stream, number, name):
        _captured.add(number)  # for replays


def run_for_the_device(number: int) -> None:
    """Run an operation when its stream has reached it."""
    work = _operations[number] if number in _captured else _operations.pop(number)
    try:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            work()
    except Exception as error:
        device.add_violation(f"an operation of torch failed: {error!r}")


class Returns(Enum):
    """What an operation returns."""

    NOTHING = auto()
    ARGUMENTS = auto()  # the arguments that it writes
    TENSORS = auto()
    VALUES = auto()  # results of other types


class Replacement:
    """The kernel of one operation for the fake device."""

    def __init__(self, operation: Any) -> None:
        self.operation = operation
        self.name = operation._schema.name.removeprefix("aten::")
        self.is_random = torch.Tag.nondeterministic_seeded in operation.tags
        # torch hands over a tensor that it made of a Python number as the number.
        self._takes_numbers = torch._C._should_allow_numbers_as_tensors(self.name)
        self._of_tensors = [str(a.type) == "Tensor" for a in operation._schema.arguments]
        self._names = [argument.name for argument in operation._schema.arguments]
        self._outs = [argument.name for argument in operation._schema.arguments if argument.is_out]
        self._shapes: dict[Any, Any] = {}
        results = operation._schema.returns
        #: the names of the arguments that are written and returned
        self._written: list[str] = []
        if not results:
            self.returns = Returns.NOTHING
        elif all(result.alias_info is not None for result in results):
            self.returns = Returns.ARGUMENTS
            by_alias = {
                tuple(argument.alias_info.before_set): argument.name
                for argument in operation._schema.arguments
                if argument.alias_info is not None
            }
            self._written = [by_alias[tuple(r.alias_info.before_set)] for r in results]
        elif all(str(result.type) in ("Tensor", "List[Tensor]") for result in results):
            self.returns = Returns.TENSORS
        else:
            self.returns = Returns.VALUES

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = self._with_tensors(args)
        place = self._place_of(args, kwargs)
        stream = torch._C._cuda_getCurrentRawStream(place.index)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if self.is_random or self.returns is Returns.VALUES:
                return self._compute_now(args, kwargs, place, stream)
            results: list[Tensor] = []
            returned = self._written_arguments(args, kwargs)
            if self.returns is Returns.TENSORS or self._outs:
                try:
                    shapes = self._shapes_of(args, kwargs)
                except (NotImplementedError, RuntimeError):  # the values decide the shapes
                    return self._compute_now(args, kwargs, place, stream)
                if self._outs:
                    _resize(_tensors(returned), _tensors(shapes))
                else:
                    returned = _map(lambda shape: _empty_like(shape, place), shapes)
                    results = [on_cpu(tensor) for tensor in _tensors(returned)]
            inputs = _map(_input, args)
            named_inputs = {name: _map(_input, value) for name, value in kwargs.items()}

        def work() -> None:
            computed = self.operation(*inputs, **named_inputs)
            if results:
                for result, value in zip(results, _tensors(computed), strict=True):
                    result.copy_(value)

        _append(self.name, stream, work)
        return returned

    def _with_tensors(self, args: Any) -> Any:
        """Return the arguments with tensors for the numbers that the CPU takes as tensors alone."""
        if self._takes_numbers:
            return args
        named = zip(args, self._of_tensors, strict=False)
        return tuple(
            _wrapped(value, _tensors(args)) if is_tensor and isinstance(value, _NUMBER) else value
            for value, is_tensor in named
        )

    @staticmethod
    def _place_of(args: Any, kwargs: dict[str, Any]) -> torch.device:
        """Return the device on which the operation runs."""
        for tensor in _tensors([*args, *kwargs.values()]):
            if tensor.is_cuda:
                return tensor.device
        place = kwargs.get("device")
        if place is not None and place.index is not None:
            return place
        return torch.device("cuda", torch.cuda.current_device())

    def _written_arguments(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the arguments that the operation writes and returns."""
        named = dict(zip(self._names, args, strict=False)) | kwargs
        written = [named[name] for name in self._written]
        return written[0] if len(written) == 1 else tuple(written) or None

    def _shapes_of(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the results as tensors without memory."""
        kinds = _hashable([_map(_kind, args), *((k, _map(_kind, v)) for k, v in kwargs.items())])
        if kinds not in self._shapes:
            named = {name: _map(_without_memory, value) for name, value in kwargs.items()}
            self._shapes[kinds] = self.operation(*_map(_without_memory, args), **named)
        return self._shapes[kinds]

    def _compute_now(
        self, args: Any, kwargs: dict[str, Any], place: torch.device, stream: int
    ) -> Any:
        """Compute after all work of the stream."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"the fake device cannot capture {self.name}")
        device.finish_stream(stream)
        inputs = _map(_input, args)
        named = {name: _map(_input, value) for name, value in kwargs.items()}
        if self.is_random:
            if "generator" in named:
                named["generator"] = None
            computed = _with_random_numbers_of(place, self.operation, inputs, named)
        else:
            computed = self.operation(*inputs, **named)
        if self.returns in (Returns.NOTHING, Returns.ARGUMENTS):
            return self._written_arguments(args, kwargs)

        def bring(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            result = _empty_like(value, place)
            on_cpu(result).copy_(value)
            return result

        found = _map(bring, computed)
        return tuple(found) if isinstance(computed, tuple) else found


def _empty_like(shape: Any, place: torch.device) -> Any:
    if not isinstance(shape, Tensor):
        return shape
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=place)


def _resize(outs: list[Tensor], shapes: list[Tensor]) -> None:
    """Give the tensors of ``out=`` the sizes of the results."""
    for out, shape in zip(outs, shapes, strict=True):
        if out.shape != shape.shape:
            out.resize_(shape.shape)


def _with_random_numbers_of(
    place: torch.device, operation: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Compute with random numbers that follow from seed and offset of the device's generator."""
    generator = torch.cuda.default_generators[place.index]
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(hash((generator.initial_seed(), generator.get_offset())))
    try:
        return operation(*args, **kwargs)
    finally:
        torch.default_generator.set_state(before)
        generator.set_offset(generator.get_offset() + 4)


def _is_view(operation: Any) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in operation._schema.returns)


# ---- copies


def _own_copy(to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    """Copy as torch does: by a copy of memory, with the guards of pinned memory."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return torch.ops.aten.copy_.default._op_dk(key, to, source, non_blocking)


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between tensors of which one at least lies on the device."""
    if to.numel() == 0:
        return to
    source = source.expand(to.shape)
    is_plain = (
        to.dtype == source.dtype and to.is_contiguous() and source.is_contiguous()
        and not source.is_neg() and not source.is_conj()
    )  # fmt: skip
    if is_plain:
        return _own_copy(to, source, non_blocking)
    if to.device == source.device:
        return _queued_copy(to, source)
    if source.is_cuda:  # bring dense memory over, and arrange it there
        dense = torch.empty(to.shape, dtype=to.dtype, device=source.device)
        _queued_copy(dense, source)
    else:
        dense = source.to(to.dtype).contiguous()
    staged = torch.empty(to.shape, dtype=to.dtype, device=to.device)
    _own_copy(staged, dense, to.is_cuda and non_blocking)
    return to.copy_(staged)


_queued_copy = Replacement(torch.ops.aten.copy_.default)


def install() -> Callable[[int], None]:
    """Replace torch's kernels; return the function that runs an operation for the device."""
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    for full_name in names:
        name, _, overload = full_name.partition(".")
        if not name.startswith("aten::") or name in _OWN:
            continue
        operation = getattr(getattr(torch.ops.aten, name[6:]), overload or "default")
        if not _is_view(operation):
            library.impl(full_name[6:], Replacement(operation), "CUDA", allow_override=True)
    library.impl("copy_", _copy, "CUDA")
    return run_for_the_device


_kept: list[torch.library.Library] = []
