"""Averages on the device: their weights against the host's, and the pass against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_triton_schedule import POWERS, SCHEDULES
from triton_helpers import DEVICE, MARKS, RUNS, choose_triton

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)

if RUNS:
    import triton
    import triton.language as tl

    from clr_optim.kernels.triton.prepare import CONTROL, average_weight
    from clr_optim.kernels.triton.schedule import cycle_ends, held_tables, phase_tables

    @triton.jit
    def _ends_and_weight(
        ints,
        phases,
        control,
        averages,
        steps,
        ends,
        weights,
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        step = tl.load(steps + at)
        tl.store(ends + at, cycle_ends(ints, phases, step))
        weight = average_weight(tl.load(averages), ints, phases, control, step)
        tl.store(weights + at, weight)


def at_each(tables, steps, every=1, start=0, share=0.0, averages=0):
    """Return the cycle ends and the weights that the device computes at each step."""
    ints = torch.from_numpy(tables[0]).to(DEVICE)
    block = 1 << (len(steps) - 1).bit_length()
    there = torch.tensor([*steps, *[0] * (block - len(steps))], device=DEVICE)
    ends, weights = torch.zeros_like(there), torch.zeros_like(there, dtype=torch.float64)
    bits = int(np.float64(share).view(np.int64))
    control = dict.fromkeys(CONTROL, 0) | {"moves": 1}
    control |= {"every": every, "start": start, "share": bits}
    words = torch.tensor([control[name] for name in CONTROL], device=DEVICE)
    first = torch.tensor(float(averages), dtype=torch.float64, device=DEVICE)
    _ends_and_weight[(1,)](ints, len(ints), words, first, there, ends, weights, BLOCK=block)
    return ends[: len(steps)].tolist(), weights[: len(steps)].tolist()


def steps_of(curve):
    """Return steps at the start, around all boundaries of phases, and far out."""
    near = {*range(70)}
    for start in curve._timeline.starts:
        near |= {start + i for i in range(-3, 4)}
    far = {2**k + i for k in (24, 31, 32, 53, 62) for i in range(-8, 9)}
    return sorted(step for step in near | far if 0 <= step < 2**62 + 8)


@pytest.mark.parametrize("name", [*SCHEDULES, *POWERS])
def test_cycle_ends_on_the_device(name):
    curve = (SCHEDULES | POWERS)[name]
    for warm in (curve, curve.with_warmup(5)):
        steps = steps_of(warm)
        counted = [warm._timeline.ends(step) for step in steps]
        for tables in (phase_tables(warm), held_tables(warm)):
            assert at_each(tables, steps)[0] == counted
