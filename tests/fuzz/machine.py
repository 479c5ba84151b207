"""Two optimizers that live through the same events, ours and plain torch's: they must stay equal.

The twin is torch's own step, fed rates that are computed here from nothing but the number of steps
taken. What may happen is declared once, with the values that an event may take: the fuzzer draws
from these, and so does the state machine of ``test_native_machine.py``. A setup and its events are
plain JSON, which plays the same again at any time.

``native`` and ``triton`` are compared up to rounding: float64 at the end of all steps, narrower
dtypes after each step, from which both then go on alike; 16-bit parameters with a step of the twin
in float64. ``torch`` is compared bit for bit.

A step may amplify rounding without limit: where a gradient and its weight decay cancel and the
second moment is below what 16 bits can hold, what is left of one is divided by what is left of the
other. Values that part by more than rounding are therefore held against two more steps of the twin,
whose gradients are off by no more than float32's rounding.
"""

from __future__ import annotations

from fuzz.checkpoint_events import CheckpointEvents
from fuzz.events import Event, declared_in
from fuzz.group_events import GroupEvents
from fuzz.pair import Pair
from fuzz.step_events import StepEvents
from fuzz.tensor_events import TensorEvents


class Machine(StepEvents, GroupEvents, CheckpointEvents):
    """A pair of optimizers, and every event that may happen to them."""


#: Every event by its name, in the order in which the fuzzer draws.
EVENTS: dict[str, Event] = {
    name: event
    for part in (Pair, TensorEvents, CheckpointEvents, GroupEvents, StepEvents)
    for name, event in declared_in(part)
}
