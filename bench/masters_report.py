"""Format the results of ``clr-optim bench --masters``: a line per workload and variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clr_optim.bench.report import aligned, time_in_words

__all__ = ["NAMES", "masters_cells", "masters_table"]

#: How tables name the variants.
NAMES = {
    "bfloat16": "no master",
    "separate": "a separate float32 master, by torch",
    "masters": "master_weights=True",
}


def masters_cells(row: Mapping[str, Any], variant: str) -> list[str]:
    """Return the cells of a variant: its time, relative to ours, bytes moved and bytes kept."""
    times = {name: each["median_s"] for name, each in row["times"].items()}
    numbers = row["bytes"][variant]
    return [
        time_in_words(times[variant]),
        f"{times[variant] / times['masters']:.2f}",
        str(numbers["moved"]),
        str(numbers["kept"]),
    ]


def masters_table(results: Mapping[str, Any]) -> str:
    """Return the results as text: a line per workload, rule and variant."""
    heads = ["", "", "step", "over master_weights", "bytes moved", "bytes kept", ""]
    lines = [
        [f"{row['workload']}, {row['rule']}", words, *masters_cells(row, name), ""]
        for row in results["masters"]
        for name, words in NAMES.items()
    ]
    return "\n".join(
        [
            f"bfloat16, threads: {results['machine']['threads']}. Bytes per parameter: those that a"
            " step moves, and those of parameter, gradient, state and master.",
            "",
            *aligned([heads, *lines]),
        ]
    )
