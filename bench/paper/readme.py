"""Renew the table of all rows in a Markdown file, such as docs/paper.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clr_optim.bench.paper.comparison import summarize
from clr_optim.bench.paper.figure_6 import FIGURE_6
from clr_optim.bench.paper.figure_report import figure_table
from clr_optim.bench.paper.quarters import summarize_quarters
from clr_optim.bench.paper.resnet import RESNET

__all__ = ["BEGIN", "END", "figure_mark", "readme_table", "renewed_readme", "resnet_mark"]

BEGIN, END = "<!-- made by clr-optim bench paper --report --readme -->", "<!-- /made -->"


def renewed_readme(path: str | Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown file's text, with a table of all rows between its two marks.

    Figure 6 has a table, and a first mark, for each length of its runs. So has Table 4, for each
    data set and scale.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file lacks the marks.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if results and results[0]["row"] in FIGURE_6:
        mark = figure_mark(results[0]["iterations"])
        table = figure_table(summarize_quarters(results))
    elif results and results[0]["row"] in RESNET:
        table_4 = RESNET[results[0]["row"]].table
        mark = resnet_mark(table_4, results[0]["scale"])
        table = readme_table([row for row in summarize(results) if row["table"] == table_4])
    else:
        mark = BEGIN
        table = readme_table(summarize(results))
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no place for the table: add these two lines: {mark} {END}")
    whole = "\n".join([mark, *table, END])
    return f"{before}{whole}{after}"


def figure_mark(iterations: int) -> str:
    """Return the mark before the table of Figure 6 at a length."""
    words = f"made by clr-optim bench paper --report --readme: figure 6, {iterations:,} iterations"
    return f"<!-- {words} -->"


def resnet_mark(table: str, scale: str) -> str:
    """Return the mark before the table of Table 4 at a scale."""
    return f"<!-- made by clr-optim bench paper --report --readme: table {table}, scale {scale} -->"


def readme_table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of all rows: published and measured figures, and the paper's relations."""
    lines = [
        "| row | the paper, % (iterations) | here, % (iterations) | the paper's relation here |",
        "| --- | --- | --- | --- |",
    ]
    by_name = {row["row"]: row for row in summaries}
    for row in summaries:
        published = "–"
        if row["published"] is not None:
            published = f"{row['published']} ({row['published_iterations']:,})"
        if "accuracy" not in row:
            lines.append(f"| {row['row']} | {published} | not run | |")
            continue
        relations = []
        for comparison in row["comparisons"]:
            words = {
                True: "holds: ", False: "**does not hold**: ", None: "",
                "in direction": "in direction only: ", "and more": "holds, and more: ",
            }[comparison.get("holds")]  # fmt: skip
            relation = f"{words}{comparison['found']} {comparison['with']}"
            if words:
                relation += (
                    f" ({comparison['difference']:+.1f} points, "
                    f"{comparison['published_difference']:+.1f} in the paper)"
                )
            elif by_name[comparison["with"]]["at_chance"]:
                relation += ", which is no better than chance"
            relations.append(relation)
        spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
        lines.append(
            f"| {row['row']} | {published} | {row['accuracy']:.1f}{spread} ({row['iterations']:,}) "
            f"| {'; '.join(relations)} |"
        )
    return lines
