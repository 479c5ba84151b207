"""Say the seeds, settings, data and machines of runs in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["settings_lines"]


def settings_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on seeds, momentum, data, and machines, which all reports have."""
    lines = []
    if min(Counter(result["row"] for result in results).values()) == 1:
        lines.append(
            "The spread of a row with one seed is unknown. Its margin for the same accuracy holds "
            "the error of the test images alone."
        )
    lines += [
        "Momentum as in Caffe, the rate inside the buffer."
        if results[0]["momentum"] == "caffe"
        else "Momentum as in torch, the rate outside the buffer (Caffe has it inside)."
    ]
    lines += [f"Data: {note}" for note in dict.fromkeys(r["data_note"] for r in results) if note]
    machines = dict.fromkeys(
        f"{m.get('gpu') or m['cpu']}, {m['threads']} threads, torch {m['torch']}, "
        f"clr_optim {m['clr_optim']}"
        for m in (result["machine"] for result in results)
    )
    if any(result["machine"].get("tf32") for result in results):
        lines.append("Convolutions in TF32, torch's default on such a GPU.")
    together = max(result.get("together", 1) for result in results)
    if together > 1:
        lines.append(f"Times are of runs that shared the GPU, {together} beside each other.")
    return [*lines, f"Machine: {'; '.join(machines)}."]
