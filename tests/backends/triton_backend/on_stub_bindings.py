"""Bindings of launches to a plan on the stub driver: when they end, fail and are freed.

test_prebound.py runs this file in a process that has loaded the stub driver.
"""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from typing import Any

import pytest
from internals import plan_of
from stub_bound import DRIVER, LAUNCH, PARAMETERS, SLOTS, TABLE, UPLOAD, WAIT, Bound, fresh_driver

INVALID_VALUE, OUT_OF_MEMORY = 1, 2

driver = pytest.fixture(fresh_driver)


@pytest.fixture
def bound(driver) -> Bound:
    return Bound()


# ---- when a binding ends


def test_the_general_way_ends_the_binding(bound, driver):
    driver.state.capture = 1  # the launches do not serve
    bound.opt.step()
    assert bound.plan.launches is None
    assert not driver.take(LAUNCH)
    # Without launches no kernel of the CPU may touch the tensors of a GPU.
    assert bound.step() in (bound.outcome("UNSERVED"), bound.outcome("OUT_OF_VALUES"))


@pytest.mark.parametrize("method", ["end_course", "set_buckets", "set_scalars", "set_sources"])
def test_a_change_of_the_plan_ends_the_binding(bound, method):
    plan = plan_of(bound.opt)
    if method == "end_course":
        plan.native.end_course()
    elif method == "set_buckets":
        plan._set_buckets()
    elif method == "set_scalars":
        plan.native.set_scalars(plan.scalars)
    else:
        plan._set_sources(bound.opt.param_groups, bound.opt.optimizer.state)
    assert bound.plan.launches is None
    assert bound.step() == bound.outcome("UNSERVED")


def test_a_change_of_a_row_ends_the_service(bound, driver):
    row = plan_of(bound.opt).buckets[0].rows[0]
    grad = bound.params[0].grad
    before = bound.addresses
    assert bound.bucket.replace(0, row.param, {}, [], row.group, row.first, grad)
    assert bound.addresses == before
    assert bound.step() == bound.outcome("UNSERVED")
    assert not driver.take()
    bound.bind()
    assert bound.step() == bound.outcome("TAKEN")
    bound.bucket.note_filled(0, {})
    assert bound.step() == bound.outcome("UNSERVED")


def test_a_plan_without_buckets_makes_no_launch(bound):
    bound.plan.set_buckets([], [])
    assert bound.step() == bound.outcome("UNSERVED")
    with pytest.raises(ValueError, match="must have the buckets of the plan"):
        bound.plan.bind(bound.launches)
    with pytest.raises(TypeError, match="takes Launches"):
        bound.plan.bind(bound.bucket)


def test_launches_are_too_late_after_another_step(bound):
    """A signal handler may take a step between the launches and their binding."""
    launches, counted = bound.launches, bound.plan.calls
    assert bound.step() == bound.outcome("TAKEN")
    bound.plan.bind(None)
    assert bound.plan.bind(launches, counted) is False
    assert bound.plan.launches is None
    assert bound.plan.bind(launches, counted + 1) is True
    assert bound.plan.launches is launches


def test_launches_of_another_plan_are_refused(bound):
    with pytest.raises(ValueError, match="must have the buckets of the plan"):
        bound.plan.bind(Bound().launches)
    assert bound.plan.launches is bound.launches


# ---- errors of the driver


