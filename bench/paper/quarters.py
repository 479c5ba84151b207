"""Average the runs of Figure 6 over seeds, and compare cycles with other rates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clr_optim.bench.paper.comparison import standard_error, verdict
from clr_optim.bench.paper.figure_6 import (
    CONSTANT,
    CYCLED,
    DECAYING,
    FIGURE_6,
    PAPERS_CONSTANT,
)

__all__ = ["conclusions", "summarize_quarters"]

_QUARTERS = ("first", "second", "third", "last")


def summarize_quarters(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds, for all rows of Figure 6.

    Returns:
        Dictionaries with ``"row"``, ``"published"`` and ``"published_iterations"``. If the row was
        run: also ``"iterations"``, ``"seeds"``, ``"cycles"``, ``"test_images"``, ``"accuracy"`` and
        ``"spread"`` (of the last quarter), ``"quarters"`` and ``"by_averages"`` (a list of
        ``"iteration"``, ``"accuracy"``, the mean in percent, and ``"spread"``, the standard
        deviation of a sample or None), ``"bounds"`` (one pair per seed), ``"range_test_s"`` (mean
        or None), ``"training_s"`` (mean), ``"curve"`` (means), ``"finite"`` and ``"relation"`` (a
        sentence).
    """
    summaries = []
    for row in FIGURE_6.values():
        runs = [run for run in results if run["row"] == row.name]
        summary: dict[str, Any] = {
            "row": row.name,
            "published": row.published,
            "published_iterations": row.iterations,
        }
        if runs:
            milestones = [at for at, _ in runs[0]["by_averages"]]
            curves = [dict(map(tuple, run["curve"])) for run in runs]
            averages = [dict(map(tuple, run["by_averages"])) for run in runs]
            tests = [run["range_test"]["seconds"] for run in runs if run["range_test"]]
            summary.update(
                iterations=runs[0]["iterations"],
                seeds=len(runs),
                cycles=runs[0]["cycles"],
                test_images=runs[0]["test_images"],
                quarters=_means(milestones, curves),
                by_averages=_means(milestones, averages),
                bounds=[(run["range_test"] or run)["bounds"] for run in runs],
                range_test_s=statistics.fmean(tests) if tests else None,
                training_s=statistics.fmean(run["training_s"] for run in runs),
                curve=[
                    (at, statistics.fmean(curve[at] for curve in curves))
                    for at in curves[0]
                    if all(at in curve for curve in curves)
                ],
                finite=all(run["finite"] for run in runs),
            )
            summary["accuracy"] = summary["quarters"][-1]["accuracy"]
            summary["spread"] = summary["quarters"][-1]["spread"]
        summaries.append(summary)
    for summary in summaries:
        if "accuracy" in summary:
            summary["relation"] = _relation(summary, summaries)
    return summaries


def _means(
    milestones: Sequence[int], curves: Sequence[Mapping[int, float]]
) -> list[dict[str, Any]]:
    means = []
    for at in milestones:
        values = [curve[at] for curve in curves]
        means.append(
            {
                "iteration": at,
                "accuracy": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
            }
        )
    return means


def _best(
    summaries: Sequence[Mapping[str, Any]], rows: Sequence[str], of: str, quarter: int
) -> Mapping[str, Any] | None:
    """Return the row with the largest mean accuracy after a quarter, of the rows that were run."""
    run = [summary for summary in summaries if summary["row"] in rows and "accuracy" in summary]
    return max(run, key=lambda summary: float(summary[of][quarter]["accuracy"]), default=None)


def _gap(
    summary: Mapping[str, Any], other: Mapping[str, Any], of: str, quarter: int
) -> tuple[float, float]:
    """Return the difference of two accuracies, and the difference up to which they are the same."""
    # The accuracy and the spread of this quarter replace those of the last one.
    here, there = ({**each, **each[of][quarter]} for each in (summary, other))
    same = 2 * (standard_error(here) ** 2 + standard_error(there) ** 2) ** 0.5
    return here["accuracy"] - there["accuracy"], same


