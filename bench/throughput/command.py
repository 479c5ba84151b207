"""Run ``clr-optim bench``: measure the chosen cells, print, write and draw the results."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from time import perf_counter
from typing import Any

import torch

from clr_optim import plotting
from clr_optim.bench.backward_report import backward_table
from clr_optim.bench.features_report import features_table
from clr_optim.bench.gpu import Gpu, Stopwatch
from clr_optim.bench.machine import Limit, describe_machine
from clr_optim.bench.masters_report import masters_table
from clr_optim.bench.model_report import model_table
from clr_optim.bench.models import MODELS
from clr_optim.bench.report import table
from clr_optim.bench.throughput.cells import Row, measure_cell, measure_cell_on_gpu
from clr_optim.bench.throughput.features import measure_features
from clr_optim.bench.throughput.iterations import measure_workload_iterations
from clr_optim.bench.throughput.masters import measure_masters
from clr_optim.bench.throughput.one_model import measure_model
from clr_optim.bench.throughput.options import (
    EXAMPLES,
    Cell,
    add_arguments,
    chosen_cells,
    chosen_mode,
    seconds_per_cell,
)
from clr_optim.bench.throughput.overhead import measure_in_backward, measure_overhead
from clr_optim.bench.throughput.processes import measure_first_step, measure_memory
from clr_optim.bench.throughput.step_in_backward import measure_step_in_backward
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.training import measure_training
from clr_optim.bench.training_report import training_table
from clr_optim.bench.workloads import DTYPES, WORKLOADS
from clr_optim.options import (
    OptionError,
    Parser,
    check_json,
    text_beside_json,
    write_json,
)

__all__ = ["DESCRIPTION", "EXAMPLES", "exit_code", "main", "run"]

DESCRIPTION = (
    "Times the step of each update rule over the shapes of well-known models: ours, and torch's "
    "default, foreach and fused steps, each with its CyclicLR. Prints medians, ratios and the "
    "share of the memory's bandwidth. A whole run takes about half an hour. With --device cuda it "
    "measures a GPU: device and host apart, and captured graphs too. With --model it measures your "
    "parameters in a minute: time and memory of each variant, and the time that ours saves. With "
    "--training it measures the step between the passes of small models, and with --features what "
    "clipping, skipping and averages add. With --masters it measures float32 masters of bfloat16, "
    "and with --step-in-backward whole iterations whose updates come in the backward pass."
)

#: The length of the arrays that measure a GPU's bandwidth: 3 GiB in all.
_FLOATS_ON_GPU = 2**28


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen cells, print the table, write the files.

    Returns:
        The results, as ``--json`` writes them.

    Raises:
        argparse.ArgumentError: if the options choose no cell.
        ImportError, OptionError, OSError: if a file cannot be written, or a model not be read,
            before anything is measured.
    """
    mode = chosen_mode(args)
    args.device = args.device or "cpu"
    measure, text = _measurement(mode, args)
    check_json(args.json)
    if args.plot:
        plotting.check_picture(args.plot)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or (1 if args.training else threads))
    try:
        results = measure(args)
    finally:
        torch.set_num_threads(threads)
    print(text(results))
    _write(args.json, results)
    if args.plot and results["rows"]:
        plotting.save(plotting.plot_throughput(results["rows"]), args.plot)
    return results


def _measurement(
    mode: str | None, args: argparse.Namespace
) -> tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[Mapping[str, Any]], str]]:
    """Return the function that measures, and the function that puts its results into words."""
    if mode is None:
        return partial(_measure, chosen_cells(args)), table
    return {
        "model": (measure_model, model_table),
        "step_in_backward": (measure_step_in_backward, backward_table),
        "training": (measure_training, training_table),
        "features": (measure_features, features_table),
        "masters": (measure_masters, masters_table),
    }[mode]


def _write(path: str | None, results: Mapping[str, Any]) -> None:
    """Write the results into a file; standard output gets only the last ones."""
    if path != "-":
        write_json(path, results)


def _measure(cells: Sequence[Cell], args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda":
        return _measure_on_gpu(Gpu(), cells, args)
    seconds = seconds_per_cell(args)
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
        tensors = Tensors(WORKLOADS[workload], DTYPES[dtype], backward=backward, seed=args.seed)
        for *_, rule in members:
            rows.append(
                measure_cell(
                    rule, workload, dtype, tensors, seconds, limit, args.compile, args.seed
                )
            )
            gc.collect()  # optimizers and schedulers form cycles that hold gigabytes of state
            results["not_begun"] = len(cells) - len(rows)
            _write(args.json, results)
        del tensors
    # Other work may have slowed the first measurement.
    peak = {name: max(rate, peak[name]) for name, rate in limit.best().items()}
    results.update(limit_gbps=max(peak.values()), limit=peak)
    if args.iterations:
        _add_iterations(results, args, seconds)
    if not args.cells_only:
        results["overhead"] = measure_overhead(seconds, backward=backward)
        results["in_backward"] = measure_in_backward(seconds)
        results["first_step"] = measure_first_step()
        results["memory"] = measure_memory("resnet50" if args.quick else "gpt2")
    return results


def _measure_on_gpu(gpu: Gpu, cells: Sequence[Cell], args: argparse.Namespace) -> dict[str, Any]:
    """Measure the cells and write each at once; list a cell that fails under ``left_out``."""
    seconds = seconds_per_cell(args, usual=1.0)
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
                        WORKLOADS[workload], DTYPES[dtype],
                        backward=backward, device=gpu.device, seed=args.seed,
                    )  # fmt: skip
                rows.append(
                    measure_cell_on_gpu(
                        gpu, rule, workload, dtype, tensors, seconds, limit, args.compile, backward,
                        args.seed,
                    )
                )  # fmt: skip
            except Exception as error:  # of any kind: the other cells are measured anyway
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                left_out.append({"cell": f"{rule}/{workload}/{dtype}", "why": why})
            gc.collect()  # optimizers and schedulers form cycles that hold gigabytes of state
            results["not_begun"] = len(cells) - len(rows) - len(left_out)
            _write(args.json, results)
    if args.iterations:
        _add_iterations(results, args, seconds)
    return results


def _add_iterations(results: dict[str, Any], args: argparse.Namespace, seconds: float) -> None:
    """Measure whole iterations of the workloads that have a model, and write each at once."""
    results["iterations"] = []
    for name in [name for name in args.workloads or MODELS if name in MODELS]:
        for rule in args.rules or ["adamw"]:
            results["iterations"].append(
                measure_workload_iterations(name, rule, seconds, device=args.device, seed=args.seed)
            )
            gc.collect()
            _write(args.json, results)


def _until(seconds: float | None, cells: Iterable[Cell]) -> Iterator[Cell]:
    """Yield the cells until the time is up."""
    end = math.inf if seconds is None else perf_counter() + seconds
    for cell in cells:
        if perf_counter() > end:
            return
        yield cell


def _progress(cells: Sequence[Cell]) -> Iterable[Cell]:
    """Return the cells, with a progress bar on a terminal if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return cells
    bar: Iterable[Cell] = tqdm(cells, unit="cell", leave=False, disable=None)
    return bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m clr_optim.bench``; return the exit code."""
    parser = Parser(prog="python -m clr_optim.bench", description=DESCRIPTION, epilog=EXAMPLES)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        with text_beside_json(args.json):
            results = run(args)
        if args.json == "-":
            write_json(args.json, results)
    except (argparse.ArgumentError, ImportError, OptionError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return exit_code(results)


def exit_code(results: Mapping[str, Any]) -> int:
    """Return 1 if a cell failed, else 0."""
    return 1 if results.get("left_out") else 0
