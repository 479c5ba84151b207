"""How one value goes back into itself: functions that copy it, and return what puts it back."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PutBack", "array_back", "generator_back", "sharded_back", "tensor_back"]

PutBack = Callable[[], object]


def tensor_back(tensor: Tensor, offload: bool) -> PutBack:
    """Put back elements, shape, stride, dtype and memory; ``offload``: copied into the CPU's."""
    part = tensor.detach()  # its memory and shape, wherever the tensor may point later
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
        # Elements that share memory, as expanded ones do, are written once.
        sizes = [min(n, 1) if s == 0 else n for n, s in zip(part.shape, part.stride(), strict=True)]
        alias = part.as_strided(sizes, part.stride())
    # Memory that is given away, as FSDP's of whole parameters, has no values.
    reach = sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True))
    needed = (part.storage_offset() + 1 + reach) * part.element_size() if part.numel() else 0
    has_values = size >= needed or (part.is_quantized and size > 0)
    content: Tensor | None = None
    if has_values:
        # On the CPU `to` alone would be no copy.
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
        if tensor._local_tensor is not part:  # FSDP has moved it, and knows the new place
            tensor._local_tensor.copy_(part)

    return put_back


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's elements are."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether nothing need be written; only known on the CPU, whose memory may be read-only."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if a.device.type != "cpu" or whole is None or a.is_quantized or a.is_conj() or a.is_neg():
        return False
    return torch.equal(a.view(whole), b.view(whole))


def array_back(array: Any) -> PutBack:
    """Put back elements and shape of an array of NumPy."""
    saved = array.copy()

    def put_back() -> None:
        if array.shape != saved.shape:
            array.resize(saved.shape, refcheck=False)
        if array.flags.writeable:
            array[...] = saved

    return put_back


def generator_back(generator: Any) -> PutBack:
    """Put back the state of a generator of random numbers."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.RandomState):
        numbers: Any = generator.get_state()
        return lambda: generator.set_state(numbers)
    if isinstance(generator, random.Random):
        try:
            version = generator.getstate()
        except NotImplementedError:  # the system's, which has no state
            return lambda: None
        return lambda: generator.setstate(version)
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    saved = copy.deepcopy(bits.state)
    return lambda: setattr(bits, "state", saved)
