"""The compiled extension. Only `loader.py` imports it, since other code cannot tell if it serves.

Every class and function needs the GIL. A long step gives it away while its kernels run.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

#: The columns of the rows, see `Bucket.rows`: integers of 8 bytes.
ROW: tuple[str, ...]

# How a scan ends. The first two say that nothing has changed.
ALL_ACTIVE: int
SOME_IDLE: int
CHANGED: int
GROUPS_CHANGED: int
SETTINGS_CHANGED: int
STATE_CHANGED: int
WOKEN: int
NESTED: int

# How `Plan.step` ends. Nothing has changed unless the step was taken, or an exception was raised; a
# skip changes what the gate knows, and the norm.
TAKEN: int
OUT_OF_VALUES: int
OBSERVED: int
REPLACED: int
WRITTEN: int
OUTDATED: int
IN_USE: int
UNSERVED: int
SKIPPED: int

#: The answer of `Plan.update_one` if no pass is open or the row has changed.
NO_ROW: int

class Bucket:
    """Tensors that one kernel updates, a row for each; see `kernels/native/bucket.h`."""

    looks_ahead: bool

    def __new__(
        cls,
        kernel: int,
        dtype: int,
        keys: tuple[str, ...],
        slot_dtypes: tuple[int, ...],
        masters: bool,
        number_sizes: tuple[int, int],
        device: tuple[int, int],
        divides: bool,
        words: tuple[int, int, int, int],
    ) -> Bucket: ...
    def append(
        self,
        param: Tensor,
        entry: dict[str, Any],
        state: Sequence[Tensor],
        group: int,
        first: bool,
        grad: Tensor | None,
        /,
    ) -> None:
        """Add a row: a parameter with the tensors of its state and the dictionary of these."""

    def replace(
        self,
        row: int,
        param: Tensor,
        entry: dict[str, Any],
        state: Sequence[Tensor],
        group: int,
        first: bool,
        grad: Tensor | None,
        /,
    ) -> bool:
        """Replace a row; return False if its numbers of dimensions and of values are others."""

    def note_filled(self, row: int, entry: dict[str, Any], /) -> None:
        """Note that a step has filled the row's state, and which dictionary holds it."""

    def entries(self) -> list[dict[str, Any]]:
        """Return the dictionary of each row's state; an empty list if the rule keeps none."""

    def rows(self) -> bytearray:
        """Return the rows, each with the columns of `ROW`."""

    def gradients(self) -> bytearray:
        """Return the addresses of the gradients, 8 bytes each; 0 for a row without a gradient."""

