"""Data-parallel training with a cyclical learning rate.

    torchrun --nproc-per-node 2 examples/torchrun_ddp.py --checkpoint run.pt

On GPUs where there are any, else on the CPU. Started again, on any number of ranks, it goes on.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from clr_optim import CyclicalOptimizer
from clr_optim.demo.train import build_network, split_digits


def train(args: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = DistributedDataParallel(build_network().to(device))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = CyclicalOptimizer(inner, "triangular2", step_size_up=20, max_grad_norm=5.0)
    if args.checkpoint.exists():  # on all ranks the same
        saved = torch.load(args.checkpoint, weights_only=True, map_location=device)
        model.module.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
    digits, _ = split_digits()
    while opt.cycle < args.cycles:
        torch.manual_seed(opt.iteration)  # the step alone decides on the batch of 60
        mine = torch.randperm(len(digits.labels))[rank:60:world]
        lr = opt.get_last_lr()[0]
        opt.zero_grad()
        images, labels = digits.images[mine].to(device), digits.labels[mine].to(device)
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        opt.step()
        if opt.iteration % 40 == 0 and rank == 0:  # a cycle is through
            print(f"step {opt.iteration}  cycle {opt.cycle:.2f}  lr {lr:.6f}  loss {loss:.5f}")
            new = args.checkpoint.with_suffix(".new")
            torch.save({"model": model.module.state_dict(), "opt": opt.state_dict()}, new)
            new.replace(args.checkpoint)  # at once or not at all


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="DDP with a cyclical learning rate")
    parser.add_argument("--cycles", type=int, default=4, help="of 40 steps, in all (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="file to go on from")
    dist.init_process_group()  # torchrun has said who is who
    train(parser.parse_args())  # whose model is gone before the group is: gloo would hang
    dist.destroy_process_group()
