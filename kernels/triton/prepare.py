"""What a step needs from the schedule and the settings, computed once per tensor and step.

The constants of a tensor depend on the position, the settings of its group, its step counter and
the gate. :func:`row_constants` computes them, for one tensor or for a vector of tensors.
:func:`prepare` writes them into a table, from which the update reads them. The update reads neither
step counters nor position, so :func:`prepare` advances these too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clr_optim.kernels.triton.rules import advanced, held
from clr_optim.kernels.triton.schedule import cycle_ends, rate_and_momentum

__all__ = [
    "AT_COUNTER", "AT_FIRST", "AT_GROUP", "AT_NUMEL", "AT_SCALAR", "AT_STATE", "COLUMNS",
    "COMMON", "CONTROL", "DONE", "GROUP", "WIDTH", "advance", "advance_counters",
    "advance_position", "average_weight", "is_done", "is_gradient", "prepare", "row_constants",
]  # fmt: skip

#: Columns of the rows' table, int64: the fields of ``Row`` in native/kernels.h, in this order.
COLUMNS = (
    "param", "state0", "state1", "state2", "state3", "state4", "counter", "scalar", "numel",
    "group", "first",
)  # fmt: skip
#: The first columns of the groups' table, float64. The kernel's own scalars follow. ``averages`` is
#: what the group's count of averages lacks, see :func:`average_weight`.
GROUP = (
    "base_lr", "max_lr", "base_momentum", "max_momentum", "cycle_momentum", "averages",
    "weight_decay", "shrinking", "sign",
)  # fmt: skip
#: The position in the schedule, the number of steps to add, and the programs that have ended. Then
#: when averages fall due: every so many steps (0: at cycle ends, with equal weights), after so many
#: steps, up to which so many cycles end; and the weight of a new parameter, a float64.
CONTROL = ("position", "moves", "tickets", "every", "start", "ended", "share")
#: The first columns of the constants' table: whether the step updates the row, the factor of its
#: gradient, the weight decay added to the gradient, the factor of decoupled weight decay, and the
#: weight of the new parameter in its average (0: the step takes no average).
COMMON = ("happens", "scale", "decay", "shrink", "average")
#: The columns of the constants' table. Those of the rule come after ``COMMON``.
WIDTH = len(COMMON) + 8

#: Stands for the address of a gradient that a backward pass has already taken: the step leaves the
#: row and its average alone. Addresses on some devices are negative as numbers.
DONE = -1

#: The columns of a row by name.
AT_STATE: tl.constexpr = tl.constexpr(COLUMNS.index("state0"))
AT_COUNTER: tl.constexpr = tl.constexpr(COLUMNS.index("counter"))
AT_SCALAR: tl.constexpr = tl.constexpr(COLUMNS.index("scalar"))
AT_NUMEL: tl.constexpr = tl.constexpr(COLUMNS.index("numel"))
AT_GROUP: tl.constexpr = tl.constexpr(COLUMNS.index("group"))
AT_FIRST: tl.constexpr = tl.constexpr(COLUMNS.index("first"))

_ROW: tl.constexpr = tl.constexpr(len(COLUMNS))
_OWN: tl.constexpr = tl.constexpr(len(GROUP))
_COMMON: tl.constexpr = tl.constexpr(len(COMMON))
_WIDTH: tl.constexpr = tl.constexpr(WIDTH)
_DONE: tl.constexpr = tl.constexpr(DONE)


@triton.jit
def is_done(gradient):
    """Return whether a backward pass has updated a row, by the address of its gradient."""
    return gradient == _DONE


@triton.jit
def is_gradient(gradient):
    """Return whether the step updates a row, by the address of its gradient."""
    return (gradient != 0) & (gradient != _DONE)


@triton.jit
def row_constants(
    row, active, groups, width, ints, floats, phases, position, gate,
    CONSTANTS: tl.constexpr, COUNTER: tl.constexpr, SCALAR: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Return ``(scale, decay, shrink, constants of the rule)`` of rows, in the arithmetic type.

    Args:
        row: pointer to a row of the rows' table, or a vector of such pointers.
        active: whether each row has a gradient. The state of other rows is not read.
        groups, width, ints, floats, phases, gate: as for :func:`prepare`.
        position: the number of the step.
        CONSTANTS, COUNTER, SCALAR: as for :func:`prepare`.
        A: the arithmetic type.
    """
    group = groups + tl.load(row + AT_GROUP, mask=active, other=0) * width
    rate, momentum = rate_and_momentum(
        ints, floats, phases, position,
        tl.load(group), tl.load(group + 1), tl.load(group + 2), tl.load(group + 3),
    )  # fmt: skip
    step = rate
    if COUNTER is not None:
        counter = tl.load(row + AT_COUNTER, mask=active, other=0).to(tl.pointer_type(COUNTER))
        step = tl.load(counter, mask=active, other=0).to(tl.float64) + 1.0
    scalar = rate
    if SCALAR is not None:
        place = tl.load(row + AT_SCALAR, mask=active, other=0).to(tl.pointer_type(SCALAR))
        scalar = tl.load(place, mask=active, other=0)
    cycles = tl.load(group + 4) != 0
    constants = CONSTANTS(group + _OWN, rate, step, scalar, momentum, cycles, A)
    scale = tl.load(gate).to(A) * tl.load(group + 8).to(A)
    shrink = held(1.0 - rate * tl.load(group + 7), A).to(A)
    return scale, tl.load(group + 6).to(A), shrink, [constant.to(A) for constant in constants]