def _relation(summary: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence: the row's accuracy, and how another than a constant rate compares."""
    text = f"`{summary['row']}`: {summary['accuracy']:.1f} % after {summary['iterations']:,}"
    text += " iterations"
    if not summary["finite"]:
        text += ", its weights no longer finite"
    if summary["row"] in CONSTANT:
        if summary["published"] is not None:
            text += f" (the paper: {summary['published']} % after "
            text += f"{summary['published_iterations']:,})"
        return text + "."
    if summary["range_test_s"] is not None:
        found = ", ".join(f"{low:.2g} to {top:.2g}" for low, top in summary["bounds"])
        text += f", between bounds that a range test of {summary['range_test_s']:.0f} s found "
        text += f"({found})"
    best = _best(summaries, CONSTANT, "quarters", -1)
    if best is None:
        return text + "; no constant rate to compare with: not run."
    difference, same = _gap(summary, best, "quarters", -1)
    text += f"; {verdict(difference, same)} the best constant rate, `{best['row']}` "
    text += f"({best['accuracy']:.1f} %, {difference:+.1f}, within {same:.1f} being the same)"
    earlier = []
    for quarter, name in enumerate(_QUARTERS[:-1]):
        rival = _best(summaries, CONSTANT, "quarters", quarter)
        if rival is not None:
            gap, _ = _gap(summary, rival, "quarters", quarter)
            earlier.append(f"{gap:+.1f} after the {name} quarter")
    return f"{text}; against the best constant rate of its time {', '.join(earlier)}."


def conclusions(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the numbers show: sentences for the report."""
    run = [summary for summary in summaries if "accuracy" in summary]
    cycled = [summary for summary in run if summary["row"] in CYCLED]
    if not cycled or not any(summary["row"] in CONSTANT for summary in run):
        return ["Constant rates and cycles were not both run: there is nothing to compare yet."]
    lines, tops = [], []
    for of, how in (
        ("quarters", "With the statistics of test batches, as in Caffe"),
        ("by_averages", "With torch's running averages"),
    ):
        best = _best(run, CONSTANT, of, -1)
        assert best is not None
        tops.append(best[of][-1]["accuracy"])
        gaps = [(*_gap(row, best, of, -1), row["row"]) for row in cycled]
        above = sum(gap > same for gap, same, _ in gaps)
        gap, _, name = max(gaps)
        low, _, worst = min(gaps)
        lines.append(
            f"{how}, {above} of {len(cycled)} cycled rows end more accurate than the best constant "
            f"rate, `{best['row']}` ({best[of][-1]['accuracy']:.1f} %): from {low:+.1f} points "
            f"(`{worst}`) to {gap:+.1f} (`{name}`)."
        )
    changes = [row["by_averages"][-1]["accuracy"] - row["accuracy"] for row in cycled]
    lines.append(
        f"Running averages change the best constant accuracy by {tops[1] - tops[0]:+.1f} points, "
        f"and the cycled rows by {min(changes):+.1f} to {max(changes):+.1f}: the two gains differ "
        "by these changes."
    )
    decaying = next((row for row in run if row["row"] == DECAYING), None)
    if decaying is not None:
        gaps = [(*_gap(row, decaying, "quarters", -1), row["row"]) for row in cycled]
        words = ", ".join(
            f"`{name}` is {verdict(gap, same)} it ({gap:+.1f}, within {same:.1f} being the same)"
            for gap, same, name in gaps
        )
        lines.append(
            f"A rate that only decays, `{DECAYING}`, ends at {decaying['accuracy']:.1f} %: {words}."
        )
    papers = next((row for row in run if row["row"] == PAPERS_CONSTANT), None)
    if papers is not None:
        gains = [row["accuracy"] - papers["accuracy"] for row in cycled]
        published = FIGURE_6[CYCLED[0]].published, FIGURE_6[PAPERS_CONSTANT].published
        lines.append(
            f"Against the paper's constant rate, `{PAPERS_CONSTANT}`, the gain is "
            f"{min(gains):+.1f} to {max(gains):+.1f} points (in the paper, after "
            f"{papers['published_iterations']:,} iterations: {published[0]} against "
            f"{published[1]} %)."
        )
    return lines
