"""Format the results of ``clr-optim bench --features``: a line per workload, and one of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clr_optim.bench.report import aligned, time_in_words

__all__ = ["NAMES", "features_cells", "features_table"]

#: How tables name the features.
NAMES = {
    "max_grad_norm": "clipping",
    "skip_above": "skip_above=inf",
    "spike": "skip_above=Spike()",
    "ema": "average=Ema",
    "cycle_end": "average=cycle_end",
}


def features_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row: the plain step, the features, torch with and without average."""
    times = {name: each["median_s"] for name, each in row["times"].items()}
    return [
        time_in_words(times["plain"]),
        *(f"{times[name] / times['plain']:.2f} ({row['moved'][name]:.2f})" for name in NAMES),
        f"{times['torch'] / times['plain']:.2f}",
        f"{times['torch_ema'] / times['plain']:.2f}",
    ]


def features_table(results: Mapping[str, Any]) -> str:
    """Return the results as text: a line per workload and rule."""
    heads = ["", "plain step", *NAMES.values(), "torch", "torch and AveragedModel", ""]
    lines = [
        [f"{row['workload']}, {row['rule']}", *features_cells(row), ""]
        for row in results["features"]
    ]
    return "\n".join(
        [
            f"float32, threads: {results['machine']['threads']}. Times over that of the plain step;"
            " in brackets: memory moved over the plain step's.",
            "",
            *aligned([heads, *lines]),
        ]
    )
