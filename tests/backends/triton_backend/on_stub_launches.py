"""A step that makes prebound launches on the stub driver: uploads, the ring, refusals.

test_prebound.py runs this file in a process that has loaded the stub driver.
"""

from __future__ import annotations

import gc
import os
import struct
import sys
from typing import Any

import pytest
import torch
from internals import plan_of
from stub_bound import DRIVER, LAUNCH, PARAMETERS, SLOTS, TABLE, UPLOAD, WAIT, Bound, fresh_driver
from stub_helpers import STREAM

from clr_optim import CyclicalOptimizer

driver = pytest.fixture(fresh_driver)


@pytest.fixture
def bound(driver) -> Bound:
    return Bound()


# ---- what a step does


def test_a_step_launches_and_moves_the_cycle(bound):
    before = [p.detach().clone() for p in bound.params]
    versions = [p._version for p in bound.params]
    rates = []
    for _ in range(20):  # more steps than one block of values
        rates.append(bound.opt.param_groups[0]["lr"])
        bound.opt.step()
    records = DRIVER.take(LAUNCH)
    assert len(records) == 20
    for record in records:
        assert (record.object, record.stream, record.grid) == (bound.kernel, STREAM, (5, 1, 1))
        assert (record.block, record.shared, record.bytes) == ((256, 1, 1), 16, PARAMETERS)
        assert not record.holds_gil
    assert rates == [bound.opt.lr_at(2 + i)[0] for i in range(20)]
    assert bound.opt.iteration == 22
    assert [p._version for p in bound.params] == [version + 20 for version in versions]
    assert all(map(torch.equal, before, bound.params))  # no kernel of the CPU has run


def test_gradients_that_stay_are_not_uploaded(bound):
    for _ in range(3):
        bound.opt.step()
    assert {record.name for record in DRIVER.take()} == {LAUNCH}


def test_gradients_that_move_are_uploaded_before_the_launch(bound):
    assert bound.launches.addresses(bound.bucket) == bound.addresses
    for _ in range(3):
        bound.move(1)
        bound.opt.step()
        upload, record, launch = (r for r in DRIVER.take() if r.name != "cuEventQuery")
        assert [r.name for r in (upload, record, launch)] == [UPLOAD, "cuEventRecord", LAUNCH]
        assert (upload.object, upload.stream, record.stream) == (TABLE, STREAM, STREAM)
        assert not upload.holds_gil
        assert upload.bytes == bound.addresses == bound.launches.addresses(bound.bucket)
        expected = [p.grad.data_ptr() for p in bound.params]
        assert list(struct.unpack("3Q", upload.bytes)) == expected


def test_addresses_travel_as_parameters(driver):
    bound = Bound(table=0)
    sizes = (8, 8, 8, 8, 4)
    kernel = driver.function(sizes)
    launches = plan_of(bound.opt).lib.Launches(0, [])
    launches.add_bucket(bound.bucket)
    parameters = struct.pack("@4QI", 1, 2, 3, 4, 5)
    bound.add(
        launches, function=kernel, parameters=parameters, sizes=sizes, gradients=(bound.bucket, 8)
    )
    bound.add(launches)
    bound.plan.bind(launches)
    for _ in range(2):
        bound.move()
        bound.opt.step()
        first, second = driver.take()
        assert first.bytes[:32] == struct.pack("Q", 1) + bound.addresses
        assert first.bytes[32:] == struct.pack("I", 5)
        assert second.bytes == PARAMETERS


def test_two_buckets_share_a_slot(driver):
    bound = Bound()
    bound.opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3).double())]})
    bound.params += bound.opt.param_groups[1]["params"]
    bound.params[3].grad = torch.ones(3).double()
    bound.opt.step()
    bound.opt.step()
    plan = plan_of(bound.opt)
    first, second = (bucket.native for bucket in plan.buckets)
    launches = plan.lib.Launches(0, [])
    launches.add_bucket(first, table=TABLE)
    bound.add(launches)
    with pytest.raises(ValueError, match="must have the buckets of the plan"):
        plan.native.bind(launches)
    launches.add_bucket(second, table=2 * TABLE)
    plan.native.bind(launches)
    driver.state.lags = 1
    bound.move(0, 1, 2)
    bound.spare.append(bound.params[3].grad)
    bound.params[3].grad = torch.ones(3).double()
    driver.take()
    bound.opt.step()
    names = [r.name for r in driver.take()]
    assert names == [UPLOAD, UPLOAD, "cuEventRecord", LAUNCH]
    assert launches.addresses(first) == bytes(first.gradients())
    assert launches.addresses(second) == bytes(second.gradients())
    driver.catch_up()
    assert driver.state.overwritten == 0


# ---- the ring


