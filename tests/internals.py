"""Give tests access to the internals of an optimizer, by plain names.

Only this module knows the private fields. If the internals are rewritten, only this module changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.optim import Optimizer

from clr_optim import CyclicalOptimizer
from clr_optim.backends.base import Course, FusedBackend, Gradients, WhoKnows
from clr_optim.backends.native import NativeBackend, rule_for
from clr_optim.core.groups import GroupMirror
from clr_optim.core.ordinary import OrdinarySteps
from clr_optim.plan import Plan

Wrapped = CyclicalOptimizer[Any]


def backend_of(opt: Wrapped) -> FusedBackend | None:
    """Return the fused backend that has served the steps so far; None if torch's step did."""
    return opt._shared.serving.fused


def plan_of(opt: Wrapped) -> Plan:
    """Return the plan, and make the backend first if no step has done so."""
    shared = opt._shared
    backend = shared.serving.make(shared.lock)
    assert backend is not None
    return backend.plan


def kernels_of(opt: Wrapped) -> set[str]:
    """Return the kernels that serve the parameters; none if torch's step serves all of them."""
    backend = backend_of(opt)
    return set() if backend is None else {bucket.kernel for bucket in backend.plan.buckets}


def notes_of(opt: Wrapped) -> dict[str, Any]:
    """Return by name what the optimizer notes from step to step, beside groups and state.

    Tests compare these values by ``repr``: an object that hides its fields must be opened here.
    """
    shared = opt._shared
    notes = {
        "lock": shared.lock,
        "constructor_bounds": shared.constructor_bounds,
        "grad_norm": shared.grad_norm(),
    }
    for each in (shared.serving, shared.position):
        notes.update(vars(each))
    for i, record in enumerate(shared.mirror.records):
        notes.update({f"{name} {i}": getattr(record, name) for name in type(record).__slots__})
    return {**notes, "written": shared.mirror.written}


def is_next_step_ordinary(opt: Wrapped) -> bool:
    """Return whether the groups hold what we wrote, so that the next step takes the short way."""
    shared = opt._shared
    return shared.mirror.is_untouched(shared.position.number)


def overlook_outside_writes(patch: pytest.MonkeyPatch) -> None:
    """Have every optimizer believe that no other code wrote into its groups."""
    patch.setattr(GroupMirror, "is_untouched", lambda self, position: True)


def steps_in_backward(opt: Wrapped) -> bool:
    """Return whether hooks update the parameters in the backward pass."""
    return opt._shared.in_backward.is_active


def drop_pass(opt: Wrapped) -> None:
    """Forget which parameters the present backward pass has updated."""
    opt._shared.in_backward.drop_pass()


def drop_cycle_end_hooks(opt: Wrapped) -> None:
    """Remove the hooks, which no pickle holds."""
    opt._cycle_end_hooks.clear()


# ---- the device


def only_device_knows(opt: Wrapped) -> bool:
    """Return whether the host must ask the device which step is next."""
    backend = backend_of(opt)
    assert backend is not None
    return backend.who_knows is not WhoKnows.HOST


def device_positions(opt: Wrapped) -> list[int]:
    """Return the position that each device holds."""
    return [clock.ask() for clock in _clocks(opt)]


def device_position_writes(opt: Wrapped) -> list[int]:
    """Return how often the host has written the position of each device."""
    return [clock._control._version for clock in _clocks(opt)]


def _clocks(opt: Wrapped) -> list[Any]:
    backend: Any = backend_of(opt)
    return list(backend._clocks.values())


# ---- in the middle of a step


def take_the_general_way(patch: pytest.MonkeyPatch) -> None:
    """Have every step take the general way, as unusual steps do."""
    patch.setattr(OrdinarySteps, "take", lambda self, attributes: False)


def act_before_native_steps(
    patch: pytest.MonkeyPatch, action: Callable[[FusedBackend], object]
) -> None:
    """Have every native backend run ``action(backend)`` after its scan, before its kernels."""
    step = NativeBackend.step
    take_the_general_way(patch)

    def acting(backend: NativeBackend, *args: Any) -> Tensor | None:
        action(backend)
        return step(backend, *args)

    patch.setattr(NativeBackend, "step", acting)


def fail_native_launches(patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Have the native backend raise just before it calls its kernels."""

    def failing(*args: object) -> None:
        raise error

    take_the_general_way(patch)
    patch.setattr(NativeBackend, "_call_kernels", failing)


def fail_after_triton_launches(patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Have the Triton backend raise when the device has stepped and the host has not noted it."""
    from clr_optim.backends.triton.clock import Clock

    def failing(*args: object) -> None:
        raise error

    patch.setattr(Clock, "advanced", failing)


def act_before_triton_launch(
    patch: pytest.MonkeyPatch, opt: Wrapped, action: Callable[[], object]
) -> None:
    """Have every step of a Triton backend run ``action`` between its scan and its launch."""
    import clr_optim.backends.triton.backend as module

    assert backend_of(opt) is not None
    gates = module.fill_gates

    def acting(*args: Any) -> Any:
        action()
        return gates(*args)

    patch.setattr(module, "fill_gates", acting)


# ---- plans and backends without a wrapper


def count_builds(patch: pytest.MonkeyPatch) -> list[Plan]:
    """Return a list that grows by a plan each time when that plan is built."""
    built: list[Plan] = []
    build = Plan._build

    def counted(plan: Plan) -> None:
        built.append(plan)
        build(plan)

    patch.setattr(Plan, "_build", counted)
    return built


def count_builds_of(plan: Plan) -> list[Plan]:
    """Return a list that grows each time when this plan is built."""
    built: list[Plan] = []
    build = plan._build

    def counted() -> None:
        built.append(plan)
        build()

    plan._build = counted  # type: ignore[method-assign]
    return built


def bare_native_backend(optimizer: Optimizer) -> NativeBackend:
    """Return a native backend of a plain torch optimizer."""
    rule = rule_for(optimizer)
    assert not isinstance(rule, str)
    return NativeBackend(optimizer, rule)


def bare_step(backend: FusedBackend, rate: float, max_norm: float | None = None) -> Tensor | None:
    """Step a backend whose optimizer has one group, at a fixed rate; return the gradients' norm."""
    course = Course(0, [rate], [(rate, rate)], None, [], True)
    return backend.step(course, Gradients(max_norm=max_norm)).norm


# ---- ordinary steps


def outcome_of(opt: Wrapped) -> str:
    """Try to take a step in one call of native code, with a value ahead; return how it ended."""
    plan = plan_of(opt)
    names = ["TAKEN", "OUT_OF_VALUES", "OBSERVED", "REPLACED", "WRITTEN", "OUTDATED", "IN_USE"]
    names.append("SKIPPED")
    outcomes = {getattr(plan.lib, name): name for name in names}
    return outcomes[plan.native.step(vars(opt))]


def before_values_are_taken_over(
    patch: pytest.MonkeyPatch, opt: Wrapped, action: Callable[[], object]
) -> None:
    """Run ``action`` once, before the mirror takes note of the values of ordinary steps."""
    mirror = opt._shared.mirror
    take_over = mirror.take_over

    def acting(*args: Any) -> None:
        patch.undo()
        action()
        take_over(*args)

    patch.setattr(mirror, "take_over", acting)
