"""Format the results of ``clr-optim bench --model``: a table per rule, and the time saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clr_optim.bench.report import aligned, best_of_torch, labels, time_in_words

__all__ = ["model_table"]

_STEPS = 1000


def model_table(results: Mapping[str, Any]) -> str:
    """Return the results as text."""
    lines = [f"{results['summary']}; {results['machine']['threads']} threads"]
    for row in results["rows"]:
        lines += ["", *_rule(row, results["device"] != "cpu")]
    return "\n".join(lines)


def _rule(row: Mapping[str, Any], on_gpu: bool) -> list[str]:
    key, where = ("device_median_s", " on the device") if on_gpu else ("median_s", "")
    named, memory, iteration = labels(on_gpu), row["memory"], row["iteration"]
    times = {name: values for name, values in row["times"].items() if name in named}
    own = times["ours"][key]
    columns = [f"step{where}", *(["step on the host"] if on_gpu else []), "p10–p90", "memory"]
    columns += ["whole iteration"] if iteration else []
    lines = [[row["rule"], *columns, f"ours saves in {_STEPS:,} steps", ""]]
    for name, values in times.items():
        label = f"ours ({row['backend']})" if name == "ours" else f"torch {named[name]}"
        if name.endswith("_graph"):
            label = named[name]
        spread = [time_in_words(values[key.replace("median", p)]) for p in ("p10", "p90")]
        taken = memory.get(f"{name}_bytes")
        cells = [
            time_in_words(values[key]),
            *([time_in_words(values["host_median_s"])] if on_gpu else []),
            " – ".join(spread),
            _peak(taken),
        ]
        if iteration:
            step = iteration["step_s"].get(name)
            whole = None if step is None else iteration["forward_backward_s"] + step
            cells.append("–" if whole is None else time_in_words(whole))
        saved = "" if name.startswith("ours") else _saved(_STEPS * (values[key] - own))
        wrong = "WRONG results, not counted" if name in row["wrong"] else ""
        lines.append([f"  {label}", *cells, saved, wrong])
    return [*aligned(lines), *_sentences(row, key, named)]


def _sentences(row: Mapping[str, Any], key: str, named: Mapping[str, str]) -> list[str]:
    """Say what the table means, a sentence per line."""
    own, default = row["times"]["ours"][key], row["times"]["default"][key]
    best = best_of_torch(row, key)
    lines = [f"Our step is {_compared(default / own)} torch's default."]
    if best != "default":
        lines[0] = lines[0][:-1] + (
            f", and {_compared(row['times'][best][key] / own)} torch's best, {named[best]}."
        )
    lines.append(f"State: {_bytes(row['state_bytes'])}, equal for all variants.")
    if "skipped" in row["memory"]:
        lines.append(f"Memory was not measured: {row['memory']['skipped']}.")
    else:
        lines.append("Memory: the peak of a step beyond parameters, gradients and state.")
    if row["iteration"]:
        step, other = row["iteration"]["step_s"]["ours"], row["iteration"]["forward_backward_s"]
        lines.append(
            f"Iteration: forward and backward take {time_in_words(other)}; our step is "
            f"{step / (step + other):.1%} of an iteration."
        )
    return lines


def _compared(ratio: float) -> str:
    return f"{ratio:.2f}× as fast as" if ratio >= 1 else f"SLOWER, {ratio:.2f}× as fast as"


def _bytes(number: float) -> str:
    """Return a size with its unit."""
    return f"{number / 1e6:,.1f} MB" if number >= 1e6 else f"{number / 1e3:,.1f} kB"


def _saved(seconds: float) -> str:
    return time_in_words(seconds) if seconds >= 0 else f"−{time_in_words(-seconds)}"


def _peak(number: float | None) -> str:
    """Return the memory of a step. The measurement is accurate to about a megabyte."""
    if number is None:
        return "–"
    return f"{number / 1e6:,.0f} MB" if number >= 1e6 else "< 1 MB"
