"""A plain training loop with a cyclical learning rate: one changed line, and no scheduler.

    python examples/plain_loop.py --checkpoint run.pt

Started again with the same file, it goes on from there, wherever in a cycle that is.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clr_optim import CyclicalOptimizer
from clr_optim.demo.train import build_network, split_digits

EPOCHS_PER_CYCLE = 4  # up in two and down in two; the paper advises 2 to 10 for either


def main() -> None:
    parser = argparse.ArgumentParser(description="A plain loop with a cyclical learning rate")
    parser.add_argument("--cycles", type=int, default=4, help="to train in all (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from; else no saving")
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test = split_digits()
    loader = DataLoader(TensorDataset(train.images, train.labels), batch_size=50, shuffle=True)
    model = build_network()
    opt = CyclicalOptimizer(  # the changed line: 0.02 is now the top of the cycle
        torch.optim.Adam(model.parameters(), lr=0.02),
        policy="triangular2",
        step_size_up=EPOCHS_PER_CYCLE * len(loader) // 2,
    )
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])  # the position in the cycle comes with it

    while opt.cycle < args.cycles:  # so it stops at the end of a cycle, at its lowest rate
        for images, labels in loader:
            lr = opt.get_last_lr()[0]
            opt.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            opt.step()  # at this step's rate; then the cycle moves on
        with torch.no_grad():
            accuracy = (model(test.images).argmax(dim=1) == test.labels).float().mean()
        print(
            f"step {opt.iteration}  cycle {opt.cycle:.2f}  lr {lr:.6f}  loss {loss.item():.5f}"
            f"  test accuracy {100 * accuracy:.2f} %"
        )
        if args.checkpoint:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, args.checkpoint)


if __name__ == "__main__":
    main()
