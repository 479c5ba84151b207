"""Snapshot Ensembles (arXiv 1704.00109) against one run of the same length, on the digits.

python examples/snapshot_ensemble.py
"""

import argparse

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clr_optim import CyclicalOptimizer, Schedule, Snapshots
from clr_optim.demo.train import build_network, split_digits
from clr_optim.schedule import cosine, warm_restarts


def accuracies(args: argparse.Namespace, seed: int, schedule: Schedule) -> list[float]:
    """Return test accuracies in %: the last snapshot, the last half of them, all of them."""
    torch.manual_seed(seed)
    data, test = split_digits()
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=50, shuffle=True)
    model = build_network()
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    opt = CyclicalOptimizer(sgd, schedule, base_lr=0.0)
    kept = [  # the paper averages probabilities, and not logits
        Snapshots(opt, model, last=last, transform=lambda logits: logits.softmax(dim=-1))
        for last in (1, (args.cycles + 1) // 2, args.cycles)
    ]
    for _ in range(args.cycles * args.epochs):
        for images, labels in loader:
            opt.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            opt.step()
    hits = [each.predict(test.images).argmax(dim=1) == test.labels for each in kept]
    return [100 * hit.double().mean().item() for hit in hits]


def main() -> None:
    parser = argparse.ArgumentParser(description="Snapshot ensembles on the digits")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each kind (%(default)s)")
    parser.add_argument("--cycles", type=int, default=6, help="of a run (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of a cycle (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="the highest rate (%(default)s)")
    args = parser.parse_args()
    cycle, half, rows = args.epochs * 24, (args.cycles + 1) // 2, []
    for seed in range(args.seeds):
        one = accuracies(args, seed, cosine(args.cycles * cycle))[0]
        rows.append([one, *accuracies(args, seed, warm_restarts(cycle))])
    print("| model | test accuracy, % | minus one cosine run | minus last snapshot |")
    print("| --- | --- | --- | --- |")
    names = "one cosine run", "last snapshot", f"ensemble of {half}", f"ensemble of {args.cycles}"
    runs = torch.tensor(rows).T
    for name, run in zip(names, runs, strict=True):
        parts = [run, run - runs[0], run - runs[1]]
        print(f"| {name} |", " | ".join(f"{p.mean():.2f} ± {p.std():.2f}" for p in parts), "|")


if __name__ == "__main__":
    main()