def test_the_host_waits_when_it_is_eight_steps_ahead(bound, driver):
    driver.state.lags = 1
    for _ in range(SLOTS):
        bound.move(0)
        bound.opt.step()
    assert not [r for r in driver.take() if r.name == WAIT]
    waits = []
    for _ in range(3):
        bound.move(0)
        bound.opt.step()
        waits += driver.take(WAIT)
    assert len({wait.object for wait in waits}) == len(waits) == 3  # the oldest copy each time
    assert not any(wait.holds_gil for wait in waits)
    driver.catch_up()
    assert driver.state.overwritten == 0
    assert driver.state.unrelaxed == 0
    bound.move(0)
    bound.opt.step()
    assert not driver.take(WAIT)


def test_a_ring_serves_again_without_a_call_at_its_end(driver):
    bound = Bound()
    driver.state.lags = 1
    for _ in range(SLOTS):
        bound.move(0)
        bound.opt.step()
    bound.plan.bind(None)
    driver.take()
    bound.launches = None
    gc.collect()
    assert driver.take() == []
    other = Bound()
    driver.state.lags = 1
    assert not driver.take("cuMemHostAlloc")
    other.move(0)
    other.opt.step()
    assert len(driver.take(WAIT)) == 1  # the old copies are still under way
    driver.catch_up()
    assert driver.state.overwritten == 0


def test_a_ring_serves_one_context(bound, driver):
    bound.plan.bind(None)
    bound.launches = None
    driver.state.context = 0xE0
    bound.bind()
    assert len(driver.take("cuMemHostAlloc")) == 1
    bound.bind()  # of two launches at a time, each has a ring
    assert len(driver.take("cuMemHostAlloc")) == 1
    bound.bind()
    assert not driver.take()


def test_large_buckets_have_large_slots(driver):
    bound = Bound(600)
    driver.state.lags = 1
    for _ in range(2):
        bound.move()
        bound.opt.step()
        (upload,) = driver.take(UPLOAD)
        assert upload.bytes == bound.addresses[: len(upload.bytes)]
    driver.catch_up()
    assert driver.state.overwritten == 0


# ---- refusals


@pytest.mark.parametrize("change", ["capture", "context", "no context", "asking", "capturing"])
def test_another_context_or_a_capture_ends_the_step_unchanged(bound, driver, change):
    if change == "capture":
        driver.state.capture = 1
    elif change in ("context", "no context"):
        driver.state.context = {"context": 0xD0, "no context": 0}[change]
    else:
        driver.fail({"asking": "cuCtxGetCurrent", "capturing": "cuStreamIsCapturing"}[change], 1)
    refuses(bound)
    driver.reset()
    assert bound.step() == bound.outcome("TAKEN")


def refuses(bound: Bound) -> None:
    """Assert that a step ends without a change."""
    before = dict(bound.opt.param_groups[0]), bound.launches.addresses(bound.bucket)
    bound.move(0)
    DRIVER.take()
    versions = [p._version for p in bound.params]
    assert bound.step() == bound.outcome("UNSERVED")
    assert DRIVER.take() == []
    assert (dict(bound.opt.param_groups[0]), bound.launches.addresses(bound.bucket)) == before
    assert [p._version for p in bound.params] == versions


def test_hooks_end_the_step_unchanged(driver):
    class Holder:
        mode = ""
        chain: Any = None

    bound = Bound()
    hooks: list[Any] = []
    Holder.chain = hooks
    by_name: dict[str, Any] = {}
    bound.watch = [hooks, by_name, (Holder, "mode"), (Holder, "chain", hooks)]
    bound.bind()
    assert bound.step() == bound.outcome("TAKEN")
    hooks.append(print)
    refuses(bound)
    hooks.clear()
    by_name["hook"] = print
    refuses(bound)
    by_name.clear()
    Holder.mode = "sanitize"
    refuses(bound)
    del Holder.mode
    refuses(bound)
    Holder.mode = ""
    Holder.chain = []
    refuses(bound)
    Holder.chain = hooks
    assert bound.step() == bound.outcome("TAKEN")


def test_launches_serve_the_stream_that_was_current_when_they_were_made(bound):
    asked = []

    def another(device: int) -> int:
        asked.append(device)
        return STREAM + 1

    plan = plan_of(bound.opt)
    try:
        bound.opt.step()
        assert [r.stream for r in DRIVER.take(LAUNCH)] == [STREAM]
        for stream in (another, None, lambda device: "5", lambda device: 1 / 0):
            plan.lib.connect(**connections(current_stream=stream))
            refuses(bound)
        assert set(asked) == {0}
        plan.lib.connect(**connections())
        bound.opt.step()
        assert [r.stream for r in DRIVER.take(LAUNCH)] == [STREAM]
    finally:
        plan.lib.connect(**connections())


def connections(**changes: Any) -> dict[str, Any]:
    """Return what the library has told the extension, with changes."""
    from clr_optim.backends import native

    given: dict[str, Any] = {}

    class Recorder:
        def connect(self, **named: Any) -> None:
            given.update(named)

    load, native.load = native.load, Recorder
    try:
        native.library.__wrapped__()
    finally:
        native.load = load
    return {**given, **changes}


