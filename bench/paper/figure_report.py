"""Write the report on a folder of results of Figure 6: a table, sentences, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clr_optim import plotting
from clr_optim.bench.paper.figure_6 import CONSTANT, CYCLED, DECAYING, FIGURE_6, PAPERS_CONSTANT
from clr_optim.bench.paper.progress import duration
from clr_optim.bench.paper.quarters import conclusions, summarize_quarters
from clr_optim.bench.paper.report_files import write_report
from clr_optim.bench.paper.settings_lines import settings_lines

__all__ = ["figure_markdown", "figure_table", "report_on_figure"]

_LIMITS = (
    "The best of four constant rates was chosen after the runs, by the test images: this favours "
    "the constant rates.",
    f"A cycle ends at its lowest rate, and a constant rate has no low end: `{DECAYING}` shows how "
    "much of the gain comes from the low end alone.",
)


def figure_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, the conclusions, a sentence per row, and the settings of the runs."""
    summaries = summarize_quarters(results)
    first = results[0]
    epochs = first["iterations"] * first["batch_size"] / first["training_images"]
    paper = FIGURE_6[PAPERS_CONSTANT]
    lines = [
        f"**The paper's Figure 6 in {first['iterations']:,} iterations** ({epochs:.1f} epochs; the "
        f"paper's constant rate had {paper.iterations:,} iterations)",
        "",
        "Accuracy on CIFAR-10's test images after each quarter of the run, mean ± standard "
        f"deviation over seeds; Caffe's sigmoid network with batch normalization, batches of "
        f"{first['batch_size']}, SGD with momentum 0.9, no weight decay, no augmentation.",
        "",
        *figure_table(summaries),
        "",
        *_unfinished(summaries),
        *conclusions(summaries),
        *_LIMITS,
        "",
        *(f"- {row['relation']}" for row in summaries if "relation" in row),
        "",
        "Batch normalization in tests has the statistics of each batch of 1,000 test images, as "
        "Caffe's layer has no running averages. The same with torch's running averages:",
        "",
        *figure_table(summaries, of="by_averages"),
        "",
        f"`{DECAYING}` falls from 0.01 to 0.0005 over the whole run. "
        "`triangular` has 4 cycles between 0.001 and 0.01, `triangular-found` 4 cycles between the "
        "bounds of its range test, `one-triangle` a single triangle between 0.0005 and 0.01 (it is "
        "not the policy `one_cycle`).",
        "Times are of training and of range tests, by the clock; other work on the machine "
        "prolongs them.",
        *settings_lines(results),
        "",
    ]
    return "\n".join(lines)


def _unfinished(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = [row.get("seeds", 0) for row in summaries]
    if min(seeds) == max(seeds):
        return []
    return [f"Unfinished: the rows have {min(seeds)} to {max(seeds)} seeds so far."]


def figure_table(summaries: Sequence[Mapping[str, Any]], *, of: str = "quarters") -> list[str]:
    """Return a table of the rows: the accuracy after each quarter, seeds and time.

    Args:
        summaries: from :func:`summarize_quarters`.
        of: ``"quarters"`` or ``"by_averages"``, the key of the accuracies.
    """
    milestones: Sequence[Mapping[str, Any]] = next(
        (row[of] for row in summaries if "accuracy" in row), ()
    )
    ends = " | ".join(f"{quarter['iteration']:,}" for quarter in milestones)
    lines = [f"| row, % after | {ends} | seeds | time |", "| --- " * (len(milestones) + 3) + "|"]
    for row in summaries:
        if "accuracy" not in row:
            lines.append(f"| {row['row']} | not run " + "| " * (len(milestones) + 1) + "|")
            continue
        cells = [
            f"{quarter['accuracy']:.1f}"
            + ("" if quarter["spread"] is None else f" ± {quarter['spread']:.1f}")
            for quarter in row[of]
        ]
        time = duration(row["training_s"])
        if row["range_test_s"] is not None:
            time += f" + {duration(row['range_test_s'])}"
        lines.append(f"| {row['row']} | {' | '.join(cells)} | {row['seeds']} | {time} |")
    return lines


def report_on_figure(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Write ``figure-6.md``, ``figure-6.json`` and ``figure-6.svg`` into a folder of results.

    Returns:
        The Markdown.
    """
    summaries = summarize_quarters(results)
    whole = {"rows": summaries, "runs": results}
    return write_report(
        folder, "figure-6", figure_markdown(results), whole, lambda to: _draw(summaries, to)
    )


def _draw(summaries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    curves = {row["row"]: row["curve"] for row in summaries if "curve" in row}
    counts = [row["seeds"] for row in summaries if "seeds" in row]
    least, most = min(counts), max(counts)
    seeds = f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"
    constant, cycled = (
        {_label(name): curves[name] for name in names if name in curves}
        for names in ((*CONSTANT, DECAYING), CYCLED)
    )
    figure = plotting.plot_constant_and_cycled(
        constant,
        cycled,
        title=f"Caffe's sigmoid network with batch normalization, mean of {seeds}",
    )
    plotting.save(figure, folder / "figure-6.svg")


def _label(row: str) -> str:
    """Return the name of a row in words: "triangular, found"."""
    return row.replace("-found", ", found").replace("-", " ")
