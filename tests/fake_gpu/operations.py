"""Torch's own operations on the fake device: on the CPU, over the same memory, in stream order.

Each operation with a kernel for CUDA gets another one, which appends the operation to the current
stream. When the stream reaches the operation, the CPU computes it on tensors over the device's
memory. Views, allocations and plain copies stay torch's own: they launch no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from fake_gpu import device
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

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
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )
    alias = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return alias.set_(shared, tensor.storage_offset(), tensor.shape, tensor.stride())


def is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _frozen(value: Any) -> Any:
    """Return the value that a launch reads from the host: CPU tensors as they are now."""
    if not isinstance(value, Tensor):
        return value
    other = torch.float32 if value.dtype == torch.float64 else torch.int32
    wraps_number = value.dim() == 0 and (
        value.dtype in (torch.float64, torch.int64)
        and torch.result_type(value, torch.empty((), dtype=other)) == other
    )
    return value if wraps_number else value.clone()  # a clone would change the result's dtype


def _input(value: Any) -> Any:
    """Return the argument with which the CPU will compute."""
    if is_on_device(value):
        return on_cpu(value)
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return _frozen(value)


def _without_memory(value: Any) -> Any:
    """Return the argument with which torch computes the shapes of the results alone."""
    if is_on_device(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("meta")
    return value


# ---- results


def _written_arguments(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes and returns, one for each result."""
    named = dict(zip((a.name for a in operation._schema.arguments), args, strict=False)) | kwargs
    found = []
    for result in operation._schema.returns:
        for argument in operation._schema.arguments:
            if argument.alias_info and result.alias_info.before_set == argument.alias_info.before_set:
                found.append(named[argument.name])
    return found


def _returns(operation: Any) -> str:
    """Return what an operation returns: "nothing", "arguments", "tensors" or "values"."""
    results = operation._schema.returns
    if not results:
        return "nothing"
    if all(result.alias_info is not None for result in results):
        return "arguments"
    if all(str(result.type) in ("Tensor", "List[Tensor]") for result in results):
        return "tensors"
    return "values"


def _is_view(operation: Any) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in operation._schema.returns)


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
        with torch.inference_mode(False), torch.no_grad():
            work()
    except Exception as error:
        device.add_violation(f"an operation of torch failed: {error!r}")


def _place_of(flat: list[Any]) -> torch.device:
    """Return the device on which an operation runs."""
    for value in flat:
        if is_on_device(value):
            return value.device
    for value in flat:
        if isinstance(value, torch.device) and value.type == "cuda" and value.index is not None:
            return value
    return torch.device("cuda", torch.cuda.current_device())


class Replacement:
    """The kernel of one operation for the fake device."""

    def __init__(self, operation: Any) -> None:
        self.operation = operation
        self.name = operation._schema.name.removeprefix("aten::")
        self.returns = _returns(operation)
        self.outs = [a.name for a in operation._schema.arguments if a.is_out]
        self.is_random = torch.Tag.nondeterministic_seeded in operation.tags

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat, structure = tree_flatten((args, kwargs))
        place = _place_of(flat)
        stream = torch._C._cuda_getCurrentRawStream(place.index)
        with torch.inference_mode(False), torch.no_grad():
            if self.is_random:
                return self._compute_now(args, kwargs, place, stream)
            if self.returns == "nothing":
                results: list[Any] = []
                returned: Any = None
            elif self.returns == "arguments":
                if self.outs:
                    self._resize_outs(flat, structure, kwargs)
                results, returned = [], self._written(args, kwargs)
            else:
                try:
                    if self.returns == "values":
                        raise NotImplementedError
                    meta_args, meta_kwargs = tree_unflatten(
                        [_without_memory(value) for value in flat], structure
                    )
                    shapes = self.operation(*meta_args, **meta_kwargs)
                except (NotImplementedError, RuntimeError):
                    return self._compute_now(args, kwargs, place, stream)
                returned = tree_map(lambda t: self._empty_like(t, place), shapes)
                results = [on_cpu(t) for t in tree_flatten(returned)[0] if isinstance(t, Tensor)]
            inputs, input_kwargs = tree_unflatten([_input(value) for value in flat], structure)

        def work() -> None:
            computed = tree_flatten(self.operation(*inputs, **input_kwargs))[0]
            tensors = [t for t in computed if isinstance(t, Tensor)]
            for result, value in zip(results, tensors, strict=False):
                result.copy_(value)

        _append(self.name, stream, work)
        return returned

    def _written(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the arguments that the operation returns, written."""
        written = _written_arguments(self.operation, args, kwargs)
        return written[0] if len(written) == 1 else tuple(written)

    def _resize_outs(self, flat: list[Any], structure: Any, kwargs: dict[str, Any]) -> None:
        """Give the tensors of ``out=`` the sizes of the results."""
        meta_args, meta_kwargs = tree_unflatten([_without_memory(v) for v in flat], structure)
        self.operation(*meta_args, **meta_kwargs)
        for name in self.outs:
            for out, shape in zip(*(tree_flatten(k[name])[0] for k in (kwargs, meta_kwargs)), strict=True):
                if out.shape != shape.shape:
                    out.resize_(shape.shape)

    @staticmethod
    def _empty_like(shape: Any, place: torch.device) -> Any:
        if not isinstance(shape, Tensor):
            return shape
        return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=place)

    def _compute_now(
        self, args: Any, kwargs: dict[str, Any], place: torch.device, stream: int
    ) -> Any:
        """Compute after all work of the stream: the values decide shapes, or numbers are drawn."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"the fake device cannot capture {self.name}")
        device.finish_stream(stream)
        kwargs = dict(kwargs)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        inputs, input_kwargs = tree_map(_input, (args, kwargs))
        if self.is_random:
            computed = _with_random_numbers_of(place, self.operation, inputs, input_kwargs)
        else:
            computed = self.operation(*inputs, **input_kwargs)
        if self.returns == "nothing":
            return None
        if self.returns == "arguments":
            return self._written(args, kwargs)

        def bring(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            result = self._empty_like(value, place)
            on_cpu(result).copy_(value)
            return result

        return tree_map(bring, computed)


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
