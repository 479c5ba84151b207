"""Launches by Triton's launcher and by native code are the same, byte for byte.

test_prebound.py runs this file in a process whose driver is the stub. Triton compiles for an H100;
the tensors lie on the CPU, and no kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import stub_helpers
import torch
from cases import EVERY_KERNEL, Case
from internals import backend_of, plan_of
from stub_helpers import STREAM

DRIVER = stub_helpers.Stub()
stub_helpers.set_stream()
stub_helpers.make_triton_use_the_stub()

import triton  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from clr_optim import CyclicalOptimizer, Ema  # noqa: E402
from clr_optim.backends.triton import here, launch, prebound  # noqa: E402
from clr_optim.kernels.triton import gate, multi_tensor, prepare, schedule  # noqa: E402
from clr_optim.schedule import triangular  # noqa: E402

CPU = torch.device("cpu")

#: the kernels that the host launches in a step with tensors
KERNELS = {
    name
    for module in (gate, multi_tensor, prepare, schedule)
    for name, value in vars(module).items()
    if isinstance(value, JITFunction)
    and value.fn.__module__ == module.__name__
    and value.do_not_specialize_on_alignment
} - {"advance"}


class Launched(NamedTuple):
    """A launch that went through ``kernel[grid](...)``."""

    kernel: Any
    call: prebound.Call


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[Launched]]:
    """A list that grows at every launch of Triton; the backend serves tensors on the CPU."""
    DRIVER.reset()
    found: list[Launched] = []
    run = JITFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=warmup, **named)
        found.append(Launched(self, prebound.Call(compiled, grid, args)))
        return compiled

    monkeypatch.setattr(JITFunction, "run", noted)
    monkeypatch.setattr(here, "is_interpreted", lambda: True)
    yield found
    DRIVER.reset()


def stepped(case: Case, dtype: torch.dtype, **options: Any) -> Any:
    """Return an optimizer after two steps by Triton, with parameters of several sizes."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (1, 16, 3000, 70_001)]
    for param in params:
        param.grad = torch.ones_like(param)
    opt: Any = CyclicalOptimizer(
        case.make(params), "triangular", step_size_up=7, backend="triton", **options
    )
    opt.step()
    opt.step()
    return opt


def tables(opt: Any) -> list[prebound.AddressTable]:
    return [prebound.AddressTable(bucket, torch.zeros(1)) for bucket in plan_of(opt).buckets]


def compare(opt: Any, launched: list[Launched]) -> list[str]:
    """Take a step by Triton and one by native code; return the names of the equal launches."""
    launched.clear()
    DRIVER.take()
    opt.step()
    expected = DRIVER.take("cuLaunch")
    assert len(expected) == len(launched) > 0
    assert all(record.name == "cuLaunchKernelEx" for record in expected)
    assert not any(record.attributes for record in expected)
    assert all(record.bytes for record in expected)
    plan = plan_of(opt)
    calls = [each.call for each in launched]
    assert prebound.bind(plan, CPU, tables(opt), calls) is None
    assert plan.native.launches.run() is True
    ours = DRIVER.take("cuLaunch")
    assert all(record.name == "cuLaunchKernel" for record in ours)
    assert [record[1:7] for record in ours] == [record[1:7] for record in expected]
    assert [record.bytes for record in ours] == [record.bytes for record in expected]
    assert {record.stream for record in ours} == {STREAM}
    return [each.kernel.fn.__name__ for each in launched]


# Compiling takes long, so one rule has all dtypes and both ways to take a step.
COMPARED = [
    pytest.param(case, dtype, most, id=f"{case.kernel}-{str(dtype).removeprefix('torch.')}-{most}")
    for i, case in enumerate(EVERY_KERNEL)
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64, torch.float16))
    for most in (0, 2000)
    if case.kernel == "adam" or (k < 2 and (i + k) % 2 == bool(most))
]


@pytest.mark.parametrize(("case", "dtype", "most_programs"), COMPARED)
def test_launches_are_the_same(launched, case, dtype, most_programs, monkeypatch):
    monkeypatch.setattr(launch, "most_programs", lambda device: most_programs)
    names = compare(stepped(case, dtype), launched)
    assert names == (["whole_step"] if most_programs else ["prepare", "multi_tensor"])


def test_every_kernel_was_compared(launched, monkeypatch):
    names = set()
    for most_programs in (0, 2000):
        monkeypatch.setattr(launch, "most_programs", lambda device, most=most_programs: most)
        follows = {"weight_decay": triangular(3, base_lr=0.0, max_lr=0.1)}
        opt = stepped(EVERY_KERNEL[0], torch.float32, max_grad_norm=1.0, schedules=follows)
        names |= set(compare(opt, launched))
    assert names == KERNELS


