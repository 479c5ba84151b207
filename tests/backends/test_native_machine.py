"""Any order of events: the native backend and plain torch must stay equal.

A stale pointer shows here as a difference, or kills the process. The events are those of
``fuzz.machine``; here hypothesis chooses them, and cuts a sequence that fails down to the shortest.

``HYPOTHESIS_PROFILE=long pytest tests/backends/test_native_machine.py`` looks longer, and anew each
time; ``make fuzz`` plays many more events in the same time.
"""

from __future__ import annotations

import os
from typing import Any

from fuzz.events import Event
from fuzz.machine import EVENTS, Machine
from fuzz.setups import load_kernels, setups, surroundings
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

_common = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}
settings.register_profile(
    "native", settings(max_examples=150, stateful_step_count=30, derandomize=True, **_common)
)
settings.register_profile(
    "native-long", settings(max_examples=5000, stateful_step_count=60, **_common)
)
PROFILE = "native-long" if os.environ.get("HYPOTHESIS_PROFILE") == "long" else "native"


def _drawn(values: dict[str, Any]) -> dict[str, Any]:
    return {name: st.sampled_from(choices) for name, choices in values.items()}


class Events(RuleBasedStateMachine):
    machine: Machine

    def __init__(self) -> None:
        super().__init__()
        self.around = surroundings("native")
        self.around.__enter__()

    def teardown(self) -> None:
        self.around.__exit__(None, None, None)

    @initialize(setup=st.fixed_dictionaries(_drawn(setups("native"))))
    def begin(self, setup: dict[str, Any]) -> None:
        load_kernels("native")
        self.machine = Machine(**setup)

    @invariant()
    def check(self) -> None:
        self.machine.check()


def _as_rule(name: str, event: Event) -> Any:
    def happen(self: Events, **arguments: Any) -> None:
        getattr(self.machine, name)(**arguments)

    happen.__name__ = name
    return rule(**_drawn(event.arguments))(happen)


for _name, _event in EVENTS.items():
    setattr(Events, _name, _as_rule(_name, _event))

TestEvents = Events.TestCase
TestEvents.settings = settings.get_profile(PROFILE)
