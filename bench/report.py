"""Format the results of the throughput benchmark as a table and a summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from clr_optim.backends.native import NativeBackend
from clr_optim.backends.triton import TritonBackend

__all__ = [
    "aligned", "best_of_torch", "is_on_gpu", "iterations_table", "labels", "short_labels", "table",
    "time_in_words", "whole_iterations",
]  # fmt: skip

# A cell below this ratio counts as lost. Noise is a few percent.
_LOST = 0.95

# The variants of CPU and GPU, in the order of the columns.
_VARIANTS = (
    "default", "forloop", "foreach", "fused", "compile", "ours", "foreach_graph", "fused_graph",
    "ours_graph",
)  # fmt: skip
_ON_GPU = (
    "Each entry: time on the device/time on the host. vs, GB/s and of limit use the device's time.",
    "A graph is captured once and replayed; its gradients stay in place. Our graph cycles the",
    "rate; a CyclicLR sets the rate of torch's after each replay.",
    "",
)
# The bandwidth comes from other operations of the same rounds, so a share may exceed 1.
_OVER_LIMIT = (
    "*: the step moved its bytes up to {most:.0%} faster than the fastest plain copy or sum in the "
    "same",
    "rounds. The bandwidth is measured, and no bound: read such a share as all of it.",
)


def labels(on_gpu: bool) -> dict[str, str]:
    """Return the names of the variants. The default is one of the other two."""
    default = "foreach (default)" if on_gpu else "for-loop (default)"
    known = {"default": default, "forloop": "for-loop"}
    return {name: known.get(name, name.replace("_", " ")) for name in _VARIANTS}


def short_labels(on_gpu: bool) -> dict[str, str]:
    """Return the names of the variants, without a word on which is the default."""
    return {name: label.removesuffix(" (default)") for name, label in labels(on_gpu).items()}


def best_of_torch(row: Mapping[str, Any], key: str) -> str:
    """Return the fastest variant of torch that computes right values; graphs do not count.

    Args:
        row: a row of the results.
        key: the time to compare: ``median_s``, ``device_median_s`` or ``host_median_s``.
    """
    names: list[str] = [
        name
        for name in row["times"]
        if name != "ours" and not name.endswith("_graph") and name not in row["wrong"]
    ]
    return min(names, key=lambda name: float(row["times"][name][key]))


def table(results: Mapping[str, Any]) -> str:
    """Return the results as text: a line per cell, then the summary."""
    rows = results["rows"]
    on_gpu = is_on_gpu(results)
    prefix = "device_" if on_gpu else ""
    shown = [n for n in _VARIANTS if any(n in row["times"] for row in rows)]
    host = ["host vs best"] if on_gpu else []
    named, short = labels(on_gpu), short_labels(on_gpu)
    columns = [named[name] for name in shown]
    lines = [
        [
            "rule",
            *columns,
            "p10–p90",
            "vs default",
            "vs torch's best",
            *host,
            "GB/s",
            "of limit",
            "",
        ]
    ]
    last = None
    for row in rows:
        heading = (row["workload"], row["dtype"])
        if heading != last:
            last = heading
            tensors = "1 tensor" if row["tensors"] == 1 else f"{row['tensors']} tensors"
            lines.append([f"{' '.join(heading)}: {tensors}, {row['params']:,} values"])
        spread = row["times"]["ours"]
        rate = row["bytes"] / spread[f"{prefix}median_s"] / 1e9
        share = row["fraction_of_limit"]
        best = short[best_of_torch(row, f"{prefix}median_s")]
        best_on_host = short[best_of_torch(row, "host_median_s")] if on_gpu else ""
        remark = "SLOWER than torch" if row["ratio_vs_best_torch"] < 1 else ""
        if row["wrong"]:
            remark += f" ({_listed(row['wrong'], short)}: WRONG results, not counted)"
        waited = [name for name in shown if row["times"].get(name, {}).get("waited", 0.0) > 0.5]
        if waited:
            remark += f" ({_listed(waited, short)}: the device waited for the host)"
        usual = TritonBackend if on_gpu else NativeBackend
        if row["backend"] != usual.name:
            remark += f" [{row['backend']} backend]"
        lines.append(
            [
                f"  {row['rule']}",
                *(_times(row["times"].get(name)) for name in shown),
                " – ".join(time_in_words(spread[f"{prefix}{p}_s"]) for p in ("p10", "p90")),
                f"{row['ratio_vs_default_torch']:.2f}×",
                f"{row['ratio_vs_best_torch']:.2f}× {best}",
                *([f"{row['host_ratio_vs_best_torch']:.2f}× {best_on_host}"] if on_gpu else []),
                "–" if share is None else f"{rate:.1f}",
                "–" if share is None else _share(share),
                remark,
            ]
        )
    above = _ON_GPU if on_gpu else ()
    return "\n".join([*above, *aligned(lines), "", *_summary(results)])


def _listed(names: Iterable[str], named: Mapping[str, str]) -> str:
    return ", ".join(named[name] for name in names)


def _share(share: float) -> str:
    return f"{share:.0%}" if share < 1.005 else "100%*"


def is_on_gpu(results: Mapping[str, Any]) -> bool:
    """Return whether the results were measured on a GPU."""
    return bool(results.get("device", "cpu") != "cpu")


def _times(times: Mapping[str, float] | None) -> str:
    """Format a variant's median time, on a GPU the medians of device and host."""
    if times is None:
        return "–"
    if "median_s" in times:
        return time_in_words(times["median_s"])
    return f"{time_in_words(times['device_median_s'])}/{time_in_words(times['host_median_s'])}"


