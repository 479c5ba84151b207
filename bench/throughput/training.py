"""Measure the step in training: between a small model's backward pass and ``zero_grad``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from clr_optim.bench.machine import describe_machine
from clr_optim.bench.throughput.cells import Row
from clr_optim.bench.throughput.options import seconds_per_cell
from clr_optim.bench.throughput.overhead import Noop, measure_calls, measure_in_backward
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step, orders, spread
from clr_optim.bench.throughput.variants import (
    our_optimizer,
    torch_optimizers,
    with_scheduler,
    wrong_variants,
)
from clr_optim.bench.workloads import IN_TRAINING, RULES, WORKLOADS

__all__ = ["Passes", "Variant", "make_passes", "measure_training", "time_in_turns"]

_BATCH = 64
#: The iterations of a turn. The first ones are not counted: the turns of the other variants
#: emptied the caches, and the time of a step falls for some ten iterations.
_TURN, _UNCOUNTED = 25, 10
#: A round of 1,000 tensors takes seconds.
_LEAST_ROUNDS = 2


class Passes(NamedTuple):
    """Parameters, a function that draws a batch, and forward and backward passes over the batch."""

    params: list[Tensor]
    fetch: Step
    run: Step


class Variant(NamedTuple):
    """A way to take a step, and its optimizer's ``zero_grad``."""

    step: Step
    zero_grad: Step


def measure_training(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the step of each rule in the training of each chosen model.

    Returns:
        The results, with a row per model and rule under ``training``; without ``--cells-only`` also
        the time of one call under ``calls``.
    """
    seconds = seconds_per_cell(args)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "rows": [],
        "training": [
            _measure_cell(name, rule, seconds, args.seed)
            for name in args.training
            for rule in args.rules or RULES
        ],
    }
    if not args.cells_only:
        one_of_many = measure_in_backward(seconds)
        results["calls"] = {
            **measure_calls(seconds),
            "one_of_1000_s": one_of_many["step_s"],
            "noop_one_of_1000_s": one_of_many["noop_s"],
        }
    return results


def make_passes(name: str, seed: int = 0) -> Passes:
    """Make a model's parameters and passes; 1,000 tensors get gradients from autograd alone."""
    widths = IN_TRAINING[name]
    if not widths:
        tensors = Tensors(WORKLOADS[name], torch.float32, backward=True, seed=seed)
        return Passes(tensors.params, lambda: None, tensors.move_gradients)
    torch.manual_seed(seed)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    inputs, labels = torch.empty(_BATCH, widths[0]), torch.empty(_BATCH, dtype=torch.int64)

    def fetch() -> None:
        # The model cannot learn these labels. If the gradients vanished, denormal numbers would
        # slow the steps.
        inputs.normal_()
        labels.random_(widths[-1])

    def run() -> None:
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    return Passes(list(model.parameters()), fetch, run)


def _measure_cell(name: str, rule: str, seconds: float, seed: int) -> Row:
    """Return one row: the seconds of step and whole iteration of each variant.

    ``noop`` stands apart: an optimizer without a scheduler whose step does nothing.
    """
    kind, passes = RULES[rule], make_passes(name, seed)
    own, noop = our_optimizer(kind, passes.params), Noop(passes.params)
    variants = {
        variant: Variant(with_scheduler(optimizer), optimizer.zero_grad)
        for variant, optimizer in torch_optimizers(kind, passes.params).items()
    }
    variants["ours"] = Variant(own.step, own.zero_grad)
    variants["noop"] = Variant(noop.step, noop.zero_grad)
    steps, iterations = time_in_turns(passes, variants, seconds, seed)
    times = {
        variant: {**spread(steps[variant]), "iteration_s": spread(iterations[variant])["median_s"]}
        for variant in variants
    }
    return {
        "rule": rule,
        "workload": name,
        "tensors": len(passes.params),
        "backend": own.explain().partition(":")[0],
        "rounds": len(steps["ours"]) // (_TURN - _UNCOUNTED),
        "noop": times.pop("noop"),
        "times": times,
        "wrong": wrong_variants(kind, torch.float32),
    }


def time_in_turns(
    passes: Passes,
    variants: Mapping[str, Variant],
    seconds: float,
    seed: int = 0,
    clock: Callable[[], float] = perf_counter,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Train the model by each variant in turns of a few iterations.

    A user's loop calls one optimizer in every iteration, so a variant keeps its turn for a few. Two
    readings of the clock enclose the step, and two the iteration. Drawing a batch is not timed.

    Returns:
        The seconds of each step and of each whole iteration, by variant.
    """
    steps: dict[str, list[float]] = {name: [] for name in variants}
    iterations: dict[str, list[float]] = {name: [] for name in variants}
    for order in orders(list(variants), seconds, seed, _LEAST_ROUNDS):
        for name in order:
            step, zero_grad = variants[name]
            zero_grad()
            for number in range(_TURN):
                passes.fetch()
                begin = clock()
                passes.run()
                before = clock()
                step()
                after = clock()
                zero_grad()
                end = clock()
                if number >= _UNCOUNTED:
                    steps[name].append(after - before)
                    iterations[name].append(end - begin)
    return steps, iterations
