"""accelerate with a cyclical learning rate: one changed line before ``prepare``.

    accelerate launch examples/accelerate_loop.py

or with torchrun, or plain python. The cycle moves when the optimizer does, whatever the number of
processes. Started again with ``--resume``, it goes on from the folder that ``save_state`` wrote.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clr_optim import CyclicalOptimizer
from clr_optim.demo.train import build_network, split_digits

STEPS, STEPS_PER_CYCLE = 192, 48  # four cycles


def main() -> None:
    parser = argparse.ArgumentParser(description="accelerate with a cyclical learning rate")
    parser.add_argument("--checkpoint", type=Path, default=Path("run"), help="folder (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from it")
    args = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    train, test = split_digits()
    model, data = build_network(), TensorDataset(train.images, train.labels)
    opt = CyclicalOptimizer(  # the changed line: 0.02 is now the top of the cycle
        torch.optim.Adam(model.parameters(), lr=0.02),
        policy="triangular2",
        step_size_up=STEPS_PER_CYCLE // 2,
    )
    model, prepared, loader = accelerator.prepare(model, opt, DataLoader(data, 50, shuffle=True))
    if args.resume:
        accelerator.load_state(args.checkpoint)

    while opt.iteration < STEPS:
        for images, labels in loader:
            with accelerator.accumulate(model):
                lr = opt.get_last_lr()[0]
                accelerator.backward(functional.cross_entropy(model(images), labels))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()  # a step at every second batch only
                prepared.zero_grad()
        with torch.no_grad():
            right = model(test.images.to(accelerator.device)).argmax(dim=1).cpu() == test.labels
        accelerator.print(
            f"step {opt.iteration}  cycle {opt.cycle:.2f}  lr {lr:.6f}"
            f"  test accuracy {100 * right.float().mean():.2f} %"
        )
        accelerator.save_state(args.checkpoint)


if __name__ == "__main__":
    main()
