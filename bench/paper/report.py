"""Write the report on a folder of results: tables, a sentence per row, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from clr_optim import plotting
from clr_optim.bench.paper.comparison import summarize
from clr_optim.bench.paper.figure_6 import FIGURE_6
from clr_optim.bench.paper.figure_report import report_on_figure
from clr_optim.bench.paper.report_files import write_report
from clr_optim.bench.paper.resnet import RESNET
from clr_optim.bench.paper.resnet_report import report_on_resnet
from clr_optim.bench.paper.rows import ROWS
from clr_optim.bench.paper.settings_lines import settings_lines
from clr_optim.bench.paper.store import Store, key
from clr_optim.bench.paper.table_lines import table_lines

__all__ = ["markdown", "report"]

_TITLES = {
    "1": "Table 1: policies",
    "3": "Table 3: adaptive methods",
    "beyond": "Beyond the paper",
    "sgd": "SGD",
    "nesterov": "SGD + Nesterov",
    "adam": "Adam",
    "rmsprop": "RMSprop",
    "adagrad": "AdaGrad",
    "adadelta": "AdaDelta",
}


def markdown(results: Sequence[Mapping[str, Any]], speed: Mapping[str, Any] | None = None) -> str:
    """Return the tables, a sentence per row, and the settings and machines of the runs."""
    summaries = summarize(results)
    lines = [*_preamble(results), ""]
    for table in dict.fromkeys(summary["table"] for summary in summaries):
        rows = [summary for summary in summaries if summary["table"] == table]
        lines += [
            f"**{_TITLES[table]}**",
            "",
            *table_lines(rows),
            "",
            *(f"- {row['relation']}" for row in rows if "relation" in row),
            "",
        ]
    if speed is not None:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in speed["iterations_per_s"].items())
        lines += [f"Iterations per second on {speed['device']}: {rates}.", ""]
    return "\n".join(lines)


def _preamble(results: Sequence[Mapping[str, Any]]) -> list[str]:
    first = results[0]
    lines = [
        "Accuracy on CIFAR-10's test images after the last iteration, mean ± standard deviation "
        f"over seeds; `cifar10_full`, batches of {first['batch_size']}, no augmentation.",
    ]
    factor = Fraction(first["scale"])
    if factor != 1:
        lines.append(
            f"All lengths and step sizes are the paper's × {float(factor):g}, and decays come as "
            "far in them: rows can be compared with each other, and hardly with the paper's."
        )
    return [*lines, *settings_lines(results)]


def report(folder: str | Path) -> str:
    """Write ``paper.md``, ``paper.json`` and the pictures into a folder of results.

    Results of Figure 6 and of Table 4 have other files, see :func:`report_on_figure` and
    :func:`report_on_resnet`.

    Returns:
        The Markdown.

    Raises:
        ValueError: if the folder has no results, or results that do not belong together.
    """
    store = Store(folder, create=False)
    results = store.read()
    if not results:
        raise ValueError(f"{store.results}: no finished run to report on")
    _check_together(results, store.results)
    if results[0]["row"] in FIGURE_6:
        return report_on_figure(store.folder, results)
    if results[0]["row"] in RESNET:
        return report_on_resnet(store.folder, results)
    speed_file = store.folder / "speed.json"
    speed = json.loads(speed_file.read_text("utf-8")) if speed_file.exists() else None
    summaries = summarize(results)
    text = markdown(results, speed)
    whole = {"rows": summaries, "runs": results, "speed": speed}

    def draw(folder: Path) -> None:
        for name, panels in _pictures(summaries).items():
            plotting.save(plotting.plot_paper_curves(panels), folder / f"{name}.png")

    return write_report(store.folder, "paper", text, whole, draw)


def _check_together(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse results that were joined from several folders, or come twice."""
    seen: set[tuple[str, int]] = set()
    for run in results:
        if key(run) in seen:
            raise ValueError(
                f"{path}: row {run['row']}, seed {run['seed']} comes twice: remove one of its lines"
            )
        seen.add(key(run))
        for name in ("scale", "momentum", "data"):
            if run[name] != results[0][name]:
                raise ValueError(
                    f"{path}: row {run['row']}, seed {run['seed']} has {name} {run[name]!r}, and "
                    f"the first line {results[0][name]!r}: give each a folder, and report on both"
                )
    kinds = {_kind(run["row"]) for run in results}
    if len(kinds) > 1:
        words = " and ".join(sorted(kinds))
        raise ValueError(f"{path}: rows of {words}: give each a folder, and report on both")


def _kind(row: str) -> str:
    """Return which of the three reports has a row."""
    if row in FIGURE_6:
        return "Figure 6"
    return "Table 4" if row in RESNET else "Tables 1 and 3"


Curves = dict[str, list[tuple[int, float]]]


def _pictures(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curves]]:
    """Return the curves by picture, panel and label. Table 3 has one panel per optimizer."""
    pictures: dict[str, dict[str, Curves]] = {}
    for summary in summaries:
        if "curve" in summary:
            row = ROWS[summary["row"]]
            name = "beyond" if row.table == "beyond" else f"table-{row.table}"
            panel = _TITLES[row.rule if row.table == "3" else row.table]
            curves = pictures.setdefault(name, {}).setdefault(panel, {})
            curves[row.label] = summary["curve"]
    return pictures