@triton.jit
def _averages(control, ints, phases, position):
    """Return how many averages fall due in the steps before a position."""
    start = tl.load(control + 4)
    done = tl.maximum(position, start)
    every = tl.load(control + 3)
    if every != 0:
        done = (done - start) // every
    else:
        done = cycle_ends(ints, phases, done) - tl.load(control + 5)
    return done


@triton.jit
def average_weight(averages, ints, phases, control, position):
    """Return the weight of a group's new parameters in their averages, float64; 0 for no average.

    ``average + weight·(parameter − average)`` is the new average.

    Args:
        averages: the group's column of that name, or a vector: the averages due, less those taken.
        ints, phases, control: as for :func:`prepare`.
        position: the number of the step.
    """
    done = _averages(control, ints, phases, position)
    is_due = (_averages(control, ints, phases, position + 1) > done) & (tl.load(control + 1) != 0)
    share = tl.load((control + 6).to(tl.pointer_type(tl.float64)))
    taken = (done - averages.to(tl.int64)).to(tl.float64)
    equal = 1.0 / (tl.maximum(taken, 0.0) + 1.0)
    weight = tl.where(tl.load(control + 3) != 0, share, equal)
    return tl.where(is_due, tl.where(taken > 0, weight, 1.0), 0.0)


@triton.jit
def advance_counters(
    row, active, groups, width, ints, floats, phases, position,
    FACTOR: tl.constexpr, COUNTER: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """Count a step of active rows, and multiply their scalar state.

    Args:
        row, active, groups, width, ints, floats, phases, position: as for :func:`row_constants`.
        FACTOR, COUNTER, SCALAR: as for :func:`prepare`.
    """
    if COUNTER is not None:
        counter = tl.load(row + AT_COUNTER, mask=active, other=0).to(tl.pointer_type(COUNTER))
        step = tl.load(counter, mask=active, other=0).to(tl.float64) + 1.0
        if SCALAR is not None:
            group = groups + tl.load(row + AT_GROUP, mask=active, other=0) * width
            _, momentum = rate_and_momentum(
                ints, floats, phases, position,
                tl.load(group), tl.load(group + 1), tl.load(group + 2), tl.load(group + 3),
            )  # fmt: skip
            by = FACTOR(group + _OWN, step, momentum, tl.load(group + 4) != 0)
            place = tl.load(row + AT_SCALAR, mask=active, other=0).to(tl.pointer_type(SCALAR))
            scalar = tl.load(place, mask=active, other=0)
            tl.store(place, advanced(scalar, by), mask=active)
        tl.store(counter, step.to(COUNTER), mask=active)


@triton.jit
def advance_position(rates, kept, groups, width, ints, floats, phases, control, position, happened):
    """Advance the position, and write the rates of the new position that the device keeps current.

    Args:
        rates, kept, groups, width, ints, floats, phases, control: as for :func:`prepare`.
        position: the number of the step that ends.
        happened: whether the step happened. If not, nothing moves.
    """
    position += tl.where(happened, tl.load(control + 1), 0)
    for i in range(0, kept):
        group = groups + tl.load(rates + 3 * i + 2) * width
        rate, _ = rate_and_momentum(
            ints, floats, phases, position,
            tl.load(group), tl.load(group + 1), tl.load(group + 2), tl.load(group + 3),
        )  # fmt: skip
        place = tl.load(rates + 3 * i)
        if tl.load(rates + 3 * i + 1) != 0:
            tl.store(place.to(tl.pointer_type(tl.float64)), rate)
        else:
            tl.store(place.to(tl.pointer_type(tl.float32)), held(rate, tl.float32).to(tl.float32))
    tl.store(control, position)


@triton.jit(
    do_not_specialize=["count", "width", "phases", "kept", "is_last"],
    do_not_specialize_on_alignment=[
        "rows", "gradients", "constants", "groups", "ints", "floats", "control", "gate", "rates",
    ],
)  # fmt: skip
def prepare(
    rows, gradients, count, constants, groups, width, ints, floats, phases, control, gate, rates,
    kept, is_last, CONSTANTS: tl.constexpr, FACTOR: tl.constexpr, COUNTER: tl.constexpr,
    SCALAR: tl.constexpr, AVERAGE: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the constants of a bucket's rows, and advance their counters.

    The last launch of a step also advances the position.

    Args:
        rows: the rows' table, int64.
        gradients: int64, the address of each row's gradient; 0 for a row without one, negative
            for a row that a backward pass has updated, whose average stays too.
        count: the number of rows. Each program takes ``LANES`` of them.
        constants: the constants' table, of the arithmetic type, a row of ``WIDTH`` per row.
        groups: the groups' table, float64, ``width`` columns.
        ints, floats, phases: the schedule's tables, and their number of rows.
        control: int64, the columns of ``CONTROL``.
        gate: float64, the factor of the gradients and whether they overflowed. After an overflow
            nothing moves.
        rates: int64 triples, one per group whose ``lr`` is a tensor that the device keeps current:
            its address, whether it is a float64, and the group's number.
        kept: the number of such groups.
        is_last: whether this is the step's last launch of this kernel.
        CONSTANTS, FACTOR: of :class:`clr_optim.kernels.triton.rules.Kernel`.
        COUNTER, SCALAR: the dtypes of step counters and of scalar states, if any.
        AVERAGE: the dtype of the rows' averages, if any.
        A: the arithmetic type.
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    exists = lane < count
    position = tl.load(control)
    happened = tl.load(gate + 1) == 0
    left = tl.where(happened, count, 0)
    happens = lane < left
    gradient = tl.load(gradients + lane, mask=happens, other=0)
    active = is_gradient(gradient)
    row = rows + lane.to(tl.int64) * _ROW
    scale, decay, shrink, c = row_constants(
        row, active, groups, width, ints, floats, phases, position, gate,
        CONSTANTS, COUNTER, SCALAR, A,
    )  # fmt: skip
    constants += lane.to(tl.int64) * _WIDTH
    tl.store(constants, active.to(A), mask=exists)
    tl.store(constants + 1, scale, mask=active)
    tl.store(constants + 2, decay, mask=active)
    tl.store(constants + 3, shrink, mask=active)
    for k in tl.static_range(len(c)):
        tl.store(constants + _COMMON + k, c[k], mask=active)
    if AVERAGE is not None:  # rows without a gradient take part
        group = groups + tl.load(row + AT_GROUP, mask=happens, other=0) * width
        weight = average_weight(tl.load(group + 5), ints, phases, control, position)
        takes_part = happens & ~is_done(gradient)
        tl.store(constants + 4, tl.where(takes_part, weight, 0.0).to(A), mask=exists)
    advance_counters(
        row, active, groups, width, ints, floats, phases, position, FACTOR, COUNTER, SCALAR
    )
    if is_last != 0:
        # The last program moves the position, after all others have read it.
        tl.debug_barrier()
        ticket = tl.atomic_add(control + 2, 1)
        if ticket == tl.num_programs(0) - 1:
            tl.store(control + 2, 0)
            advance_position(
                rates, kept, groups, width, ints, floats, phases, control, position, happened
            )


@triton.jit(
    do_not_specialize=["width", "phases", "kept"],
    do_not_specialize_on_alignment=["groups", "ints", "floats", "control", "gate", "rates"],
)
def advance(groups, width, ints, floats, phases, control, gate, rates, kept):
    """Advance the position in a step that updates no tensor.

    Args:
        groups, width, ints, floats, phases, control, gate, rates, kept: as for :func:`prepare`.
    """
    happened = tl.load(gate + 1) == 0
    advance_position(
        rates, kept, groups, width, ints, floats, phases, control, tl.load(control), happened
    )
