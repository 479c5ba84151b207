"""The benchmark's results in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["table"]

# What counts as a lost cell: noise is a few percent.
_LOST = 0.95


def table(results: Mapping[str, Any]) -> str:
    """The results in words and numbers."""
    rows = results["rows"]
    shown = [
        n
        for n in ("default", "foreach", "fused", "compile", "ours")
        if any(n in row["times"] for row in rows)
    ]
    lines = [["rule", *shown, "p10–p90", "vs default", "vs best", "GB/s", "of limit", ""]]
    last = None
    for row in rows:
        heading = (row["workload"], row["dtype"])
        if heading != last:
            last = heading
            tensors = "1 tensor" if row["tensors"] == 1 else f"{row['tensors']} tensors"
            lines.append([f"{' '.join(heading)}: {tensors}, {row['params']:,} values"])
        spread = row["times"]["ours"]
        rate = row["bytes"] / spread["median_s"] / 1e9
        share = row["fraction_of_limit"]
        remark = "SLOWER than torch" if row["ratio_vs_best_torch"] < 1 else ""
        if row["wrong"]:
            remark += f" ({', '.join(row['wrong'])}: WRONG results, not counted)"
        if row["backend"] != "native":
            remark += f" [{row['backend']} backend]"
        lines.append(
            [
                f"  {row['rule']}",
                *(_time(row["times"][n]["median_s"]) if n in row["times"] else "–" for n in shown),
                f"{_time(spread['p10_s'])} – {_time(spread['p90_s'])}",
                f"{row['ratio_vs_default_torch']:.2f}×",
                f"{row['ratio_vs_best_torch']:.2f}×",
                "–" if share is None else f"{rate:.1f}",
                "–" if share is None else f"{share:.0%}",
                remark,
            ]
        )
    return "\n".join([*_aligned(lines), "", *_summary(results)])


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
    means = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        of = [row for row in rows if row["workload"] == workload]
        default, best = (
            math.exp(float(np.mean([math.log(row[key]) for row in of])))
            for key in ("ratio_vs_default_torch", "ratio_vs_best_torch")
        )
        means.append(f"  {workload}: {default:.2f}× torch's default, {best:.2f}× its best")
    lost = [row for row in rows if row["ratio_vs_best_torch"] < _LOST]
    lines = ["Geometric means:", *means, ""]
    lines.append(f"Below {_LOST} of torch's best: {len(lost)} of {len(rows)} cells")
    lines += [f"  {_name(row)}: {row['ratio_vs_best_torch']:.2f}×" for row in lost]
    lines.append("")
    limit = ", ".join(f"{name} {value:.1f}" for name, value in results["limit"].items())
    lines.append(
        f"Memory: {results['limit_gbps']:.1f} GB/s at best (the fastest of {limit}); shares"
    )
    lines.append("are of what it delivered in the same rounds")
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
