"""Format the results of ``clr-optim bench --step-in-backward``: a line per model and variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clr_optim.bench.report import aligned, time_in_words

__all__ = ["NAMES", "backward_cells", "backward_table"]

#: How tables name the variants.
NAMES = {
    "torch": "torch's fused step",
    "torch_in_backward": "a fused torch optimizer per parameter, in backward",
    "ours": "clr_optim",
    "ours_in_backward": "clr_optim, step_in_backward()",
}


def backward_cells(row: Mapping[str, Any], variant: str) -> list[str]:
    """Return the cells of a variant: its time, relative to ours, and its peak memory."""
    times = {name: each["median_s"] for name, each in row["times"].items()}
    memory = row["memory"][variant]
    peak = memory.get("peak_bytes")
    return [
        time_in_words(times[variant]),
        f"{times[variant] / times['ours']:.2f}",
        memory["skipped"] if peak is None else f"{peak / 2**20:,.0f} MiB",
    ]


def backward_table(results: Mapping[str, Any]) -> str:
    """Return the results as text: time and peak memory of a whole iteration."""
    heads = ["", "iteration", "over clr_optim", "peak memory", ""]
    lines = [
        [f"{row['model']}, {words}", *backward_cells(row, name), ""]
        for row in results["step_in_backward"]
        for name, words in NAMES.items()
    ]
    return "\n".join(
        [
            f"AdamW in float32, threads: {results['machine']['threads']}. Forward, backward and "
            "step; peak memory beyond parameters and state.",
            "",
            *aligned([heads, *lines]),
        ]
    )
