"""Two optimizers, ours and plain torch's, go through the same events and must stay equal.

The twin takes torch's own step. Its rates are computed from nothing but the number of steps. Each
event is declared once, with the values of its arguments. The fuzzer and the state machine of
``test_native_machine.py`` draw from these values. A setup and its events are plain JSON, so that a
run can be replayed at any time.

``torch`` is compared bit for bit, ``native`` and ``triton`` up to rounding:

- float64 at the end of all steps;
- narrower dtypes after each step, after which the twin takes over our values;
- 16-bit parameters with a step of the twin in float64.

A step may amplify rounding without limit. If a gradient and its weight decay cancel, and the second
moment is below the range of 16 bits, then the step divides one rounding error by another. So values
that differ by more than rounding are compared with two more steps of the twin, whose gradients are
off by float32's rounding.
"""

from __future__ import annotations

from fuzz.backward_events import BackwardEvents
from fuzz.checkpoint_events import CheckpointEvents
from fuzz.events import Event, declared_in
from fuzz.group_events import GroupEvents
from fuzz.pair import Pair
from fuzz.step_events import StepEvents
from fuzz.tensor_events import TensorEvents


class Machine(BackwardEvents, GroupEvents, CheckpointEvents):
    """A pair of optimizers, and every event that may happen to them."""


#: Every event by its name, in the order in which the fuzzer draws.
EVENTS: dict[str, Event] = {
    name: event
    for part in (Pair, TensorEvents, CheckpointEvents, GroupEvents, StepEvents, BackwardEvents)
    for name, event in declared_in(part)
}
