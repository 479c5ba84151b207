"""Range tests of the networks of Table 4, as the paper does them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from clr_optim import plotting
from clr_optim.bench.paper.data import Data
from clr_optim.bench.paper.optimizers import RULES
from clr_optim.bench.paper.report_files import write_report
from clr_optim.bench.paper.resnet import DATASETS, RESNET
from clr_optim.bench.paper.rows import Row
from clr_optim.range_test import Bounds, RangeTest, lr_range_test

__all__ = ["measure_range"]

# The published range, 0.1 to 0.3, lies well inside.
_END = 1.0


def measure_range(
    row: Row, data: Data, folder: Path, steps: int, device: torch.device | str, note: str = ""
) -> str:
    """Find the bounds of a network while the rate rises linearly from 0 to 1.

    Writes ``range-test-<network>.md``, ``.json`` and ``.png``; of CIFAR-100, the name of the
    network begins with ``cifar100-``.

    Args:
        row: a row of the network; its rule and its images are those of the test, without
            augmentation.
        data: to train on.
        folder: where the files go.
        steps: the iterations of the test.
        device: of model and images.
        note: on the data.

    Returns:
        The Markdown: the suggested bounds beside the paper's.
    """
    network = row.network
    model = network.build(0).to(device)
    result = lr_range_test(
        model,
        RULES[row.rule](network.groups(model, 1.0)),
        network.batches(data, 0, torch.device(device)),
        functional.cross_entropy,
        start_lr=0.0,
        end_lr=_END,
        num_steps=steps,
        mode="linear",
        metric="accuracy",
    )
    found, suggested = _suggested(result)
    name = row.name.rpartition("-")[0]
    bounds_of_paper = RESNET[f"{name}-clr"].bounds
    assert bounds_of_paper is not None, "each row of Table 4 has bounds"
    low, high = bounds_of_paper
    text = "\n".join(
        [
            f"`{name}`, {row.rule}, {steps:,} iterations with rates from 0 to {_END:g}, "
            f"batches of {network.batch_size} images without augmentation; "
            f"{note or 'no note on the data'}.",
            "",
            "| | base_lr | max_lr |",
            "| --- | --- | --- |",
            f"| suggested | {suggested} |",
            f"| the paper | {low:g} | {high:g} |",
            "",
            found if isinstance(found, str) else found.reason,
            "",
        ]
    )
    bounds = None if isinstance(found, str) else found
    whole = {"note": note, "bounds": bounds and bounds.asdict(), "test": result.to_dict()}
    file = f"range-test-{name}"
    title = f"LR range test, {network.name} on CIFAR-{DATASETS[row.table]}"

    def draw(folder: Path) -> None:
        plotting.save(plotting.plot_range_test(result, bounds, title=title), folder / f"{file}.png")

    return write_report(folder, file, text, whole, draw)


def _suggested(result: RangeTest) -> tuple[Bounds | str, str]:
    """Return the bounds of a curve, or why it has none; and the cells of both in a table."""
    try:
        found = result.suggest()
    except ValueError as error:
        return str(error), "none | none"
    return found, f"{found.base_lr:.2g} | {found.max_lr:.2g}"