# ---- rows in backward


def bound_rows(opt: Any) -> Any:
    """Return native launches for the rows of an optimizer that has had a backward pass."""
    backend: Any = backend_of(opt)
    tables = backend._row_updates._tables[CPU]
    calls = [each.row_call(tables) for each in backend._launches]
    return prebound.bind_rows(plan_of(opt).lib, CPU, calls)


def passed(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return an optimizer within a backward pass, where Triton has updated all parameters."""
    (case,) = (case for case in EVERY_KERNEL if case.kernel == name)
    opt = stepped(case, dtype, **options)
    opt.zero_grad()
    opt.step_in_backward()
    for param in opt.param_groups[0]["params"]:
        param.sum().backward()
    return opt


@pytest.mark.parametrize("average", [None, Ema(0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd", "adam", "nadam"])
def test_launches_of_rows_are_the_same(launched, name, dtype, average):
    opt = passed(name, dtype, average=average)
    assert [each.kernel.fn.__name__ for each in launched[-4:]] == ["row_step"] * 4
    expected = DRIVER.take("cuLaunch")[-4:]
    assert len({record.bytes for record in expected}) == 4
    bound = bound_rows(opt)
    for row, record in enumerate(expected):
        assert bound.run_row(0, row) is True
        (ours,) = DRIVER.take("cuLaunch")
        assert ours[1:7] == record[1:7]
        assert ours.bytes == record.bytes
        assert not ours.holds_gil


def test_rows_that_native_code_leaves_to_triton(launched):
    opt = passed("adam")
    bound = bound_rows(opt)
    DRIVER.take()
    for place, row in ((0, 4), (0, -1), (1, 0), (-1, 0), (0, 2**62)):
        assert bound.run_row(place, row) is False
    for name, value in (("capture", 1), ("context", 0xC1)):
        before = getattr(DRIVER.state, name)
        setattr(DRIVER.state, name, value)
        assert bound.can_run() is False
        assert bound.run_row(0, 0) is False
        setattr(DRIVER.state, name, before)
        assert bound.can_run() is True
    assert not DRIVER.take("cuLaunch")
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    opt.param_groups[-1]["params"][0].sum().backward()
    assert bound.run_row(0, 0) is False  # the rows have changed


def test_a_launch_of_a_row_that_fails_is_the_last(launched):
    bound = bound_rows(passed("adam"))
    DRIVER.fail("cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match="could not launch a kernel"):
        bound.run_row(0, 0)
    DRIVER.fail("", 0)
    assert bound.can_run() is False
    assert bound.run_row(0, 0) is False


@pytest.mark.parametrize("places", [(2**64 - 2, 8, 0), (0, 4, 0), (0, 2**63, 0), (0, 8, 4096)])
def test_places_of_rows_lie_within_the_parameters(launched, places):
    opt = passed("sgd")
    (bucket,) = plan_of(opt).buckets
    launches = plan_of(opt).lib.Launches(0, [])
    kernel = DRIVER.function((8, 8))
    launch = {"function": kernel, "grid": (1, 1, 1), "threads": 32, "shared": 0, "keep": None}
    launch |= {"parameters": bytes(16), "sizes": (8, 8)}
    with pytest.raises(ValueError, match="places within the parameters"):
        launches.add_launch(**launch, rows=(bucket.native, *places, (1,) * 8))
    with pytest.raises(ValueError, match="two numbers a row"):
        launches.add_launch(**launch, rows=(bucket.native, 0, 8, 4, (1,) * 7))
    launches.add_launch(**launch, rows=(bucket.native, 0, 8, 4, (1,) * 8))


# ---- where native code leaves the launches to Triton


def opt_and_calls(launched: list[Launched]) -> tuple[Any, list[prebound.Call]]:
    """Return an optimizer, and the launches of its last step."""
    (case,) = (case for case in EVERY_KERNEL if case.kernel == "sgd")
    opt = stepped(case, torch.float32)
    launched.clear()
    opt.step()
    DRIVER.take()
    return opt, [each.call for each in launched]


@pytest.fixture
def calls(launched) -> list[prebound.Call]:
    """The launches of a step."""
    return opt_and_calls(launched)[1]


class Changed:
    """An object with other values for some attributes."""

    def __init__(self, of: Any, **changes: Any) -> None:
        self._of = of
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_ctas": 2}, "several programs share a cluster"),
        ({"launch_cooperative_grid": True}, "its grid is cooperative"),
        ({"launch_pdl": True}, "it starts before the last launch ends"),
        ({"global_scratch_size": 8}, "it needs scratch memory"),
        ({"profile_scratch_size": 8}, "it needs scratch memory"),
        ({"instrumentation_mode": "gsan"}, "it is instrumented"),
    ],
)
def test_kernels_that_need_more_than_a_launch_are_left_to_triton(calls, change, reason):
    call = calls[0]
    compiled = Changed(call.compiled, metadata=Changed(call.compiled.metadata, **change))
    assert prebound.pack(compiled, call.arguments) == f"{compiled.metadata.name}: {reason}"


@pytest.mark.parametrize("kind", ["tensordesc<fp32[16]>", "nvTmaDesc", ("i32", "i32")])
def test_arguments_of_other_kinds_are_left_to_triton(calls, kind):
    call = calls[0]
    name, *_ = call.compiled.src.signature
    source = Changed(call.compiled.src, signature={**call.compiled.src.signature, name: kind})
    packed = prebound.pack(Changed(call.compiled, src=source), call.arguments)
    assert isinstance(packed, str)
    assert f"argument {name} is of an unknown kind" in packed


def test_missing_arguments_are_left_to_triton(calls):
    packed = prebound.pack(calls[0].compiled, calls[0].arguments[:-1])
    assert isinstance(packed, str)
    assert "is of an unknown kind" in packed


def test_an_unknown_triton_is_left_alone(launched, monkeypatch):
    opt, calls = opt_and_calls(launched)
    monkeypatch.setattr(triton, "__version__", "3.99.0+git")
    why_not = prebound.bind(plan_of(opt), CPU, tables(opt), calls)
    assert why_not == "Triton 3.99.0+git may pass other parameters than those known"


def test_without_a_context_triton_launches(launched):
    opt, calls = opt_and_calls(launched)
    DRIVER.state.context = 0
    assert prebound.bind(plan_of(opt), CPU, tables(opt), calls) == "this thread uses no GPU"


def test_a_driver_that_expects_other_parameters_is_believed(launched):
    opt, calls = opt_and_calls(launched)
    DRIVER.state.is_old = 1
    why_not = prebound.bind(plan_of(opt), CPU, tables(opt), calls)
    assert why_not is not None
    assert why_not.endswith("the driver expects other parameters")


def test_triton_s_hooks_end_the_service(launched):
    from triton import knobs

    opt, calls = opt_and_calls(launched)
    plan = plan_of(opt)
    assert prebound.bind(plan, CPU, tables(opt), calls) is None
    launches = plan.native.launches
    assert launches.run()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(print)
        assert not launches.run()
        chain.remove(print)
        assert launches.run()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        for other in (type(knobs.runtime.launch_enter_hook)(), None, print):
            before = getattr(knobs.runtime, name)
            setattr(knobs.runtime, name, other)
            assert not launches.run()
            setattr(knobs.runtime, name, before)
            assert launches.run()
    kernel = calls[0].compiled.src.fn
    kernel.add_pre_run_hook(print)
    assert not launches.run()
    kernel.pre_run_hooks.clear()
    assert launches.run()
    before = knobs.compilation.instrumentation_mode
    knobs.compilation.instrumentation_mode = "consan"
    assert not launches.run()
    knobs.compilation.instrumentation_mode = before
    assert launches.run()


def test_addresses_travel_in_place_of_arguments(launched):
    """Some arguments of a kernel, by name, are the addresses of a bucket's gradients."""
    opt, calls = opt_and_calls(launched)
    plan = plan_of(opt)
    (bucket,) = plan.buckets
    for call in calls:
        packed = prebound.pack(call.compiled, call.arguments)
        assert not isinstance(packed, str)
        first, *_ = packed.offsets
        if packed.sizes[:4] == [8] * 4:
            break
    call = call._replace(gradients=(bucket, first))
    assert prebound.bind(plan, CPU, [prebound.AddressTable(bucket)], [call]) is None
    assert plan.native.launches.run()
    (record,) = DRIVER.take("cuLaunchKernel")
    addresses = bucket.gradients.tobytes()
    assert len(addresses) == 4 * 8
    assert record.bytes == addresses + packed.parameters[len(addresses) :]


def test_the_backend_is_triton_s(launched):
    opt, _ = opt_and_calls(launched)
    backend = backend_of(opt)
    assert backend is not None
    assert backend.name == "triton"
