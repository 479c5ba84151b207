"""Write the report on a folder of results of Table 4: tables, sentences, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from clr_optim import plotting
from clr_optim.bench.paper.comparison import summarize
from clr_optim.bench.paper.report_files import write_report
from clr_optim.bench.paper.resnet import RESNET
from clr_optim.bench.paper.settings_lines import settings_lines
from clr_optim.bench.paper.table_lines import table_lines

__all__ = ["report_on_resnet", "resnet_markdown"]

_NAMES = {"resnet": "CIFAR-10", "resnet-100": "CIFAR-100"}
_FOLDERS = {"resnet": "cifar-10-batches-bin", "resnet-100": "cifar-100-binary"}

#: The ImageNet networks of section 4.2: the gain of the cycled row over the fixed one, in points.
_IMAGENET = (
    ("AlexNet, triangular 0.01 to 0.015 over fixed", "+0.4"),
    ("GoogLeNet, triangular 0.01 to 0.026 over fixed", "+1.4"),
    ("GoogLeNet, exp_range over exp", "+2"),
)


def resnet_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables, a sentence per row, and the settings and machines of the runs."""
    summaries = summarize(results)
    lines = [*_preamble(results), ""]
    for table, name in _NAMES.items():
        rows = [row for row in summaries if row["table"] == table]
        was_run = any("accuracy" in row for row in rows)
        lines += [f"**Table 4: {name}**", ""]
        if was_run:
            sentences = (f"- {row['relation']}" for row in rows if "relation" in row)
            lines += [*table_lines(rows), "", *sentences, *_conclusions(rows), ""]
        else:
            command = _command(table, results)
            lines += [f"No data here. On a folder of the official files: {command}.", ""]
            lines += [*table_lines(rows, "no data here"), ""]
    return "\n".join([*lines, *_imagenet()])


def _preamble(results: Sequence[Mapping[str, Any]]) -> list[str]:
    first, factor = results[0], Fraction(results[0]["scale"])
    name = _NAMES[RESNET[first["row"]].table]
    lines = [
        f"Accuracy on {name}'s test images after the last iteration, mean ± standard deviation "
        "over seeds. Random crops with a padding of 4, mirrored at random; the order of the images "
        "is the same in each epoch (the originals shuffle anew). SGD with Nesterov's momentum of "
        "0.9 and a weight decay of 1e-4. The rates, and the range of a `clr` row, fall to a tenth "
        "and to a hundredth; a run has ten cycles. The paper tells no depth: its figures, means of "
        "five runs, stand beside each.",
    ]
    if factor != 1:
        lines.append(
            f"All lengths, falls and cycles are the originals' × {float(factor):g}: rows of one "
            "network can be compared with each other, and hardly with the paper's."
        )
    return [*lines, *_lengths(results), *settings_lines(results)]


def _lengths(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the length of each network's runs in iterations and epochs."""
    lengths = {}
    for run in results:
        epochs = run["iterations"] * run["batch_size"] / run["training_images"]
        lengths[run["network"]] = (
            f"`{run['network']}`: {run['iterations']:,} iterations of {run['batch_size']} images, "
            f"{epochs:.1f} epochs of {run['training_images']:,}."
        )
    return list(lengths.values())


def _command(table: str, results: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"`clr-optim bench paper --data {_FOLDERS[table]} --table {table} --scale "
        f"{results[0]['scale']} --out {table}-out`"
    )


def _conclusions(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence per network: the cycled row against the best of its fixed rows."""
    by_name = {row["row"]: row for row in rows}
    for row in rows:
        fixed = [by_name[name] for name in RESNET[row["row"]].references]
        were_run = [each for each in (row, *fixed) if "accuracy" in each]
        if not fixed or len(were_run) <= len(fixed):
            continue
        best = max(fixed, key=lambda each: float(each["accuracy"]))
        papers = max(each["published"] for each in fixed)
        comparison = next(each for each in row["comparisons"] if each["with"] == best["row"])
        yield (
            f"- `{row['row']}` is {comparison['found']} the best of its three fixed rates, "
            f"`{best['row']}`: {comparison['difference']:+.2f} points, within "
            f"{comparison['same']:.2f} being the same "
            f"({row['published'] - papers:+.1f} in the paper). The best rate was chosen after the "
            "runs, by the test images."
        )


def _imagenet() -> list[str]:
    return [
        "**Section 4.2: ImageNet**",
        "",
        "No data here, and neither networks nor a loader for images of this size.",
        "",
        "| row | gain in the paper, points | measured, % |",
        "| --- | --- | --- |",
        *(f"| {row} | {gain} | no data here |" for row, gain in _IMAGENET),
        "",
    ]


def report_on_resnet(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Write ``resnet.md``, ``resnet.json`` and ``resnet.png`` into a folder of results.

    Returns:
        The Markdown.
    """
    summaries = summarize(results)
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in summaries:
        if "curve" in row:
            network, _, label = row["row"].rpartition("-")
            panels.setdefault(network, {})[label] = row["curve"]

    def draw(folder: Path) -> None:
        plotting.save(plotting.plot_paper_curves(panels), folder / "resnet.png")

    whole = {"rows": summaries, "runs": results}
    return write_report(folder, "resnet", resnet_markdown(results), whole, draw)