class Plan:
    """Everything that one optimizer's steps read; see `kernels/native/plan.h`."""

    #: the number of kernel calls, and of those that advanced the position
    calls: int
    steps: int
    #: whether a step or a scan uses the plan at this moment
    busy: bool
    #: whether a backward pass has updated a parameter, and no step has followed
    in_pass: bool
    #: the numbers of the bucket and of the row at which the last scan stopped
    place: tuple[int, int]
    #: the user's list of groups, for later scans; cannot be read
    groups: Sequence[dict[str, Any]]
    #: the launches that steps make, see `bind`
    launches: Launches | None

    def __new__(
        cls, optimizer: object, own_step: Callable[..., Any], needs_launches: bool
    ) -> Plan: ...
    def set_sources(
        self,
        groups: Sequence[dict[str, Any]],
        members: list[list[Tensor]],
        keys: list[list[str]],
        settings: list[list[Any]],
        state: dict[Tensor, Any],
        dicts: dict[Any, Any],
        idle: list[Tensor],
        /,
    ) -> None:
        """Take in what the plan was built from, for later scans to compare; end the course."""

    def set_buckets(self, buckets: Sequence[Bucket], params: list[Tensor], /) -> None:
        """Take in the buckets, and the parameters of all of them."""

    def set_scalars(self, scalars: object, /) -> None:
        """Take in an array of float64 with the kernels' scalars, a row per group."""

    def scan(self) -> int:
        """Scan; keep the gradients alive until `release` or the end of a step."""

    def update(
        self, rates: Sequence[float], factor: float, moves: bool, weights: Sequence[float], /
    ) -> int:
        """Scan, and update every row with a gradient if nothing has changed.

        Args:
            rates: the rate of each group.
            factor: a factor of all gradients.
            moves: whether the step counts.
            weights: the weight of each group in the average that falls due; empty if none does.
        """

    def squares(self) -> tuple[int, list[float]]:
        """Scan, and return the sum of the squares of each bucket's gradients; keep these alive."""

    def begin_course(
        self,
        records: Sequence[tuple[object, ...]],
        position: int,
        rates: Sequence[Sequence[float]],
        numbers: Sequence[Sequence[float]],
        ends: Sequence[bool],
        max_norm: float | None,
        gate: tuple[float, bool, Callable[[float], float]] | None,
        averages: Sequence[Sequence[float]],
        /,
    ) -> None:
        """Take in the course of the coming steps.

        Args:
            records: `(group, lr, entries, settings)` of each group. `lr` is the object that the
                group holds. `entries` are `(key, object)` of entries that must stay. `settings` are
                those that follow a schedule: `(key, object, members, columns, place)`. The object
                is a float, or a tuple of which `members` are the places that follow. `columns` are
                those of the scalars, one per number, or -1; `place` is that among the settings
                of `set_sources`, or -1.
            position: the object that the groups hold as their position.
            rates: the rate of each group, at the position and at those that follow.
            numbers: likewise the numbers of all settings of all groups, in order; empty if no
                setting follows a schedule.
            ends: whether each step completes a cycle; empty if there are no hooks to call.
            max_norm: the largest norm of all gradients; steps clip a larger one.
            gate: the largest norm of a step that happens; whether norms are float64, not float32;
                and a function that takes the norm of a step and returns the next largest norm. If
                a device runs the kernels, its gate decides instead.
            averages: for each step the weights of :meth:`update`; empty without averages.
        """

    def course(self) -> tuple[int, list[object], list[list[object]], list[float], list[float]]:
        """Return the position; `lr` and settings of each group as objects; both as numbers."""

    def end_course(self) -> None:
        """End the course: steps need Python again. Within a step, do nothing."""

    def bind(self, launches: Launches | None, calls: int = ..., /) -> bool:
        """Have the steps of a course make these launches instead of calling the CPU's kernels.

        Return False, and change nothing, if the plan has counted another number of calls: a signal
        handler or a finalizer has taken a step since the launches.

        The launches must have exactly the buckets of the plan. A plan that has had launches needs
        them: without any, `step` does nothing. The binding ends with `end_course`, `set_sources`,
        `set_buckets`, `set_scalars`, and an exception of `step`. If a row of a bucket changes, the
        launches stop serving. `begin_course` leaves the binding alone.

        Raises:
            RuntimeError: if pinned memory for uploads is missing.
            ValueError: if the launches have other buckets.
        """

    def step(self, attributes: dict[str, Any], /) -> int:
        """Take the next step of the course, whole; or change nothing and return why not."""

    def take_norm(self) -> float | None:
        """Return the norm of all gradients in the last clipped step of the course, once."""

    def release(self) -> None:
        """Let go of the gradients. Within a step, do nothing."""

    def open_pass(
        self,
        rates: Sequence[float],
        weights: Sequence[float],
        launch: Callable[[int, int], object] | None,
        /,
    ) -> None:
        """Have `update_one` serve the parameters of the buckets. The plan must be up to date.

        A change of the plan closes the pass. The done parameters stay so until the next step.

        Args:
            rates: the rate of each group.
            weights: the weight of each group in the average that falls due; empty if none does.
            launch: updates a row on a device, by the numbers of its bucket and row; returns False
                if the pass must be opened again first. None: the CPU's kernels update the row.
        """

    def close_pass(self) -> None:
        """Have the next gradient need Python. Within a step, do nothing."""

    def drop_pass(self) -> None:
        """Close the pass, and forget which parameters are done."""

    def has_row(self, param: Tensor, /) -> bool:
        """Return whether `update_one` knows a parameter's row."""

    def is_done(self, param: Tensor, /) -> bool:
        """Return whether the pass has updated a parameter."""

    def update_one(self, param: Tensor, /) -> int:
        """Update a parameter by its gradient, and set that to None; or return why not."""

    def after_fork(self, lock: object, /) -> None:
        """Forget a step of another thread, which this forked process lacks; use another lock."""

class Hook:
    """Updates each parameter that it is called with, see `kernels/native/backward.h`.

    A hook does not keep its plan alive. Without a plan, and for a parameter without a gradient, it
    does nothing.

    Args:
        plan: the plan, which has one hook at a time.
        mend: called with a parameter, and whether its gradient is a second one, if `update_one`
            cannot serve it. Returns whether to try again.
        lock: the optimizer's lock, which the hook holds while it works.
    """

    def __new__(
        cls, plan: Plan, mend: Callable[[Tensor, bool], bool], lock: threading.RLock
    ) -> Hook: ...
    def __call__(self, param: Tensor, /) -> None: ...