def test_an_error_before_any_launch_changes_nothing(bound, driver):
    before, steps = dict(bound.opt.param_groups[0]), bound.plan.steps
    driver.fail(LAUNCH, 700)
    with pytest.raises(RuntimeError, match=r"launch a kernel: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        bound.step()
    assert bound.opt.param_groups[0] == before
    assert bound.plan.steps == steps
    assert bound.plan.launches is None
    assert bound.launches.run() is False
    bound.bind()
    assert bound.step() == bound.outcome("TAKEN")


def test_an_error_after_a_launch_takes_the_step(driver):
    bound = Bound()
    launches = bound.made()
    bound.add(launches)
    bound.plan.bind(launches)
    steps, position = bound.plan.steps, bound.opt.param_groups[0]["clr_step"]
    driver.fail(LAUNCH, INVALID_VALUE, after=1)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        bound.step()
    assert bound.plan.steps == steps + 1
    assert bound.opt.param_groups[0]["clr_step"] == position + 1


@pytest.mark.parametrize("name", [UPLOAD, "cuEventRecord", "cuEventQuery", WAIT])
def test_an_error_of_an_upload_is_raised(bound, driver, name):
    driver.state.lags = 1
    for _ in range(SLOTS):
        bound.move(0)
        bound.opt.step()
    bound.move(0)
    driver.fail(name, 12345)
    before = dict(bound.opt.param_groups[0])
    with pytest.raises(RuntimeError, match=r"upload the addresses .* unknown error \(12345\)"):
        bound.step()
    assert bound.opt.param_groups[0] == before
    bound.launches = None
    gc.collect()
    assert not [r for r in driver.take() if r.name in ("cuMemFreeHost", "cuEventDestroy_v2")]
    # A copy may be under way, so no later launches may write into its memory.
    bound.bind()
    bound.move(0)
    assert bound.step() == bound.outcome("TAKEN")
    driver.catch_up()
    assert driver.state.overwritten == 0


@pytest.mark.parametrize("name", ["cuMemHostAlloc", "cuEventCreate"])
def test_without_pinned_memory_nothing_is_bound(driver, name):
    bound = Bound(table=0)
    taken = []

    def use_up_spare_rings() -> None:
        driver.fail(name, OUT_OF_MEMORY)
        for _ in range(100):
            taken.append(bound.made())
            bound.plan.bind(taken[-1])

    with pytest.raises(RuntimeError, match="allocate pinned memory: CUDA_ERROR_OUT_OF_MEMORY"):
        use_up_spare_rings()
    assert driver.state.unrelaxed == 0


# ---- making


def test_the_driver_must_expect_the_parameters(bound, driver):
    launches = bound.made()
    for sizes in ((8, 4, 4), (8, 4, 4, 4), (8, 4, 4, 8, 8), (8, 8, 8), (8, 4, 8, 8)):
        kernel = driver.function(sizes)
        with pytest.raises(ValueError, match="the driver expects other parameters"):
            bound.add(launches, function=kernel)
    driver.state.is_old = 1
    with pytest.raises(ValueError, match="the driver expects other parameters"):
        bound.add(launches)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"function": 0}, "a launch has"),
        ({"grid": (0, 1, 1)}, "a launch has"),
        ({"threads": 0}, "a launch has"),
        ({"sizes": (8, 4, 4)}, "a launch has"),
        ({"sizes": (8, 4, 4, 3)}, "a launch has"),
        ({"sizes": (8, 4, 4, 8, 4)}, "a launch has"),
        ({"parameters": PARAMETERS + b"\0"}, "a launch has"),
        ({"parameters": bytes(8 * 65), "sizes": (8,) * 65}, "a launch has"),
    ],
)
def test_an_impossible_launch_is_refused(bound, change, match):
    with pytest.raises(ValueError, match=match):
        bound.add(bound.made(), **change)


def test_addresses_must_lie_within_the_parameters(bound):
    launches = bound.made()
    for offset in (4, 8, 24, 2**63):
        with pytest.raises(ValueError, match="up to eight addresses"):
            bound.add(launches, gradients=(bound.bucket, offset))
    for wrong in ((bound.plan, 0), 5, (bound.bucket, "0")):
        with pytest.raises(TypeError):
            bound.add(launches, gradients=wrong)
    many = Bound(9)
    launches = many.made()
    with pytest.raises(ValueError, match="up to eight addresses"):
        many.add(
            launches, parameters=bytes(72), sizes=(8,) * 9, gradients=(many.bucket, 0),
            function=DRIVER.function((8,) * 9),
        )  # fmt: skip