def test_a_forked_child_never_calls_the_driver(bound, driver):
    bound.move(0)
    child = os.fork()
    if not child:
        code = 1
        try:
            DRIVER.take()
            # Python's own hook has ended the binding. A fork by C code calls no hook.
            code += bound.plan.launches is not None
            bound.plan.bind(bound.launches)
            code += bound.launches.run()
            bound.plan.bind(None)
            bound.launches = None
            gc.collect()
            code += bool(DRIVER.take())
            code -= 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_gradient_may_come_and_go(bound, driver):
    versions = [p._version for p in bound.params]
    bound.params[1].grad = None
    assert bound.step() == bound.outcome("TAKEN")
    (upload,) = driver.take(UPLOAD)
    assert upload.bytes[8:16] == bytes(8)
    steps = [p._version - version for p, version in zip(bound.params, versions, strict=True)]
    assert steps == [1, 0, 1]


def test_clipping_needs_launches_that_clip(driver):
    bound = Bound(clips=True)
    assert bound.step() == bound.outcome("UNSERVED")
    opt: Any = CyclicalOptimizer(
        torch.optim.SGD(bound.params, lr=0.5), "triangular", max_grad_norm=1.0, backend="native"
    )
    opt.step()
    opt.step()
    bound.opt = opt
    bound.bind()
    assert bound.step() == bound.outcome("UNSERVED")
    bound.bind(clips=True)
    bound.plan.take_norm()  # of the CPU's steps
    assert bound.step() == bound.outcome("TAKEN")
    assert bound.plan.take_norm() is None  # the device has it


# ---- the signals of a GradScaler

SIGNALS = ("grad_scale", "found_inf")


def scaled(names: tuple[str, ...] = SIGNALS) -> Bound:
    """Return an optimizer whose launch reads these signals: its first and last parameter."""
    bound = Bound()
    bound.launches = plan_of(bound.opt).lib.Launches(0, [])
    bound.launches.add_bucket(bound.bucket, table=TABLE)
    places = {name: {"grad_scale": 0, "found_inf": 16}[name] for name in names}
    bound.add(bound.launches, **places)
    bound.plan.bind(bound.launches)
    return bound


def signal(**options: Any) -> torch.Tensor:
    return torch.ones((), **{"dtype": torch.float32, **options})


def test_signals_travel_as_parameters(driver):
    bound = scaled()
    for _ in range(2):
        bound.opt.grad_scale, bound.opt.found_inf = signal(), torch.zeros(1, 1)
        assert bound.step() == bound.outcome("TAKEN")
        (record,) = driver.take(LAUNCH)
        expected = struct.pack(
            "@QIiQ", bound.opt.grad_scale.data_ptr(), 7, -7, bound.opt.found_inf.data_ptr()
        )
        assert record.bytes == expected


@pytest.mark.parametrize("names", [(), ("grad_scale",), ("found_inf",), SIGNALS])
def test_launches_serve_the_signals_that_they_read(driver, names):
    bound = scaled(names)
    for given in ((), ("grad_scale",), ("found_inf",), SIGNALS):
        for name in SIGNALS:
            setattr(bound.opt, name, signal() if name in given else None)
        if given == names:
            assert bound.step() == bound.outcome("TAKEN")
            assert driver.take(LAUNCH)
        else:
            refuses(bound)


class Subclass(torch.Tensor):
    """A tensor of a user's class."""


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(
    "wrong",
    [
        signal(dtype=torch.float64),
        signal(dtype=torch.int32),
        signal(device="meta"),
        torch.ones(2),
        torch.ones(0),
        torch._neg_view(signal()),
        signal().as_subclass(Subclass),
        1.0,
    ],
    ids=["float64", "int32", "meta", "two", "none", "negated", "subclass", "number"],
)
def test_other_signals_end_the_step_unchanged(driver, name, wrong):
    bound = scaled()
    for each in SIGNALS:
        setattr(bound.opt, each, wrong if each == name else signal())
    refuses(bound)
    setattr(bound.opt, name, signal())
    assert bound.step() == bound.outcome("TAKEN")


def test_cycle_end_hooks_need_the_answer_of_the_device(driver):
    bound = scaled()
    bound.opt.grad_scale, bound.opt.found_inf = signal(), signal()
    handle = bound.opt.register_cycle_end_hook(print)
    assert bound.step() == bound.outcome("OBSERVED")
    assert not driver.take(LAUNCH)
    handle.remove()
    assert bound.step() == bound.outcome("TAKEN")


def test_a_signal_lies_within_the_parameters(bound):
    launches = bound.made()
    for offset in (4, 24, 2**63):
        for name in SIGNALS:
            with pytest.raises(ValueError, match="lies within the parameters"):
                bound.add(launches, **{name: offset})
    with pytest.raises(TypeError):
        bound.add(launches, found_inf="0")


def test_signals_leak_nothing(driver):
    bound = scaled()
    bound.opt.grad_scale = bound.opt.found_inf = kept = signal()
    count = sys.getrefcount(kept)
    for _ in range(20):
        assert bound.step() == bound.outcome("TAKEN")
    assert sys.getrefcount(kept) == count
