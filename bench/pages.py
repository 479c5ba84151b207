"""Tables of committed benchmark results, written between marks into README and docs pages.

A mark names the table and the results:

    <!-- table: adamw bench/results/cpu-2-threads.json -->
    <!-- end of table -->

``make tables`` renews every table. A test compares each table with the results that it names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from clr_optim.bench.backward_report import NAMES as IN_BACKWARD
from clr_optim.bench.backward_report import backward_cells
from clr_optim.bench.features_report import NAMES, features_cells
from clr_optim.bench.masters_report import NAMES as MASTERS
from clr_optim.bench.masters_report import masters_cells
from clr_optim.bench.report import (
    best_of_torch,
    is_on_gpu,
    short_labels,
    time_in_words,
    whole_iterations,
)
from clr_optim.bench.training_report import CALLS

__all__ = ["TABLES", "main", "renewed"]

_MARKED = re.compile(
    r"(<!-- table: (?P<name>\w+) (?P<path>\S+)(?: (?P<dtype>\w+))? -->\n)"
    r".*?(<!-- end of table -->)",
    re.DOTALL,
)

_CLOCKS = {
    "median_s": "",
    "device_median_s": ", on the device",
    "host_median_s": ", on the host",
    "iteration_s": ", whole iteration",
}

#: How pages name the workloads.
_WORKLOADS = {
    "mlp": "MLP, 6 tensors",
    "1000x256": "1,000 tensors of 256",
    "resnet50": "ResNet-50",
    "gpt2": "GPT-2, 124 M",
    "vit_b": "ViT-B",
    "one_33m": "one tensor of 33.5 M",
    "1b": "Llama 3.2 1B",
    "64-128-128-10": "MLP 64-128-128-10",
    "8-64-64-4": "MLP 8-64-64-4",
}
#: How pages name the models whose whole iterations are measured with updates in the backward pass.
_IN_BACKWARD = {
    "linear": "24 layers of 1024², batch 64",
    "linear_100m": "24 layers of 2048², batch 64",
    "gpt2": "GPT-2, 124 M",
}


def _adamw(rows: Sequence[Mapping[str, Any]], clock: str, on_gpu: bool) -> Iterator[str]:
    """Yield absolute times of AdamW, a line per workload; a slower cell is bold."""
    default = short_labels(on_gpu)["default"]
    heads = f"AdamW{_CLOCKS[clock]}", f"torch's default ({default})", "torch fused", "clr_optim"
    yield f"| {' | '.join(heads)} | times as fast |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        if row["rule"] == "adamw":
            times = row["times"]
            cells = [
                "wrong" if name in row["wrong"] else time_in_words(times[name][clock])
                for name in ("default", "fused", "ours")
            ]
            cells = [_WORKLOADS[row["workload"]], *cells, _gain(row, clock, on_gpu)]
            yield f"| {' | '.join(cells)} |"


def _rules(
    rows: Sequence[Mapping[str, Any]], clock: str, on_gpu: bool, default: bool = False
) -> Iterator[str]:
    """Yield our time and the gain over torch's best step, per rule and workload.

    With ``default`` a cell has the gain over torch's default too.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    names = " | ".join(_WORKLOADS[name] for name in workloads)
    yield f"| rule{_CLOCKS[clock]} | {names} |"
    yield "| --- " * (1 + len(workloads)) + "|"
    cells = {(row["rule"], row["workload"]): row for row in rows}
    for rule in dict.fromkeys(row["rule"] for row in rows):
        line = [
            f"{time_in_words(row['times']['ours'][clock])}, {_gain(row, clock, on_gpu)}"
            + (f", {_over(row, clock, 'default')} default" if default else "")
            if row
            else "–"
            for row in (cells.get((rule, workload)) for workload in workloads)
        ]
        yield f"| `{rule}` | {' | '.join(line)} |"


def _of_each_clock(
    lines: Callable[[Sequence[Mapping[str, Any]], str, bool], Iterator[str]],
) -> Callable[[Mapping[str, Any], str], str]:
    """Return a function that makes a table of a dtype's cells for each clock of the results."""

    def tables(results: Mapping[str, Any], dtype: str) -> str:
        rows = [row for row in results["rows"] if row["dtype"] == dtype]
        on_gpu = is_on_gpu(results)
        clocks = ("device_median_s", "host_median_s") if on_gpu else ("median_s",)
        return "\n\n".join("\n".join(lines(rows, clock, on_gpu)) for clock in clocks)

    return tables


