"""The lines of a report's table: published and measured accuracies, lengths, seeds and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clr_optim.bench.paper.progress import duration

__all__ = ["table_lines"]


def table_lines(rows: Sequence[Mapping[str, Any]], missing: str = "not run") -> list[str]:
    """Return a Markdown table with a line for every row.

    Args:
        rows: from :func:`~clr_optim.bench.paper.comparison.summarize`.
        missing: stands in the rows without results.
    """
    return [
        "| row | published, % | measured, % | iterations | seeds | time |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_line(row, missing) for row in rows),
    ]


def _line(row: Mapping[str, Any], missing: str) -> str:
    published = "–"
    if row["published"] is not None:
        published = f"{row['published']} at {row['published_iterations']:,}"
    if "accuracy" not in row:
        return f"| {row['row']} | {published} | {missing} | | | |"
    measured = f"{row['accuracy']:.2f}"
    if row["spread"] is not None:
        measured += f" ± {row['spread']:.2f}"
    iterations = f"{row['iterations']:,}"
    if row["cycles"]:
        iterations += f" ({row['cycles']:g} cycles)"
    return (
        f"| {row['row']} | {published} | {measured} | {iterations} | {row['seeds']} | "
        f"{duration(row['training_s'])} |"
    )
