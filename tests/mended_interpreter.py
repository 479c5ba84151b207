"""Triton's interpreter, made to round as GPUs do; import only where Triton is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["mend_the_interpreter"]


def mend_the_interpreter() -> None:
    """Make Triton's interpreter round as GPUs do, in half the time.

    The interpreter truncates float32 to bfloat16 and garbles subnormal numbers on the way back.
    GPUs round to nearest even and keep subnormals. The interpreter rounds the product of a fused
    multiply-add, which may then be infinite. GPUs round once. For every call from a kernel the
    interpreter prepares Triton's language again, although the kernel's preparation still holds.
    """
    convert, prepare = interpreter._convert_float, interpreter._patch_lang
    number_of = interpreter._get_np_dtype
    known = functools.cache(number_of)

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        # Copy, since torch warns of read-only arrays.
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.array(values)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            narrow = torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
            return narrow.float().numpy().view(np.uint32)
        return convert(values, source, target, mode)

    def once(function: Any) -> Any:
        prepared = not tl.core.is_builtin(tl.load)
        if prepared and all(value is not tl.core for value in function.__globals__.values()):
            return interpreter._LangPatchScope()
        return prepare(function)

    def fused(_: Any, x: Any, y: Any, z: Any) -> Any:
        narrow = z.data.dtype
        wide = np.float64 if narrow == np.float32 else np.longdouble
        with np.errstate(all="ignore"):
            sums = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
            return interpreter.TensorHandle(sums.astype(narrow), z.dtype.scalar)

    def number(kind: Any) -> Any:
        return known(kind) if type(kind) is tl.dtype else number_of(kind)

    interpreter._get_np_dtype = number
    interpreter._convert_float, interpreter._patch_lang = rounded, once
    interpreter.InterpreterBuilder.create_fma = fused