def _iterations(results: Mapping[str, Any], dtype: str) -> str:
    """Return a table of whole iterations, a line per model; a slower one is bold."""
    named = short_labels(is_on_gpu(results))
    heads = "forward and backward", f"torch's default ({named['default']})", "torch fused"
    lines = [
        f"| whole iteration, batch | {' | '.join(heads)} | clr_optim | times as fast |",
        "| --- " * 6 + "|",
    ]
    for row in results["iterations"]:
        whole, best = whole_iterations(row)
        gain = whole[best] / whole["ours"]
        times = [row["forward_backward_s"], *(whole[name] for name in ("default", "fused", "ours"))]
        cells = " | ".join(map(time_in_words, times))
        model = f"{_WORKLOADS[row['workload']]}, {row['batch']}"
        lines.append(f"| {model} | {cells} | {_times_as_fast(gain)} {named[best]} |")
    return "\n".join(lines)


def _training(results: Mapping[str, Any], dtype: str) -> str:
    """Return a table of steps in training, and one of whole iterations, down to a no-op step."""
    rows, tables = results["training"], []
    for clock in ("median_s", "iteration_s"):
        idle: dict[str, list[float]] = {}
        for row in rows:
            idle.setdefault(row["workload"], []).append(row["noop"][clock])
        cells = " | ".join(time_in_words(median(times)) for times in idle.values())
        lines = [*_rules(rows, clock, on_gpu=False, default=True), f"| no-op step | {cells} |"]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _features(results: Mapping[str, Any], dtype: str) -> str:
    """Return a table of what features add to the step, and of the memory that they move."""
    heads = ["plain step", *NAMES.values(), "torch", "torch and AveragedModel"]
    lines = [
        f"| {_WORKLOADS[row['workload']]} | {' | '.join(features_cells(row))} |"
        for row in results["features"]
    ]
    rule = "| --- " * (len(heads) + 1) + "|"
    return "\n".join([f"| Adam | {' | '.join(heads)} |", rule, *lines])


def _masters(results: Mapping[str, Any], dtype: str) -> str:
    """Return a table of steps with float32 masters, and of the bytes that each variant needs."""
    heads = ["AdamW", "bfloat16 with", "step", "over `master_weights`", "bytes moved", "bytes kept"]
    lines = [
        f"| {_WORKLOADS[row['workload']]} | {words} | {' | '.join(masters_cells(row, name))} |"
        for row in results["masters"]
        for name, words in MASTERS.items()
    ]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *lines])


def _in_backward(results: Mapping[str, Any], dtype: str) -> str:
    """Return a table of whole iterations, with ordinary updates and with updates in backward."""
    heads = ["AdamW", "step", "iteration", "over clr_optim", "peak memory", "gradients"]
    lines = [
        f"| {_IN_BACKWARD[row['model']]} | {words} | {' | '.join(backward_cells(row, name))} "
        f"| {row['gradient_bytes'] / 2**20:,.0f} MiB |"
        for row in results["step_in_backward"]
        for name, words in IN_BACKWARD.items()
    ]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *lines])


def _calls(results: Mapping[str, Any], dtype: str) -> str:
    """Return a table of the times of single calls."""
    lines = [f"| {name} | {time_in_words(results['calls'][key])} |" for key, name in CALLS.items()]
    return "\n".join(["| one call | time |", "| --- | --- |", *lines])


TABLES: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "adamw": _of_each_clock(_adamw),
    "rules": _of_each_clock(_rules),
    "iterations": _iterations,
    "training": _training,
    "calls": _calls,
    "features": _features,
    "masters": _masters,
    "in_backward": _in_backward,
}


def renewed(text: str, root: Path) -> str:
    """Return a page with each marked table made anew.

    Args:
        text: the page.
        root: the folder that the paths of results start from.
    """

    def table(match: re.Match[str]) -> str:
        results = json.loads((root / match["path"]).read_text("utf-8"))
        made = TABLES[match["name"]](results, match["dtype"] or "float32")
        return f"{match[1]}{made}\n{match[5]}"

    return _MARKED.sub(table, text)


def _gain(row: Mapping[str, Any], clock: str, on_gpu: bool) -> str:
    """Return the time of torch's fastest step, divided by ours, and the name of that step."""
    wrong = row["wrong"]
    if "ours" in wrong or all(name in wrong for name in row["times"] if name != "ours"):
        return "–"
    best = best_of_torch(row, clock)
    return f"{_over(row, clock, best)} {short_labels(on_gpu)[best]}"


def _over(row: Mapping[str, Any], clock: str, variant: str) -> str:
    """Return the time of a variant, divided by ours."""
    return _times_as_fast(row["times"][variant][clock] / row["times"]["ours"][clock])


def _times_as_fast(gain: float) -> str:
    text = f"{gain:.2f}×" if gain < 9.95 else f"{gain:.1f}×"
    return f"**{text}**" if round(gain, 2) < 1 else text


def main(paths: Sequence[str]) -> int:
    """Renew the tables in these pages; return the exit code."""
    for path in map(Path, paths):
        path.write_text(renewed(path.read_text("utf-8"), Path.cwd()), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