def aligned(lines: list[list[str]]) -> list[str]:
    """Return lines whose cells stand below each other; the last cell is a remark."""
    full = [cells for cells in lines if len(cells) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    printed = []
    for cells in lines:
        if len(cells) == 1:
            printed.append(cells[0])
            continue
        *padded, remark = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        printed.append("  ".join([*padded, remark.strip()]).rstrip())
    return printed


def _summary(results: Mapping[str, Any]) -> list[str]:
    rows = results["rows"]
    on_gpu = is_on_gpu(results)
    means = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        of = [row for row in rows if row["workload"] == workload]
        words = [
            f"{_mean(of, f'{key}_vs_default_torch'):.2f}× torch's default, "
            f"{_mean(of, f'{key}_vs_best_torch'):.2f}× its best{where}"
            for key, where in (
                (("ratio", " on the device"), ("host_ratio", " on the host"))
                if on_gpu
                else (("ratio", ""),)
            )
        ]
        means.append(f"  {workload}: {'; '.join(words)}")
    lost = [row for row in rows if row["ratio_vs_best_torch"] < _LOST]
    lines = ["Geometric means:", *means, ""]
    key = "device_median_s" if on_gpu else "median_s"
    named = labels(on_gpu)
    lines.append(f"Below {_LOST} of torch's best: {len(lost)} of {len(rows)} cells")
    lines += [
        f"  {_name(row)}: {row['ratio_vs_best_torch']:.2f}× {named[best_of_torch(row, key)]}"
        for row in lost
    ]
    lines += ["", _winners(rows, key, named)]
    lines.append("")
    limit = ", ".join(f"{name} {value:.1f}" for name, value in results["limit"].items())
    lines.append(
        f"Memory: {results['limit_gbps']:.1f} GB/s at best (the fastest of {limit}). Shares"
    )
    lines.append("are of the bandwidth that the same rounds measured")
    over = [row["fraction_of_limit"] for row in rows if (row["fraction_of_limit"] or 0) >= 1.005]
    if over:
        lines += "\n".join(_OVER_LIMIT).format(most=max(over) - 1).split("\n")
    if on_gpu:
        cache = results["machine"]["gpu_cache_mib"]
        lines.append(f"A step that moves less than four times the cache's {cache} MiB has no share")
        lines += [f"FAILED {cell['cell']}: {cell['why']}" for cell in results["left_out"]]
    if results.get("not_begun"):
        lines.append(f"Not begun, for lack of time: {results['not_begun']} cells")
    for title, key in (
        ("Overhead, Adam", "overhead"),
        ("An Adam per parameter", "in_backward"),
        ("First step, Adam", "first_step"),
        ("Peak memory of a step", "memory"),
    ):
        if key in results:
            values = ", ".join(_words(k, v, named) for k, v in results[key].items())
            lines.append(f"{title}: {values}")
    if results.get("iterations"):
        lines += ["", *iterations_table(results["iterations"], on_gpu)]
    return lines


def _winners(rows: list[Mapping[str, Any]], key: str, named: Mapping[str, str]) -> str:
    """Say how often each variant of torch is its best."""
    counts: dict[str, int] = {}
    for row in rows:
        name = named[best_of_torch(row, key)]
        counts[name] = counts.get(name, 0) + 1
    words = ", ".join(f"{name} in {n}" for name, n in sorted(counts.items(), key=lambda c: -c[1]))
    return f"torch's best: {words or 'nothing was measured'}"


def whole_iterations(row: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Return the seconds of a whole iteration by variant, and torch's fastest variant."""
    whole = {name: row["forward_backward_s"] + step for name, step in row["step_s"].items()}
    return whole, min((name for name in whole if name != "ours"), key=lambda name: whole[name])


def iterations_table(rows: list[Mapping[str, Any]], on_gpu: bool) -> list[str]:
    """Return a line per model: the time of forward and backward, and of whole iterations."""
    named, short = labels(on_gpu), short_labels(on_gpu)
    shown = [name for name in _VARIANTS if any(name in row["step_s"] for row in rows)]
    lines = [
        ["model", "batch", "rule", "forward+backward", *(named[name] for name in shown),
         "our step's part", "vs default", "vs torch's best", ""]
    ]  # fmt: skip
    for row in rows:
        whole, best = whole_iterations(row)
        lines.append(
            [
                row["workload"],
                row["batch"],
                row["rule"],
                time_in_words(row["forward_backward_s"]),
                *(time_in_words(whole[name]) if name in whole else "–" for name in shown),
                f"{row['step_s']['ours'] / whole['ours']:.0%}",
                f"{whole['default'] / whole['ours']:.2f}×",
                f"{whole[best] / whole['ours']:.2f}× {short[best]}",
                "",
            ]
        )
    return ["Whole iterations, forward, backward and step:", *aligned(lines)]


def _mean(rows: list[Mapping[str, Any]], key: str) -> float:
    return math.exp(float(np.mean([math.log(row[key]) for row in rows])))


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['rule']}/{row['workload']}/{row['dtype']}"


def _words(key: str, value: Any, named: Mapping[str, str]) -> str:
    name, _, unit = key.rpartition("_")
    if unit == "s":
        return f"{name.replace('_', ' ')} {time_in_words(value)}"
    if unit == "bytes":
        return f"{named.get(name, name)} {value / 1e6:,.1f} MB"
    return str(value) if key in ("workload", "rule", "dtype") else f"{key}: {value}"


def time_in_words(seconds: float) -> str:
    """Return a time with its unit, to three digits."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.2f} s"
