"""Position: the number of the next step, and who knows it (the host or the device).

The host counts the steps that it takes. After a step that the device may have skipped, only the
device knows the position; after a captured step, for good, since a graph's replays count on the
device. Most steps leave the question open. If a user, a hook, a ``scale_fn`` or torch's own step
needs the position, the host asks the device and waits.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from clr_optim.averages import due
from clr_optim.backends.base import Course, WhoKnows
from clr_optim.core import leftover
from clr_optim.core.groups import GroupMirror
from clr_optim.core.rates import never_driven
from clr_optim.core.records import course_of, have_plan_take, written_settings_warning
from clr_optim.core.saved import unread_bounds_warning
from clr_optim.core.serving import Serving
from clr_optim.core.settings import Settings
from clr_optim.core.values import Values
from clr_optim.core.warn import callers_level, warn_each
from clr_optim.keys import STEP
from clr_optim.plan import Plan

__all__ = ["Position"]


class Position:
    """The position of one optimizer: on the host, in its groups and on its device.

    A caller holds the optimizer's lock, except for :attr:`is_certain` and :meth:`believed`, which
    only read.

    ================== ==========================================================================
    :meth:`settle`     take over the position and the bounds that other code wrote
    :meth:`overrule`   settle, then replace each ``lr`` that other code wrote
    :meth:`advance`    write the next step, whose values are known, into untouched groups
    :meth:`go_to`      write a position into the groups and onto the device
    :meth:`follow`     write a position into the groups alone
    :meth:`reach`      write the position after torch's own step
    :meth:`catch_up`   write the kernels' count into the groups
    ================== ==========================================================================

    Args:
        settings: the optimizer and its policy.
        mirror: what we wrote into the groups.
        serving: the backend, which counts the steps of its kernels.
    """

    def __init__(self, settings: Settings, mirror: GroupMirror, serving: Serving) -> None:
        self._settings = settings
        self._mirror = mirror
        self._serving = serving
        #: the position that the groups hold, and the kernels' count of steps at that time
        self.counted = (0, 0)
        #: the position whose rates a scheduler view shows, instead of the last step's
        self.viewed = 0
        self._has_warned = self._has_warned_of_settings = self._has_warned_of_bounds = False

    # ---- who knows it?

    @property
    def number(self) -> int:
        """The position that we last wrote into the groups."""
        return self.counted[0]

    @property
    def kernel_steps(self) -> int:
        """The number of steps that the kernels have taken."""
        fused = self._serving.fused
        return 0 if fused is None else fused.plan.steps

    @property
    def is_on_device(self) -> bool:
        """Whether only the device knows the position."""
        fused = self._serving.fused
        return fused is not None and fused.who_knows is not WhoKnows.HOST

    @property
    def is_certain(self) -> bool:
        """Whether the host knows the position, and the groups show all steps that were taken."""
        fused = self._serving.fused
        if fused is None:
            return True
        return fused.plan.steps == self.counted[1] and fused.who_knows is WhoKnows.HOST

    def believed(self) -> int:
        """Return the position as far as the host knows, without waiting for the device."""
        return self._mirror.position(self.counted[0])

    def ask(self) -> int:
        """Return the position; wait for the device if only the device knows it."""
        if self.is_certain:
            return self.believed()
        self.catch_up()
        counted = self.counted
        mirror, fused = self._mirror, self._serving.fused
        position = self.believed()
        groups = self._settings.optimizer.param_groups
        # Groups that were loaded into the wrapped optimizer hold their own position.
        if fused is None or fused.who_knows is WhoKnows.HOST:
            return position
        if position != self.number or not mirror.have_ours(groups):
            return position
        position = fused.position()
        if position != self.number or any(map(self._serving.is_kept, groups)):
            mirror.adopt()
            # Bounds that other code wrote are still news to the device, and an older graph does
            # not keep the rate of a group that was added.
            self._write_groups(position, counted)
            if self.is_on_device:
                fused.take_bounds(self.course())
        return position

    # ---- what other code wrote

    def settle(self) -> int:
        """Take over the position, bounds and groups that other code wrote; return the position.

        If only the device knows the position, the host asks and waits.
        """
        position, before = self._asked()
        return self._obey(position, before)

    def _asked(self) -> tuple[int, tuple[int, int]]:
        """Return the answer of :meth:`ask`, and the value of :attr:`counted` that it belongs to."""
        before = self.counted
        position = self.ask()
        counted = self.counted
        return (position, before) if counted is before else (counted[0], counted)

    def _obey(self, position: int, before: tuple[int, int]) -> int:
        if position == before[0] and self._mirror.is_settled():
            return position
        optimizer = self._settings.optimizer
        for group in optimizer.param_groups:
            if STEP not in group:
                leftover.note_group(optimizer, group)
        leftover.forget_removed_groups(optimizer)
        self._mirror.adopt()
        if position == before[0]:
            position, before = self._asked()  # other code has changed the groups, not the device
        self._write(position, before)
        return position

    def overrule(self) -> None:
        """Take over what other code may decide, and replace each ``lr`` that it wrote.

        The first replaced rate warns.
        """
        before = self.counted
        self._obey(self.believed(), before)
        before = self.counted
        written = self._mirror.changed_rates()
        if written is None:
            return
        if written and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "lr was written from outside in parameter group "
                + ", ".join(f"{i} ({lr:g})" for i, lr in written.items())
                + f"; the policy {self._settings.schedule.name!r} decides instead, here and from "
                "now on. Remove the other scheduler, or change course with set_bounds or "
                "set_iteration.",
                UserWarning,
                stacklevel=callers_level(),
            )
        self._warn_of_settings()
        self.follow(before[0], before)

    def _warn_of_settings(self) -> None:
        """Warn once if other code wrote a setting that follows a schedule, or cycled momentum.

        A torch scheduler writes momentum with the rate: the warning about the rate is enough.
        """
        if self._has_warned_of_settings:
            return
        groups, mirror = self._settings.optimizer.param_groups, self._mirror
        numbers, cycles = mirror.written.numbers, not self._has_warned
        warning = written_settings_warning(groups, mirror.records, numbers, cycles=cycles)
        if warning is not None:
            self._has_warned_of_settings = True
            warn_each([warning])

    def warn_unread_bounds(self) -> None:
        """Warn once if other code wrote bounds, as ``"max_lr"``, into groups."""
        if self._has_warned_of_bounds:
            return
        warning = unread_bounds_warning(self._settings.optimizer.param_groups)
        if warning is not None:
            self._has_warned_of_bounds = True
            warn_each([warning])

    # ---- where to
    #
    # A signal handler may change the course within any of these methods. `before` is the value of
    # `counted` from which a method started. Each write makes a new tuple, so the identity shows
    # whether a handler has written since.

    def go_to(self, position: int) -> None:
        """Go to a step that does not follow the last one."""
        self._write(position, self.counted)
        self.viewed = position

    def follow(self, position: int, before: tuple[int, int]) -> None:
        """Write a position into the groups alone: a device that counts is there by itself."""
        steps = self.kernel_steps
        self._mirror.write(position, self._serving.is_driven)
        self._count(before, (position, steps))

    def reach(self, position: int, before: tuple[int, int]) -> None:
        """Go to the step that follows torch's own step, of which the device has not heard."""
        if self._serving.fused is None:
            self.follow(position, before)
        else:
            self._write(position, before)

    def rewrite(self) -> None:
        """Write the same position into groups that have changed."""
        counted = self.counted
        self._write(counted[0], counted)

    def _write(self, position: int, before: tuple[int, int]) -> None:
        """Write a position into the groups, and send it to the device if that counts."""
        self._write_groups(position, before)
        fused = self._serving.fused
        if fused is not None and fused.who_knows is not WhoKnows.HOST:
            fused.move_to(self.course())

    def _write_groups(self, position: int, before: tuple[int, int]) -> None:
        steps = self.kernel_steps
        self._mirror.write(position, never_driven)
        self._count(before, (position, steps))

    def _count(self, before: tuple[int, int], counted: tuple[int, int]) -> None:
        """Note the position that the groups hold now, or obey a handler that wrote meanwhile."""
        latest = self._note(before, counted)
        if latest is not counted:
            # A handler's position wins. If the handler changed the bounds alone, the step counts.
            is_moved = latest[0] != before[0]
            self._write(latest[0] if is_moved else counted[0], latest)

    def _note(self, before: tuple[int, int], counted: tuple[int, int]) -> tuple[int, int]:
        """Set :attr:`counted`, unless a handler has written meanwhile; return the attribute."""
        # CPython runs no handler within this expression.
        self.counted = counted if self.counted is before else self.counted
        return self.counted

    def advance(self, before: tuple[int, int], values: Values, steps: int) -> None:
        """Go on by one step in groups that other code has not touched.

        Args:
            before: :attr:`counted` before the step.
            values: what :meth:`GroupMirror.look_ahead` returned before the step.
            steps: the kernels' count of steps.
        """
        self._mirror.advance(values)
        fused = self._serving.fused
        if values.numbers and fused is not None:
            have_plan_take(self._mirror.records, values.numbers, fused.plan)
        self._count(before, (values.position, steps))

    def catch_up(self) -> None:
        """Bring the groups up to the kernels' count of steps, and commit what the kernels did.

        The kernels are ahead of the groups after an exception between the two, and while a signal
        handler asks or saves there. Ordinary steps write the groups themselves, and the mirror is
        behind.
        """
        fused = self._serving.fused
        if fused is None or fused.plan.steps == self.counted[1]:
            return
        if fused.steps_alone and self._take_over(fused.plan):
            return
        fused.plan.commit_if_called()
        self.follow_kernels()

    def _take_over(self, plan: Plan) -> bool:
        """Take note of the steps that native code took alone; return False if it took none."""
        # A finalizer may take a step meanwhile. The count then belongs to an earlier step, and the
        # next question finds the rest.
        before, steps = self.counted, plan.steps
        number, rates, settings, written_rates, numbers = plan.native.course()
        if not rates or number - before[0] != steps - before[1]:
            return False
        _, bounds, momentum_bounds, *_ = self._mirror.written
        values = Values(number, bounds, momentum_bounds, written_rates, numbers)
        self._mirror.take_over(values, rates, settings)
        if numbers:
            have_plan_take(self._mirror.records, numbers, plan)
        counted = (number, steps)
        latest = self._note(before, counted)
        if latest is not counted:
            # The mirror holds older values than those that the step in between has written.
            self._write(latest[0] + plan.steps - latest[1], latest)
        return True

    def follow_kernels(self) -> None:
        """Bring the groups up to the kernels' count of steps."""
        counted = self.counted
        number = counted[0] + self.kernel_steps - counted[1]
        # A signal handler that moved the position meanwhile has caught up already.
        if number != counted[0] and self.counted is counted:
            self.follow(number, counted)

    def course(self) -> Course:
        """Return what the backend needs to know of the next step."""
        written, fused = self._mirror.written, self._serving.fused
        kept = self._kept() if fused is not None and fused.keeps_rates else ()
        momenta = written.momentum_bounds or None
        position, bounds = self.counted[0], written.bounds
        records, settings = self._mirror.records, self._settings
        groups = [record.group for record in records]
        averages = due(settings.average, settings.schedule, position, groups)
        followed = course_of(records)
        return Course(position, written.rates, bounds, momenta, kept, True, followed, *averages)

    def _kept(self) -> list[tuple[int, Tensor]]:
        """Return the learning rates that the device keeps current, see :class:`Course`."""
        groups: list[dict[str, Any]] = self._settings.optimizer.param_groups
        return [
            (i, record.lr)
            for i, record in enumerate(self._mirror.records)
            # After a group has become capturable, its rate is a float for one more step.
            if isinstance(record.lr, Tensor) and self._serving.is_kept(groups[i])
        ]