class Launches:
    """The kernels of one device's step, launched without Triton; see `kernels/native/launches.h`.

    A step makes the launches in the order of `add_launch`, on torch's current stream. Before them,
    the step uploads the addresses of gradients that have moved. The launches serve only their own
    process, in the context and on the stream that were current when they were made, outside of
    captures.

    Args:
        device: the index of the GPU, which must be the current one.
        watch: objects that must be empty at each step, as lists of hooks are; `(object, name)` for
            an attribute; `(object, name, value)` for an attribute that must be this value.
        clips: whether the launches clip the gradients. A course with a largest norm needs launches
            that do.

    Raises:
        RuntimeError: if no driver of a GPU is loaded, or this thread has no context.
    """

    def __new__(
        cls,
        device: int,
        watch: list[object],
        *,
        clips: bool = False,
    ) -> Launches: ...
    def add_bucket(self, bucket: Bucket, *, table: int = 0) -> None:
        """Add a bucket. The device must have its rows, and the addresses of the last scan.

        Args:
            bucket: the bucket.
            table: where the device has the table of the gradients' addresses; 0: no table.
        """

    def add_launch(
        self,
        *,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        parameters: bytes,
        sizes: Sequence[int],
        keep: object,
        gradients: tuple[Bucket, int] | None = None,
        grad_scale: int | None = None,
        found_inf: int | None = None,
        rows: tuple[Bucket, int, int, int, tuple[int, ...]] | None = None,
    ) -> None:
        """Add a launch.

        Args:
            function: the driver's handle.
            grid: the numbers of programs.
            threads: the threads of a program.
            shared: the bytes of dynamic shared memory.
            parameters: the packed parameters, each at a multiple of its size.
            sizes: the bytes of each parameter: 1, 2, 4 or 8.
            keep: objects that the launch needs alive, as the compiled kernel and tensors.
            gradients: an added bucket of up to eight rows, and where in the parameters the
                addresses of its gradients begin. Each step writes them there.
            grad_scale, found_inf: where the parameters hold the address of this signal of a
                GradScaler. Each step writes the addresses of the tensors on the wrapping optimizer.
                The launches serve only steps with exactly the signals that some launch reads.
            rows: makes this a launch of `run_row` alone: the bucket; where the parameters hold a
                row's number (int32), the address of its gradient, and its blocks per chunk (int32);
                programs and blocks per chunk of each row in turn.

        Raises:
            ValueError: if the driver expects other parameters.
        """

    def addresses(self, bucket: Bucket, /) -> bytes:
        """Return the addresses that a bucket's table holds after the last step."""

    def run_row(self, bucket: int, row: int, /) -> bool:
        """Update one row by its gradient of the last scan; return False if no launch can serve.

        Args:
            bucket: the place of its bucket among the launches with `rows`.
            row: the number of the row.

        Raises:
            RuntimeError: on an error of the driver. The launches then serve no more.
        """

    def can_run(self) -> bool:
        """Return whether the launches serve here: this stream and context, outside of captures."""

    def run(self) -> bool:
        """Make the launches with the addresses of the last scan; return False if they cannot serve.

        Raises:
            RuntimeError: on an error of the driver. The launches then serve no more.
        """

def connect(
    *,
    exchange_api: object,
    tensor: type,
    parameter: type,
    dtensor: type,
    has_mode: Callable[[], bool],
    increment_version: Callable[[list[Tensor]], None],
    num_threads: Callable[[], int],
    current_stream: Callable[[int], int] | None,
    global_pre_hooks: dict[Any, Any],
    global_post_hooks: dict[Any, Any],
    profiler: dict[str, Any],
    position_key: str,
) -> None:
    """Tell the extension what it needs of torch, and the keys that groups hold."""

def kernel_sets() -> tuple[str, ...]:
    """Return the names of the sets of kernels that were compiled in, the slowest first."""

def kernel_set() -> str:
    """Return the name of the set whose kernels a step calls."""

def use(name: str, /) -> None:
    """Choose the set of kernels. The CPU must have its instructions."""

def kernel_names() -> tuple[str, ...]:
    """Return the names of the kernels, in the order of their numbers."""

def dtype_names() -> tuple[str, ...]:
    """Return the names of the dtypes, in the order of their numbers."""

def can_read(capsule: object, /) -> bool:
    """Return whether the extension knows this version of DLPack's C exchange API."""

def round(dtype: int, source: int, target: int, count: int, /) -> None:
    """Round `count` floats at address `source` to a dtype and back, for the tests."""
