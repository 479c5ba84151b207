"""Draw docs/master_weights.png, and write the table beside it: the digits in three precisions.

Each run trains the network of the demo by AdamW with small rates, where many updates are below half
a unit of a bfloat16 parameter.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn import functional

from clr_optim import CyclicalOptimizer, plotting
from clr_optim.demo.train import build_network, split_digits
from clr_optim.plotting.canvas import COLORS

DOCS = Path(__file__).parent
MARK = "<!-- losses of draw_masters.py -->\n"

EPOCHS, BATCH, SEEDS, MAX_LR = 40, 50, (0, 1, 2), 4e-4
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16 alone": (torch.bfloat16, {}),
    "`master_weights=True`": (torch.bfloat16, {"master_weights": True}),
}


def losses(seed: int, dtype: torch.dtype, options: dict[str, Any]) -> list[float]:
    """Return the loss over all training images after each epoch."""
    torch.manual_seed(seed)
    # All variants begin with the same weights.
    model = build_network().to(torch.bfloat16).to(dtype)
    data, _ = split_digits()
    images, labels = data.images.to(dtype), data.labels
    opt = CyclicalOptimizer(
        torch.optim.AdamW(model.parameters(), lr=MAX_LR), step_size_up=120, **options
    )
    found = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            opt.zero_grad()
            functional.cross_entropy(model(images[batch]).float(), labels[batch]).backward()
            opt.step()
        with torch.no_grad():
            found.append(functional.cross_entropy(model(images).float(), labels).item())
    return found


def main() -> None:
    torch.set_num_threads(1)
    runs = {name: [losses(seed, *variant) for seed in SEEDS] for name, variant in VARIANTS.items()}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # The last curves lie on the first: draw those wide, and these dashed.
    styles = [{"linewidth": 3, "alpha": 0.4}, {"linewidth": 1}, {"linewidth": 1, "linestyle": "--"}]
    for color, style, (name, curves) in zip(COLORS, styles, runs.items(), strict=False):
        for i, curve in enumerate(curves):
            label = name.replace("`", "") if i == 0 else None
            axes.semilogy(range(1, EPOCHS + 1), curve, color=color, label=label, **style)
    axes.set(xlabel="epoch", ylabel="training loss", title="The digits, three seeds each")
    axes.legend()
    plotting.save(figure, DOCS / "master_weights.png")
    heads = ["training loss", *(f"seed {seed}" for seed in SEEDS), "mean"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, curves in runs.items():
        ends = [curve[-1] for curve in curves]
        cells = " | ".join(f"{end:.4f}" for end in [*ends, mean(ends)])
        lines.append(f"| {name} | {cells} |")
    page = DOCS / "master_weights.md"
    before, *_, after = page.read_text("utf-8").split(MARK)
    table = "\n".join(lines)
    page.write_text(f"{before}{MARK}\n{table}\n\n{MARK}{after}", "utf-8")


if __name__ == "__main__":
    main()