def test_complete_launches_cannot_grow(bound):
    for change in (
        lambda: bound.add(bound.launches),
        lambda: bound.launches.add_bucket(bound.bucket),
    ):
        with pytest.raises(RuntimeError, match="cannot change after they were bound"):
            change()


def test_buckets_are_added_once(bound):
    launches = bound.made()
    with pytest.raises(ValueError, match="added before"):
        launches.add_bucket(bound.bucket)
    with pytest.raises(TypeError, match="expected a Bucket"):
        launches.addresses(bound.plan)
    with pytest.raises(ValueError, match="was not added"):
        launches.addresses(Bound().bucket)


def test_launches_need_a_context(bound, driver):
    driver.state.context = 0
    with pytest.raises(RuntimeError, match="this thread uses no GPU"):
        bound.made()
    driver.reset()
    driver.fail("cuCtxGetCurrent", 999)
    with pytest.raises(RuntimeError, match=r"name its context: an unknown error \(999\)"):
        bound.made()


# ---- memory


class Kernel:
    """What a launch keeps alive."""


def test_kernels_live_as_long_as_their_launches(bound):
    kernel = Kernel()
    gone = weakref.ref(kernel)
    launches = bound.made()
    bound.add(launches, keep=kernel)
    bound.plan.bind(launches)
    del kernel, launches
    bound.launches = None
    gc.collect()
    assert gone() is not None
    bound.opt.step()
    bound.plan.end_course()
    assert gone() is None


def test_launches_in_a_cycle_are_collected(bound):
    kernel: Any = Kernel()
    gone = weakref.ref(kernel)
    watched = [kernel]
    launches = plan_of(bound.opt).lib.Launches(0, [watched, (kernel, "name")])
    launches.add_bucket(bound.bucket, table=TABLE)
    bound.add(launches, keep=(kernel, launches))
    kernel.launches = launches
    watched.append(launches)
    del kernel, watched, launches
    gc.collect()
    assert gone() is None


def test_an_optimizer_with_launches_is_collected(driver):
    bound = Bound()
    bound.opt.step()
    param: Any = bound.params[0]
    param.launches = bound.launches  # a cycle through the bucket
    gone = weakref.ref(bound.opt), weakref.ref(param)
    del bound, param
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_an_optimizer_that_its_launches_keep_is_collected(bound):
    kernel: Any = Kernel()
    kernel.opt = bound.opt  # a cycle through the plan
    launches = bound.made()
    bound.add(launches, keep=kernel)
    bound.plan.bind(launches)
    bound.launches = bound.opt = None
    gone = weakref.ref(kernel)
    del kernel, launches
    gc.collect()
    assert gone() is None


def test_steps_and_bindings_leak_nothing(bound):
    def rounds(count: int) -> None:
        for _ in range(count):
            bound.bind()
            for _ in range(3):
                bound.move(0)
                bound.spare.clear()
                bound.opt.step()
            DRIVER.state.capture = 1
            bound.opt.step()  # the general way
            DRIVER.state.capture = 0
            bound.opt.step()
            DRIVER.take()

    rounds(20)
    gc.collect()
    objects = len(gc.get_objects())
    tracemalloc.start()
    rounds(5)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    rounds(50)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert abs(len(gc.get_objects()) - objects) < 20
    assert grown < 2000


def test_other_threads_run_during_the_launches(bound):
    """A finalizer or another thread that steps meanwhile finds the plan in use."""
    stop = threading.Event()
    outcomes: list[int] = []

    def other() -> None:
        while not stop.is_set():
            outcomes.append(bound.plan.step(vars(bound.opt)))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(300):
            bound.opt.step()
    finally:
        stop.set()
        thread.join()
    allowed = {bound.outcome(name) for name in ("TAKEN", "IN_USE", "OUT_OF_VALUES")}
    allowed |= {bound.outcome("UNSERVED"), bound.outcome("WRITTEN")}
    assert set(outcomes) <= allowed
