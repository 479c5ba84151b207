"""Format the results of the throughput benchmark as a table and a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from clr_optim.backends.native import NativeBackend
from clr_optim.backends.triton import TritonBackend

__all__ = ["table"]

# A cell below this ratio counts as lost. Noise is a few percent.
_LOST = 0.95

# The variants of CPU and GPU, in the order of the columns.
_VARIANTS = (
    "default", "forloop", "foreach", "fused", "compile", "ours", "foreach_graph", "fused_graph",
    "ours_graph",
)  # fmt: skip
_ON_GPU = (
    "Each entry: time on the device/time on the host. vs, GB/s and of limit use the device's time.",
    "torch's default is foreach. A graph is captured once and replayed; its gradients stay in",
    "place. Our graph cycles the rate; a CyclicLR sets the rate of torch's after each replay.",
    "",
)


def table(results: Mapping[str, Any]) -> str:
    """Return the results as text: a line per cell, then the summary."""
    rows = results["rows"]
    on_gpu = _is_on_gpu(results)
    prefix = "device_" if on_gpu else ""
    shown = [n for n in _VARIANTS if any(n in row["times"] for row in rows)]
    host = ["host vs best"] if on_gpu else []
    columns = [name.replace("_", " ") for name in shown]
    lines = [["rule", *columns, "p10–p90", "vs default", "vs best", *host, "GB/s", "of limit", ""]]
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
        remark = "SLOWER than torch" if row["ratio_vs_best_torch"] < 1 else ""
        if row["wrong"]:
            remark += f" ({', '.join(row['wrong'])}: WRONG results, not counted)"
        waited = [name for name in shown if row["times"].get(name, {}).get("waited", 0.0) > 0.5]
        if waited:
            remark += f" ({', '.join(waited)}: the device waited for the host)"
        usual = TritonBackend if on_gpu else NativeBackend
        if row["backend"] != usual.name:
            remark += f" [{row['backend']} backend]"
        lines.append(
            [
                f"  {row['rule']}",
                *(_times(row["times"].get(name)) for name in shown),
                f"{_time(spread[f'{prefix}p10_s'])} – {_time(spread[f'{prefix}p90_s'])}",
                f"{row['ratio_vs_default_torch']:.2f}×",
                f"{row['ratio_vs_best_torch']:.2f}×",
                *([f"{row['host_ratio_vs_best_torch']:.2f}×"] if on_gpu else []),
                "–" if share is None else f"{rate:.1f}",
                "–" if share is None else f"{share:.0%}",
                remark,
            ]
        )
    above = _ON_GPU if on_gpu else ()
    return "\n".join([*above, *_aligned(lines), "", *_summary(results)])


def _is_on_gpu(results: Mapping[str, Any]) -> bool:
    return bool(results.get("device", "cpu") != "cpu")


def _times(times: Mapping[str, float] | None) -> str:
    """Format a variant's median time, on a GPU the medians of device and host."""
    if times is None:
        return "–"
    if "median_s" in times:
        return _time(times["median_s"])
    return f"{_time(times['device_median_s'])}/{_time(times['host_median_s'])}"


def _aligned(lines: list[list[str]]) -> list[str]:
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
    on_gpu = _is_on_gpu(results)
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
    lines.append(f"Below {_LOST} of torch's best: {len(lost)} of {len(rows)} cells")
    lines += [f"  {_name(row)}: {row['ratio_vs_best_torch']:.2f}×" for row in lost]
    lines.append("")
    limit = ", ".join(f"{name} {value:.1f}" for name, value in results["limit"].items())
    lines.append(
        f"Memory: {results['limit_gbps']:.1f} GB/s at best (the fastest of {limit}). Shares"
    )
    lines.append("are of the bandwidth that the same rounds measured")
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
            values = ", ".join(_words(k, v) for k, v in results[key].items())
            lines.append(f"{title}: {values}")
    return lines


def _mean(rows: list[Mapping[str, Any]], key: str) -> float:
    return math.exp(float(np.mean([math.log(row[key]) for row in rows])))


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['rule']}/{row['workload']}/{row['dtype']}"


def _words(key: str, value: Any) -> str:
    name, _, unit = key.rpartition("_")
    if unit == "s":
        return f"{name.replace('_', ' ')} {_time(value)}"
    return f"{name} {value / 1e6:,.1f} MB" if unit == "bytes" else f"{key}: {value}"


def _time(seconds: float) -> str:
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.2f} s"
