"""Copy one value, of any type, and return a function that puts the copy back."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clr_optim.range_test.contents import dict_of, is_wrapper, slots_of

__all__ = [
    "PutBack", "array_back", "attributes_back", "dict_back", "extra_state_back", "generator_back",
    "global_random_back", "members_back", "sharded_back", "tensor_back",
]  # fmt: skip

PutBack = Callable[[], object]

#: Returns a member to put back: the member, or a copy of it.
Resolve = Callable[[Any], Any]

# ---- tensors and arrays


def tensor_back(tensor: Tensor, offload: bool) -> PutBack:
    """Put back elements, shape, stride, dtype and memory.

    Args:
        tensor: the tensor.
        offload: whether to copy into the CPU's memory.
    """
    part = tensor.detach()  # keeps memory and shape, even if the tensor later moves
    if part.layout is not torch.strided or part.is_nested:
        saved = part.to("cpu", copy=True) if offload else part.clone()

        def put_back_other() -> None:
            if str(part.layout).startswith("torch.sparse"):
                tensor.resize_as_sparse_(saved).copy_(saved)
            else:
                tensor.data = saved.to(part.device).clone()

        return put_back_other
    storage = part.untyped_storage()
    size, place = storage.nbytes(), _place(part)
    alias = part
    if 0 in part.stride():
        # Expanded tensors share elements: write each element once.
        sizes = [min(n, 1) if s == 0 else n for n, s in zip(part.shape, part.stride(), strict=True)]
        alias = part.as_strided(sizes, part.stride())
    # FSDP frees the memory of whole parameters. A tensor without memory has no values.
    reach = sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True))
    needed = (part.storage_offset() + 1 + reach) * part.element_size() if part.numel() else 0
    has_values = size >= needed or (part.is_quantized and size > 0)
    content: Tensor | None = None
    if has_values:
        # For a CPU tensor, `to` without `copy=True` returns the tensor itself.
        content = alias.to("cpu", copy=True) if offload else alias.clone()

    def put_back() -> None:
        if storage.nbytes() != size:
            storage.resize_(size)
        if content is not None and not _same_bits(alias, content):
            with torch.inference_mode(alias.is_inference()), torch.no_grad():
                alias.copy_(content)
        if _place(tensor) != place:
            tensor.data = part

    return put_back


def sharded_back(tensor: Any, offload: bool) -> PutBack:
    """Put back this rank's part of a DTensor."""
    part = tensor._local_tensor
    put_back_part = tensor_back(part, offload)

    def put_back() -> None:
        put_back_part()
        if tensor._local_tensor is not part:  # FSDP has moved the part, and knows the new place
            tensor._local_tensor.copy_(part)

    return put_back


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return where a tensor's elements are."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are known to be equal, bit for bit.

    Only CPU tensors are compared: their memory may be read-only, where an unneeded write fails.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if a.device.type != "cpu" or whole is None or a.is_quantized or a.is_conj() or a.is_neg():
        return False
    return torch.equal(a.view(whole), b.view(whole))


def array_back(array: Any) -> PutBack:
    """Put back elements and shape of a NumPy array."""
    saved = array.copy()

    def put_back() -> None:
        if array.shape != saved.shape:
            array.resize(saved.shape, refcheck=False)
        if array.flags.writeable:
            array[...] = saved

    return put_back


# ---- random states


def generator_back(generator: Any) -> PutBack:
    """Put back the state of a random generator."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.RandomState):
        numbers: Any = generator.get_state()
        return lambda: generator.set_state(numbers)
    if isinstance(generator, random.Random):
        try:
            version = generator.getstate()
        except NotImplementedError:  # SystemRandom has no state
            return lambda: None
        return lambda: generator.setstate(version)
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    saved = copy.deepcopy(bits.state)
    return lambda: setattr(bits, "state", saved)


def global_random_back(devices: Iterable[torch.device]) -> list[PutBack]:
    """Put back the global random states of torch, Python and NumPy, and those of GPUs."""
    ways: list[PutBack] = []

    def add(put: Callable[..., Any], *state: Any) -> None:
        ways.append(lambda: put(*state))

    add(torch.set_rng_state, torch.get_rng_state())
    add(random.setstate, random.getstate())
    add(np.random.set_state, np.random.get_state())
    for device in devices:
        if device.type in ("cuda", "xpu"):
            module = torch.get_device_module(device)
            add(module.set_rng_state, module.get_rng_state(device), device)
    return ways


# ---- containers and objects


def dict_back(value: dict[Any, Any], resolve: Resolve) -> PutBack:
    """Put back the items of a dictionary, in their order."""
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    saved = list(base.items(value))

    def put_back() -> None:
        wanted = [(key, resolve(item)) for key, item in saved]
        pairs = list(base.items(value))
        if len(pairs) == len(wanted) and all(
            a is b and x is y for (a, x), (b, y) in zip(pairs, wanted, strict=True)
        ):
            return
        base.clear(value)
        for key, item in wanted:
            base.__setitem__(value, key, item)

    return put_back


def members_back(value: Any, resolve: Resolve) -> PutBack:
    """Put back the members of a list, deque or set."""
    saved = list(value)
    base: Any = next(kind for kind in (list, deque, set) if isinstance(value, kind))
    add = base.update if base is set else base.extend

    def put_back() -> None:
        wanted = [resolve(item) for item in saved]
        members = list(value)
        if len(members) != len(wanted) or any(
            a is not b for a, b in zip(members, wanted, strict=True)
        ):
            base.clear(value)
            add(value, wanted)

    return put_back


def attributes_back(
    value: Any,
    attributes: dict[str, Any],
    resolve: Resolve,
    keep: Callable[[Any], bool] | None = None,
) -> PutBack:
    """Put back the attributes and the class of an object.

    Args:
        value: the object.
        attributes: the attributes, from ``contents.attributes_of``.
        resolve: returns the value to put back.
        keep: tells which present attributes to keep.
    """
    kind, saved, has_all = type(value), dict(attributes), not is_wrapper(type(value))
    slots = slots_of(kind)

    def put_back() -> None:
        if type(value) is not kind:
            value.__class__ = kind
        wanted = {name: resolve(item) for name, item in saved.items()}
        present = dict_of(value)
        if keep is not None:
            wanted |= {
                name: present[name] for name in wanted if name in present and keep(wanted[name])
            }
        inside = [name for name in wanted if name not in slots]
        if has_all and list(present) != inside:
            present.clear()
        for name in inside:
            if name not in present or present[name] is not wanted[name]:
                present[name] = wanted[name]
        for name in slots:
            if name in wanted:
                object.__setattr__(value, name, wanted[name])
            elif hasattr(value, name):
                object.__delattr__(value, name)

    return put_back


def extra_state_back(module: nn.Module) -> PutBack | None:
    """Put back the result of ``get_extra_state``: state that Python cannot see.

    Returns ``None`` if the module has no such methods, or if the result cannot be copied.
    """
    kind = type(module)
    if (
        kind.get_extra_state is nn.Module.get_extra_state
        or kind.set_extra_state is nn.Module.set_extra_state
    ):
        return None
    try:
        saved = copy.deepcopy(module.get_extra_state())
    except Exception:
        return None
    return lambda: module.set_extra_state(copy.deepcopy(saved))
