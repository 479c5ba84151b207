"""The update of one tensor in the backward pass, as soon as its gradient is complete."""

from __future__ import annotations

import triton
import triton.language as tl

from clr_optim.kernels.triton.multi_tensor import update_row
from clr_optim.kernels.triton.prepare import COLUMNS, advance_counters

__all__ = ["row_step"]

_ROW: tl.constexpr = tl.constexpr(len(COLUMNS))


@triton.jit(
    do_not_specialize=["row", "gradient", "blocks", "width", "phases"],
    do_not_specialize_on_alignment=[
        "rows", "groups", "ints", "floats", "control", "gate",
    ],
)  # fmt: skip
def row_step(
    rows, row, gradient: tl.int64, blocks, groups, width, ints, floats, phases, control, gate,
    CONSTANTS: tl.constexpr, FACTOR: tl.constexpr, COUNTER: tl.constexpr, SCALAR: tl.constexpr,
    AVERAGE: tl.constexpr, UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tensor, a chunk per program; the last program advances its counter.

    The position stays: a step ends the backward pass, and leaves this row alone.

    Args:
        rows, groups, width, ints, floats, phases, control, gate: as for
            :func:`~clr_optim.kernels.triton.prepare.prepare`. The gate is open.
        row: the number of the tensor's row.
        gradient: the address of its gradient.
        blocks: blocks per chunk.
        CONSTANTS, FACTOR, COUNTER, SCALAR, AVERAGE: as for
            :func:`~clr_optim.kernels.triton.prepare.prepare`.
        UPDATE, FLAGS, SLOTS, DTYPE, MASTER, BLOCK: as for
            :func:`~clr_optim.kernels.triton.multi_tensor.multi_tensor`.
    """
    rows += row.to(tl.int64) * _ROW
    position = tl.load(control)
    update_row(
        rows, gradient.to(tl.int64), tl.program_id(0), blocks,
        groups, width, ints, floats, phases, control, gate, position,
        CONSTANTS, COUNTER, SCALAR, AVERAGE, UPDATE, FLAGS, SLOTS, DTYPE, MASTER, BLOCK,
    )  # fmt: skip
    # All programs have read the counter when the last one comes here.
    tl.debug_barrier()
    ticket = tl.atomic_add(control + 2, 1)
    if ticket == tl.num_programs(0) - 1:
        tl.store(control + 2, 0)
        advance_counters(
            rows, True, groups, width, ints, floats, phases, position, FACTOR, COUNTER, SCALAR
        )
