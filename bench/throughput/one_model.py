"""Measure the step for the parameters of the user's model: time, memory, whole iterations."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clr_optim.bench.gpu import Gpu, why_no_gpu
from clr_optim.bench.machine import Limit, describe_machine
from clr_optim.bench.throughput.cells import Row, measure_cell, measure_cell_on_gpu
from clr_optim.bench.throughput.iterations import measure_iterations
from clr_optim.bench.throughput.options import seconds_per_cell
from clr_optim.bench.throughput.processes import measure_model_memory
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step
from clr_optim.bench.throughput.variants import (
    ON_GPU,
    drop_failing_steps,
    our_optimizer,
    torch_steps,
)
from clr_optim.bench.user_model import UserModel, load_model
from clr_optim.bench.workloads import RULES
from clr_optim.options import OptionError
from clr_optim.range_test.forward import Forward

__all__ = ["measure_model"]

#: The length of the arrays that keep a GPU busy ahead of a step: 0.75 GiB in all.
_FLOATS_ON_GPU = 2**26


def measure_model(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every variant of the step for the parameters of ``--model``.

    Returns:
        The results, with a row per rule: times as for a workload, ``memory`` of a step and
        ``state_bytes``; and ``iteration``, if the user's function returns loss and loader.

    Raises:
        OptionError: naming what is wrong with the function, or with the device.
    """
    given = load_model(args.model, args.seed)
    device = given.params[0].device
    gpu = Gpu() if device.type == "cuda" else None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--model {args.model}: the parameters must be on cpu or cuda")
    if gpu and (problem := why_no_gpu()):
        raise OptionError(f"--model {args.model}: {problem}")
    seconds = seconds_per_cell(args)
    tensors = Tensors.of(given.params, backward=args.gradients == "backward", seed=args.seed)
    results: dict[str, Any] = {
        "machine": {**describe_machine(), **(gpu.describe() if gpu else {})},
        "model": args.model,
        "summary": given.summary,
        "device": device.type,
        "rows": [],
    }
    for rule in args.rules or ["adamw"]:
        iteration = None
        if given.loader is not None and given.model is not None:
            # First: the steps after this one change the parameters by invented gradients.
            iteration = measure_iterations(
                given.model, *_batches_and_loss(given), rule, seconds, args.compile
            )
        row = _measure_rule(rule, given, tensors, gpu, seconds, args)
        gc.collect()
        row["memory"] = (
            _memory_on_gpu(rule, tensors)
            if gpu
            else measure_model_memory(args.model, rule, args.seed)
        )
        results["rows"].append({**row, "iteration": iteration})
    return results


def _measure_rule(
    rule: str,
    given: UserModel,
    tensors: Tensors,
    gpu: Gpu | None,
    seconds: float,
    args: argparse.Namespace,
) -> Row:
    dtypes = ",".join(str(dtype).removeprefix("torch.") for dtype in tensors.sizes)
    cell = (rule, given.name, dtypes, tensors, seconds)
    if gpu is None:
        row = measure_cell(*cell, limit=None, compiled=args.compile, seed=args.seed)
    else:
        limit = Limit(_FLOATS_ON_GPU, gpu.device)
        backward = args.gradients == "backward"
        row = measure_cell_on_gpu(gpu, *cell, limit, args.compile, backward, args.seed)
    own = our_optimizer(RULES[rule], tensors.params)
    tensors.move_gradients()
    own.step()
    values = [v for state in own.state.values() for v in state.values() if isinstance(v, Tensor)]
    row["state_bytes"] = sum(value.numel() * value.element_size() for value in values)
    return row


def _memory_on_gpu(rule: str, tensors: Tensors) -> dict[str, Any]:
    """Measure the memory that a step takes beyond parameters, gradients and state, in bytes."""
    kind = RULES[rule]
    steps: dict[str, Step] = {**torch_steps(kind, tensors.params, plain=ON_GPU)}
    steps["ours"] = our_optimizer(kind, tensors.params).step
    drop_failing_steps(steps, ["fused"], tensors.move_gradients, rule)
    taken: dict[str, Any] = {}
    for name in list(steps):
        step = steps.pop(name)  # the next variant frees the state of this one
        for _ in range(2):
            tensors.move_gradients()
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        taken[f"{name}_bytes"] = torch.cuda.max_memory_allocated() - before
    return taken


def _batches_and_loss(given: UserModel) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
    """Return a function for the next batch, and one for its loss, as in the range test."""
    assert given.model is not None
    device = given.params[0].device
    forward = Forward(given.model, given.loss_fn, None, None, False, device)
    return partial(next, _endless(given)), forward.loss


def _endless(given: UserModel) -> Iterator[Any]:
    while True:
        is_empty = True
        for batch in given.loader:
            is_empty = False
            yield batch
        if is_empty:
            raise OptionError(f"--model {given.name}: the loader has no batches, or only once")
