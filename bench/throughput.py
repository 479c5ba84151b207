"""Throughput of a step: ours against torch's own, and against what the memory can deliver.

All variants of a cell (rule, workload, dtype) work in one process on the same parameters and
gradients, each with state of its own, and take turns step by step, so that a slow moment of the
machine falls on all alike. Each of torch's is timed together with its ``CyclicLR.step()``; ours
has nothing else to step. Before each step, untimed, the gradients move to other memory, as
``zero_grad(set_to_none=True)`` makes them move.

On a GPU each step is timed twice in a round, on the device and on the host that launches it (see
:class:`~clr_optim.bench.gpu.Stopwatch`); and ours a third time as a graph, whose gradients stay.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle, groupby
from os import environ
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR

from clr_optim import CyclicalOptimizer, plotting
from clr_optim import rules as fused_rules
from clr_optim.bench.gpu import Gpu, Stopwatch, why_no_gpu
from clr_optim.bench.machine import Limit, describe_machine, last_level_cache
from clr_optim.bench.report import table
from clr_optim.bench.workloads import DTYPES, ONLY_ON_GPU, RULES, WORKLOADS, Rule, Shape

__all__ = ["DESCRIPTION", "add_arguments", "exit_code", "main", "run"]

Row = dict[str, Any]
Cell = tuple[str, str, str]  # workload, dtype, rule
Step = Callable[[], object]

DESCRIPTION = (
    "Times the step of each rule over the shapes of well-known models, ours against torch's "
    "default, foreach and fused ones, each of those with its CyclicLR. Prints medians, ratios and "
    "the share of the memory's bandwidth; everything takes about half an hour. With --device cuda "
    "on a GPU, there with the times of device and host apart, and as a graph that is replayed."
)

_LR, _STEP_SIZE = 1e-3, 2000
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 300
_QUICK = ("mlp", "1000x256", "resnet50")
#: The largest first: they are what must not be missing where time is short.
_WORKLOADS_ON_GPU = ("1b", "gpt2", "resnet50", "1000x256", "mlp")
#: Torch's plain variants; its default is the for-loop on a CPU and foreach on a GPU.
_ON_CPU: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}}
_ON_GPU: dict[str, dict[str, Any]] = {"default": {}, "forloop": {"foreach": False}}
#: Of a GPU's memory, 3 GiB in all.
_FLOATS_ON_GPU = 2**28
#: A step that moves less than so many times the last cache may find some of it there.
_CACHES_FULL = 4


class Tensors:
    """Parameters, and gradients that move.

    Args:
        shapes: of the parameters.
        dtype: of parameters and gradients.
        backward: have gradients made by a backward pass, as in training: new tensors, of which no
            step has yet had a Python object, in memory that is new as well. Otherwise two sets
            are made once and take turns, which spares the machine but is easier on every step.
        device: where all of them lie.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        *,
        backward: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        noise = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).to(device, dtype)

        def filled(shape: Shape, scale: float) -> Tensor:
            size = math.prod(shape)
            return (noise.repeat(-(-size // len(noise)))[:size] * scale).reshape(shape).clone()

        self.params = [filled(shape, 1.0).requires_grad_() for shape in shapes]
        self.size = sum(param.numel() for param in self.params)
        self._sets = cycle([[filled(shape, scale) for shape in shapes] for scale in (0.01, 0.02)])
        self._backward = backward

    def move_gradients(self) -> None:
        """Give every parameter another gradient, in other memory than the last."""
        grads = next(self._sets)
        if not self._backward:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            return
        held = [param.grad for param in self.params]  # or the memory could be the same again
        for param in self.params:
            param.grad = None
        torch.autograd.backward(self.params, grads)
        del held


def ours(
    rule: Rule, params: list[Tensor], lr: float = _LR, backend: str = "auto"
) -> CyclicalOptimizer[Any]:
    """What the benchmark is about, cycling between the bounds that torch's are given."""
    inner = rule.optimizer(params, lr=lr, **rule.settings)
    return CyclicalOptimizer(inner, policy="triangular", step_size_up=_STEP_SIZE, backend=backend)


def torch_steps(
    rule: Rule,
    params: list[Tensor],
    compiled: bool = False,
    lr: float = _LR,
    plain: Mapping[str, dict[str, Any]] = _ON_CPU,
) -> dict[str, Step]:
    """Torch's own ways to take the step, each with its scheduler."""
    flags = dict(plain)
    known = inspect.signature(rule.optimizer).parameters
    if "fused" in known:
        flags["fused"] = {"fused": True}
    if compiled:
        # A rate that is a number would be compiled in anew at each change; and for a tensor torch
        # asks for capturable, where there is such a flag.
        flags["compile"] = {"foreach": True, "lr": torch.tensor(lr, device=params[0].device)}
        if "capturable" in known:
            flags["compile"]["capturable"] = True

    def step(name: str) -> Step:
        optimizer = rule.optimizer(params, **{"lr": lr, **rule.settings, **flags[name]})
        return _scheduled(optimizer, lr, torch.compile if name == "compile" else None)

    return {name: step(name) for name in flags}


def _scheduled(
    optimizer: torch.optim.Optimizer, lr: float, made: Callable[[Step], Step] | None = None
) -> Step:
    """The optimizer's step, or what is made of it, and then its scheduler's."""
    scheduler = CyclicLR(optimizer, lr / 4, lr, step_size_up=_STEP_SIZE, cycle_momentum=False)
    update: Step = optimizer.step if made is None else made(optimizer.step)

    def both() -> None:
        update()
        scheduler.step()

    return both


def orders(names: list[str], seconds: float) -> Iterator[list[str]]:
    """All of the names, in another order each round, until the time is up."""
    chance = Random(0)
    end = perf_counter() + seconds
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and perf_counter() > end:
            break
        yield chance.sample(names, len(names))  # nobody always comes after the same one


def interleave(steps: Mapping[str, Step], prepare: Step, seconds: float) -> dict[str, list[float]]:
    """Time the steps one by one in turn, in another order each round, each after ``prepare``."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 2:  # the first creates state
        prepare()
        steps[name]()
    gc.disable()
    try:
        for order in orders(names, seconds):
            for name in order:
                prepare()
                begin = perf_counter()
                steps[name]()
                times[name].append(perf_counter() - begin)
    finally:
        gc.enable()
    return times


def wrong_variants(
    rule: Rule,
    dtype: torch.dtype,
    among: Collection[str] = ("foreach", "fused", "ours"),
    gpu: Gpu | None = None,
) -> list[str]:
    """Variants whose first steps end, for most values, elsewhere than those of torch's default.

    What does not do the work has no place among the fastest: torch 2.13's fused SGD leaves most of
    a 16-bit parameter as it was (pytorch/pytorch issue 191763).

    Args:
        rule: with its settings.
        dtype: of parameters and gradients.
        among: the variants that are looked at, as far as the rule has them.
        gpu: where there is one, the steps are taken there.
    """
    start = torch.linspace(-1.0, 1.0, 99, dtype=torch.float64).to(dtype)
    if gpu is not None:
        start = start.to(gpu.device)
    plain, backend = (_ON_CPU, "auto") if gpu is None else (_ON_GPU, gpu.backend)

    def after_steps(variant: str) -> Tensor:
        param = start.clone().requires_grad_()
        own = ours(rule, [param], lr=0.5, backend=backend)
        steps = torch_steps(rule, [param], lr=0.5, plain=plain)
        steps["ours"] = own.step
        if variant == "ours_graph" and gpu is not None:
            param.grad = start + 0.25
            own.step()
            replay = gpu.capture(own.step, warm_up=0)
            for shift in (0.5, 0.75):
                param.grad.copy_(start + shift)
                replay()
            return param.detach().double()
        for shift in (0.25, 0.5, 0.75):
            param.grad = start + shift
            steps[variant]()
        return param.detach().double()

    expected = after_steps("default")
    tolerance = 16 * torch.finfo(dtype).eps
    wrong = []
    for variant in among:
        known = variant != "fused" or "fused" in inspect.signature(rule.optimizer).parameters
        if known:
            # Most, since where a gradient is next to nothing rounding in 16 bits decides it all.
            off = ~torch.isclose(after_steps(variant), expected, rtol=0.0, atol=tolerance)
            if 2 * int(off.sum()) > off.numel():
                wrong.append(variant)
    return wrong


def bytes_per_element(rule: Rule, dtype: torch.dtype) -> int:
    """What a step must move: parameter and state read and written, gradient read."""
    group = rule.optimizer([torch.zeros(1)], **rule.settings).param_groups[0]
    slots = len(fused_rules.RULES[rule.optimizer].slots(group))
    return (3 + 2 * slots) * dtype.itemsize


def measure_cell(
    rule: str,
    workload: str,
    dtype: str,
    tensors: Tensors,
    seconds: float,
    limit: Limit,
    compiled: bool = False,
) -> Row:
    """One row of the results.

    Where the caches cannot help, the memory's limit is measured in the same rounds: other tenants
    of a shared machine change it by half within minutes.
    """
    own = ours(RULES[rule], tensors.params)
    steps: dict[str, Step] = {**torch_steps(RULES[rule], tensors.params, compiled)}
    steps["ours"] = own.step
    _leave_out_failing(steps, ["compile"], tensors, f"{rule}/{workload}/{dtype}")
    moved = tensors.size * bytes_per_element(RULES[rule], DTYPES[dtype])
    from_memory = moved >= _CACHES_FULL * last_level_cache()
    probes = limit.operations if from_memory else {}
    times = interleave({**steps, **probes}, tensors.move_gradients, seconds)
    median = {name: float(np.median(values)) for name, values in times.items()}
    wrong = wrong_variants(RULES[rule], DTYPES[dtype])
    best = min(median[name] for name in steps if name not in ("ours", *wrong))
    gbps = max(limit.gbps(median).values()) if from_memory else None
    return {
        **_described(rule, workload, dtype, tensors, own),
        "rounds": len(times["ours"]),
        "times": {
            name: {
                "median_s": median[name],
                "p10_s": float(np.percentile(times[name], 10)),
                "p90_s": float(np.percentile(times[name], 90)),
            }
            for name in steps
        },
        "wrong": wrong,
        "ratio_vs_best_torch": best / median["ours"],
        "ratio_vs_default_torch": median["default"] / median["ours"],
        "limit_gbps": gbps,
        "fraction_of_limit": gbps and moved / median["ours"] / 1e9 / gbps,
    }


def _described(
    rule: str, workload: str, dtype: str, tensors: Tensors, own: CyclicalOptimizer[Any]
) -> Row:
    """What a row is about."""
    return {
        "rule": rule,
        "workload": workload,
        "dtype": dtype,
        "tensors": len(tensors.params),
        "params": tensors.size,
        "bytes": tensors.size * bytes_per_element(RULES[rule], DTYPES[dtype]),
        "backend": own.explain().partition(":")[0],
    }


def _leave_out_failing(
    steps: dict[str, Step], names: Iterable[str], tensors: Tensors, cell: str
) -> None:
    """Drop those of torch's that cannot take a first step: there is no kernel, or no compiler."""
    if "compile" in steps:
        torch.compiler.reset()  # what other cells compiled counts against a limit
    for name in names:
        if name not in steps:
            continue
        tensors.move_gradients()
        try:
            steps[name]()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # many kinds; the other variants are still worth measuring
            del steps[name]
            title = "torch.compile" if name == "compile" else f"torch's {name}"
            print(f"{title} of {cell}: {error}", file=sys.stderr)


# ---- on a GPU


def graphs(gpu: Gpu, rule: Rule, tensors: Tensors, fused: bool, cell: str) -> dict[str, Step]:
    """The step as a graph: ours, and torch's fused one, or its foreach one where there is no other.

    Torch's only where it can be captured at all, which is said by ``capturable``: its rate is a
    tensor then, which its ``CyclicLR`` fills after each replay. Each has an optimizer of its own.
    """
    captured: dict[str, Step] = {}

    def theirs(flag: str, grads: list[Tensor | None]) -> Step:
        rate = torch.tensor(_LR, device=gpu.device)
        flags = {"lr": rate, flag: True, "capturable": True, **rule.settings}
        optimizer = rule.optimizer(tensors.params, **flags)
        return _scheduled(optimizer, _LR, lambda step: gpu.capture(step, grads))

    makers: dict[str, Callable[[list[Tensor | None]], Step]] = {
        "ours_graph": lambda grads: gpu.capture(
            ours(rule, tensors.params, backend=gpu.backend).step, grads
        )
    }
    if "capturable" in inspect.signature(rule.optimizer).parameters:
        flag = "fused" if fused else "foreach"
        makers[f"{flag}_graph"] = lambda grads: theirs(flag, grads)
    for name, make in makers.items():
        tensors.move_gradients()
        try:
            captured[name] = make([param.grad for param in tensors.params])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the eager steps are still worth measuring
            print(f"{name} of {cell}: {error}", file=sys.stderr)
    return captured


def measure_cell_on_gpu(
    gpu: Gpu,
    rule: str,
    workload: str,
    dtype: str,
    tensors: Tensors,
    seconds: float,
    limit: Limit,
    compiled: bool = False,
    backward: bool = False,
) -> Row:
    """One row of the results; its ratios and shares are of the time on the device.

    What the caches could hold, for the better part, has no share: it may not come from the memory,
    and such a step takes no longer than its launches do. ``waited`` is the share of the rounds in
    which the device may have waited for the host, so that the host's time counts in the device's.
    """
    kind, cell = RULES[rule], f"{rule}/{workload}/{dtype}"
    own = ours(kind, tensors.params, backend=gpu.backend)
    steps = torch_steps(kind, tensors.params, compiled, plain=_ON_GPU)
    _leave_out_failing(steps, ["fused", "compile"], tensors, cell)
    rivals = list(steps)
    steps["ours"] = own.step
    steps.update(graphs(gpu, kind, tensors, "fused" in rivals, cell))
    moved = tensors.size * bytes_per_element(kind, DTYPES[dtype])
    from_memory = moved >= _CACHES_FULL * gpu.cache()
    timed = {**steps, **(limit.operations if from_memory else {})}
    busy = limit.operations["in_place"]
    watch = Stopwatch(gpu, busy, tensors.move_gradients, again=not backward)
    times = watch.interleave(timed, orders(list(timed), seconds))
    device = {name: float(np.median(times[name].device)) for name in timed}
    host = {name: float(np.median(times[name].host)) for name in steps}
    checked = [name for name in steps if name in ("forloop", "fused", "ours", "ours_graph")]
    wrong = wrong_variants(kind, DTYPES[dtype], checked, gpu)
    right = [name for name in rivals if name not in wrong]
    gbps = max(limit.gbps(device).values()) if from_memory else None
    graph = None if "ours_graph" in wrong else device.get("ours_graph")
    return {
        **_described(rule, workload, dtype, tensors, own),
        "rounds": len(times["ours"].device),
        "times": {
            name: {
                "device_median_s": device[name],
                "device_p10_s": float(np.percentile(times[name].device, 10)),
                "device_p90_s": float(np.percentile(times[name].device, 90)),
                "host_median_s": host[name],
                "waited": float(np.mean(times[name].waited)),
            }
            for name in steps
        },
        "wrong": wrong,
        "device_median_s": device["ours"],
        "host_median_s": host["ours"],
        "graph_median_s": graph,
        "ratio_vs_best_torch": min(device[name] for name in right) / device["ours"],
        "ratio_vs_default_torch": device["default"] / device["ours"],
        "host_ratio_vs_best_torch": min(host[name] for name in right) / host["ours"],
        "host_ratio_vs_default_torch": host["default"] / host["ours"],
        "graph_ratio_vs_best_torch": graph and min(device[name] for name in right) / graph,
        "limit_gbps": gbps,
        "fraction_of_limit": gbps and moved / device["ours"] / 1e9 / gbps,
        "graph_fraction_of_limit": graph and gbps and moved / graph / 1e9 / gbps,
    }


# ---- beside the cells


class _Noop(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": _LR})

    def step(self, closure: Any = None) -> Any:
        """Nothing: what is left is the profiling wrapper and the hooks of torch's base class."""


def measure_overhead(seconds: float, *, backward: bool = False) -> dict[str, float]:
    """Of Adam: of a step at all, beside one that does nothing, and of each further tensor."""
    median: dict[str, float] = {}
    for count, size in ((1, 1), (100, 16), (1000, 16)):
        # Each by itself: a thousand tensors would leave cold caches to the step of one.
        tensors = Tensors([(size,)] * count, torch.float32, backward=backward)
        steps: dict[str, Step] = {str(count): ours(RULES["adam"], tensors.params).step}
        if count == 1:
            steps["noop"] = _Noop(tensors.params).step
        for name, times in interleave(steps, tensors.move_gradients, seconds).items():
            median[name] = float(np.median(times))
    return {
        "noop_s": median["noop"],
        "one_tensor_s": median["1"],
        "per_tensor_s": (median["1000"] - median["100"]) / 900,
    }


def measure_in_backward(seconds: float, count: int = 1000) -> dict[str, float]:
    """Per optimizer, where each of so many parameters has an Adam of its own, as those have that
    step while backward runs: what wrapping it costs, its first step, and a later one beside one
    that does nothing.
    """
    tensors = Tensors([(16,)] * count, torch.float32, backward=False)
    tensors.move_gradients()
    inner = [torch.optim.Adam([p], lr=_LR) for p in tensors.params]
    start = perf_counter()
    wrapped = [CyclicalOptimizer(optimizer) for optimizer in inner]
    built = perf_counter()
    for optimizer in wrapped:
        optimizer.step()
    first = perf_counter()
    idle = [_Noop([p]) for p in tensors.params]

    def all_of(optimizers: Iterable[torch.optim.Optimizer]) -> Step:
        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        return step

    steps = {"ours": all_of(wrapped), "noop": all_of(idle)}
    times = interleave(steps, tensors.move_gradients, seconds)
    return {
        "wrap_s": (built - start) / count,
        "first_s": (first - built) / count,
        "step_s": float(np.median(times["ours"])) / count,
        "noop_s": float(np.median(times["noop"])) / count,
    }


def measure_first_step() -> dict[str, Any]:
    """Seconds of an Adam's first step over the MLP, each in a process of its own.

    ``compiled_s`` with an empty cache, so with the compilation; ``cached_s`` with what that left
    behind; ``torch_s`` by the wrapped optimizer's own step.
    """
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, backend in (
            ("compiled_s", "native"),
            ("cached_s", "native"),
            ("torch_s", "torch"),
        ):
            settings = {"CLR_OPTIM_CACHE_DIR": cache, "CLR_OPTIM_BACKEND": backend}
            taken = _in_process("probe_first_step", environment=settings)
            if "skipped" in taken:
                return taken
            if taken["backend"] != backend:
                return {"skipped": "the native kernels do not serve here"}
            result[name] = taken["seconds"]
    return result


def probe_first_step() -> dict[str, Any]:
    """The first step of this process."""
    tensors = Tensors(WORKLOADS["mlp"], torch.float32)
    tensors.move_gradients()
    optimizer = ours(RULES["adam"], tensors.params)
    begin = perf_counter()
    optimizer.step()
    seconds = perf_counter() - begin
    return {"seconds": seconds, "backend": optimizer.explain().partition(":")[0]}


def measure_memory(workload: str) -> dict[str, Any]:
    """Bytes that an Adam step takes beyond parameters, gradients and state, at its peak.

    Of the third step, in a process of its own: the growth of the resident memory's high-water
    mark, which Linux resets on demand. Accurate to about a megabyte.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {"skipped": "needs /proc/self/clear_refs, which is Linux's"}
    return _in_process("probe_memory", workload)


def probe_memory(workload: str) -> dict[str, Any]:
    """The measurement, which would count whatever else a process holds and frees."""
    tensors = Tensors(WORKLOADS[workload], torch.float32)
    adam = RULES["adam"]
    steps: dict[str, Step] = {**torch_steps(adam, tensors.params)}
    steps["ours"] = ours(adam, tensors.params).step
    result: dict[str, Any] = {"workload": workload, "rule": "adam", "dtype": "float32"}
    for name in list(steps):
        step = steps.pop(name)  # and its state goes when the next one comes
        for _ in range(2):
            tensors.move_gradients()
            step()
        tensors.move_gradients()
        gc.collect()
        with suppress(AttributeError):  # freed memory that glibc kept would hide what is taken
            ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            return {"skipped": f"/proc/self/clear_refs cannot be written ({error.strerror})"}
        step()
        result[f"{name}_bytes"] = max(0, _resident("VmHWM") - before)
    return result


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _in_process(
    function: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a function of this module returns in a new Python with as many threads."""
    code = (
        f"import json, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        f"from clr_optim.bench import throughput\n"
        f"print(json.dumps(throughput.{function}(*{arguments!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"skipped": f"{function} exited with {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    add = parser.add_argument
    add("--quick", action="store_true", help=f"under a minute: float32, {', '.join(_QUICK)}")
    add("--rules", type=_names(RULES), metavar="A,B", help=", ".join(RULES))
    add("--workloads", type=_names(WORKLOADS), metavar="A,B", help=", ".join(WORKLOADS))
    add(
        "--dtypes",
        type=_names(DTYPES),
        metavar="A,B",
        help=f"float32,bfloat16 unless told otherwise; of {', '.join(DTYPES)}",
    )
    add("--filter", default="", metavar="TEXT", help="only cells whose rule/workload/dtype has it")
    add(
        "--seconds-per-cell",
        type=_seconds,
        metavar="S",
        help="5, or 1 on a GPU, or 0.3 with --quick; there are 5 rounds at least",
    )
    add("--at-most", type=_seconds, metavar="S", help="begin no cell after so many seconds")
    add(
        "--cells-only",
        action="store_true",
        help="no overhead, first step and peak memory, of which on a GPU there are none",
    )
    add("--compile", action="store_true", help="torch.compile too, which takes minutes")
    add(
        "--gradients",
        choices=("sets", "backward"),
        default="sets",
        help="two sets in turn, or new ones from a backward pass before each step, as in training",
    )
    add("--threads", type=_threads, metavar="N", help=f"({torch.get_num_threads()})")
    add(
        "--device",
        type=_device,
        default="cpu",
        help=f"cpu, or cuda, which is ROCm's name too: {', '.join(_WORKLOADS_ON_GPU)}",
    )
    add("--json", metavar="FILE", help="write the results")
    add("--plot", metavar="FILE", help="draw them")


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return [name for name in known if name in names]

    return convert


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0, got {text!r}")


def _threads(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 4096, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        hint = "; CUDA_VISIBLE_DEVICES chooses among GPUs" if text.startswith("cuda:") else ""
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}{hint}")
    if text == "cuda" and (problem := why_no_gpu()):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return text


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for, print it, and return what ``--json`` writes.

    Raises:
        argparse.ArgumentError: the options leave nothing to measure.
        ImportError, OSError: a file cannot be written, noticed before anything is measured.
    """
    cells = [
        (workload, dtype, rule)
        for workload in _workloads(args)
        for dtype in args.dtypes or (["float32"] if args.quick else ["float32", "bfloat16"])
        for rule in args.rules or RULES
        if args.filter in f"{rule}/{workload}/{dtype}"
    ]
    if not cells:
        raise argparse.ArgumentError(None, f"--filter {args.filter}: no cell has it in its name")
    if args.json:
        Path(args.json).open("a").close()
    if args.plot:
        plotting.check_picture(args.plot)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        results = _measure(cells, args)
    finally:
        torch.set_num_threads(threads)
    print(table(results))
    _write(args.json, results)
    if args.plot and results["rows"]:
        plotting.save(plotting.plot_throughput(results["rows"]), args.plot)
    return results


def _workloads(args: argparse.Namespace) -> Collection[str]:
    if args.device == "cuda":
        return args.workloads or (_QUICK if args.quick else _WORKLOADS_ON_GPU)
    for name in args.workloads or ():
        if name in ONLY_ON_GPU:
            words = f"--workloads {name}: too large for a CPU, only with --device cuda"
            raise argparse.ArgumentError(None, words)
    every = [name for name in WORKLOADS if name not in ONLY_ON_GPU]
    return args.workloads or (_QUICK if args.quick else every)


def _write(path: str | None, results: Mapping[str, Any]) -> None:
    """What was there stays until the new is whole."""
    if path:
        beside = Path(f"{path}.new")
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)


def _measure(cells: Sequence[Cell], args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda":
        return _measure_on_gpu(Gpu(), cells, args)
    seconds = args.seconds_per_cell
    if seconds is None:
        seconds = 0.3 if args.quick else 5.0
    backward = args.gradients == "backward"
    limit = Limit()
    peak = limit.best()
    rows: list[Row] = []
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "gradients": args.gradients,
        "limit_gbps": max(peak.values()),
        "limit": peak,
        "rows": rows,
        "not_begun": len(cells),
    }
    begun = _until(args.at_most, _progress(cells))
    for (workload, dtype), members in groupby(begun, key=lambda cell: cell[:2]):
        tensors = Tensors(WORKLOADS[workload], DTYPES[dtype], backward=backward)
        for *_, rule in members:
            rows.append(measure_cell(rule, workload, dtype, tensors, seconds, limit, args.compile))
            gc.collect()  # optimizers and schedulers hold each other, and gigabytes of state
            results["not_begun"] = len(cells) - len(rows)
            _write(args.json, results)
        del tensors
    # The machine may have been busy the first time.
    peak = {name: max(rate, peak[name]) for name, rate in limit.best().items()}
    results.update(limit_gbps=max(peak.values()), limit=peak)
    if not args.cells_only:
        results["overhead"] = measure_overhead(seconds, backward=backward)
        results["in_backward"] = measure_in_backward(seconds)
        results["first_step"] = measure_first_step()
        results["memory"] = measure_memory("resnet50" if args.quick else "gpt2")
    return results


def _measure_on_gpu(gpu: Gpu, cells: Sequence[Cell], args: argparse.Namespace) -> dict[str, Any]:
    """The cells, each written when it is done; one that fails is left out, and said to be."""
    seconds = args.seconds_per_cell
    if seconds is None:
        seconds = 0.3 if args.quick else 1.0
    backward = args.gradients == "backward"
    limit = Limit(_FLOATS_ON_GPU, gpu.device)
    clock = Stopwatch(gpu, limit.operations["in_place"], lambda: None)
    peak = limit.best(timed=clock.by_device)
    rows: list[Row] = []
    left_out: list[dict[str, str]] = []
    results = {
        "machine": {**describe_machine(), **gpu.describe()},
        "device": args.device,
        "gradients": args.gradients,
        "limit_gbps": max(peak.values()),
        "limit": peak,
        "rows": rows,
        "left_out": left_out,
        "not_begun": len(cells),
    }
    begun = _until(args.at_most, _progress(cells))
    for (workload, dtype), members in groupby(begun, key=lambda cell: cell[:2]):
        tensors = None
        for *_, rule in members:
            try:
                if tensors is None:
                    tensors = Tensors(
                        WORKLOADS[workload], DTYPES[dtype], backward=backward, device=gpu.device
                    )
                rows.append(
                    measure_cell_on_gpu(
                        gpu, rule, workload, dtype, tensors, seconds, limit, args.compile, backward
                    )
                )
            except Exception as error:  # of any kind: the other cells are still worth measuring
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                left_out.append({"cell": f"{rule}/{workload}/{dtype}", "why": why})
            gc.collect()  # optimizers and schedulers hold each other, and gigabytes of state
            results["not_begun"] = len(cells) - len(rows) - len(left_out)
            _write(args.json, results)
    return results


def _until(seconds: float | None, cells: Iterable[Cell]) -> Iterator[Cell]:
    """The cells, until so much time has gone by."""
    end = math.inf if seconds is None else perf_counter() + seconds
    for cell in cells:
        if perf_counter() > end:
            return
        yield cell


def _progress(cells: Sequence[Cell]) -> Iterable[Cell]:
    """The cells, with a bar on a terminal if tqdm is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        return cells
    bar: Iterable[Cell] = tqdm(cells, unit="cell", leave=False, disable=None)
    return bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark by itself, as ``python -m clr_optim.bench``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m clr_optim.bench", description=DESCRIPTION)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        results = run(args)
    except (argparse.ArgumentError, ImportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return exit_code(results)


def exit_code(results: Mapping[str, Any]) -> int:
    """1 if cells failed, which then are in the results' ``left_out``, else 0."""
    return 1 if results.get("left_out") else 0
