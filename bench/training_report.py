"""Format the results of ``clr-optim bench --training``: steps and whole iterations, then calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clr_optim.backends.native import NativeBackend
from clr_optim.bench.report import aligned, best_of_torch, labels, short_labels, time_in_words

__all__ = ["CALLS", "training_table"]

#: The names of the measured calls. The three settings are those of the plain SGD, and one more.
CALLS = {
    "noop_s": "no-op Optimizer.step()",
    "plain_s": "SGD with momentum",
    "cycled_momentum_s": "SGD, momentum cycled",
    "clipping_s": "SGD, gradients clipped",
    "tensor_rate_s": "SGD, rate in a tensor",
    "noop_one_of_1000_s": "one of 1,000 no-op optimizers",
    "one_of_1000_s": "one of 1,000 Adams",
}

_VARIANTS = ("default", "foreach", "fused", "ours")


def training_table(results: Mapping[str, Any]) -> str:
    """Return the results as text: a line per model and rule, then a line per call."""
    named = labels(on_gpu=False)
    heads = ["p10–p90 of ours", "vs default", "vs best", "iteration vs default", "vs best"]
    lines = [["rule", *(named[name] for name in _VARIANTS), "no-op", *heads, ""]]
    last = None
    for row in results["training"]:
        if row["workload"] != last:
            last = row["workload"]
            lines.append([f"{last}: {row['tensors']} tensors"])
        times = row["times"]
        lines.append(
            [
                f"  {row['rule']}",
                *(_both_times(times.get(name)) for name in _VARIANTS),
                _both_times(row["noop"]),
                " – ".join(time_in_words(times["ours"][key]) for key in ("p10_s", "p90_s")),
                *_gains(row, "median_s"),
                *_gains(row, "iteration_s"),
                _remark(row),
            ]
        )
    threads = results["machine"]["threads"]
    lines_of_calls = [
        [name, time_in_words(results["calls"][key]), ""]
        for key, name in CALLS.items()
        if "calls" in results
    ]
    return "\n".join(
        [
            f"In training, threads: {threads}. Each entry: the step/the whole iteration.",
            "",
            *aligned(lines),
            *(["", "One call:", *aligned(lines_of_calls)] if lines_of_calls else []),
        ]
    )


def _both_times(times: Mapping[str, float] | None) -> str:
    if times is None:
        return "–"
    return f"{time_in_words(times['median_s'])}/{time_in_words(times['iteration_s'])}"


def _gains(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return the times of torch's default and of its fastest variant, divided by ours."""
    times, best = row["times"], best_of_torch(row, key)
    default, fastest = (times[name][key] / times["ours"][key] for name in ("default", best))
    return f"{default:.2f}×", f"{fastest:.2f}× {short_labels(on_gpu=False)[best]}"


def _remark(row: Mapping[str, Any]) -> str:
    wrong = f"({', '.join(row['wrong'])}: WRONG results, not counted) " if row["wrong"] else ""
    return wrong + ("" if row["backend"] == NativeBackend.name else f"[{row['backend']} backend]")
