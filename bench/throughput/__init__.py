"""Time the step of each update rule: ours, torch's own, and the memory's bandwidth as the limit.

A *cell* is one rule on one workload in one dtype. A *variant* is one way to take the step: torch's
for-loop, foreach, fused or compiled step, each with its ``CyclicLR``, or our step. All variants of
a cell share parameters and gradients, keep their own state, and take turns step by step. A slow
moment of the machine then slows all of them.

Before each step the gradients move to other memory, as ``zero_grad(set_to_none=True)`` makes them
move in training. That time does not count.

On a GPU each round times a step twice: on the device, and on the host that launches it (see
:class:`~clr_optim.bench.gpu.Stopwatch`). Captured graphs are timed too; their gradients stay in
place.

The files: ``tensors`` (parameters and gradients), ``variants`` and ``graphs`` (the steps),
``timing`` (turns), ``cells`` (one cell), ``overhead`` and ``processes`` (measurements beside the
cells), ``iterations`` (with forward and backward), ``training`` (the step of a small model in
training), ``features`` (clipping, skipping, averages), ``one_model`` (the user's parameters),
``options`` and ``command`` (the command line).
"""

from clr_optim.bench.throughput.command import DESCRIPTION, EXAMPLES, exit_code, main, run
from clr_optim.bench.throughput.options import add_arguments

__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments", "exit_code", "main", "run"]
