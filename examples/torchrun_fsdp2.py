"""FSDP2 with a cyclical learning rate, in a run that survives being killed.

    torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py --steps 300 --checkpoint run

On GPUs where there are any, else on the CPU; without torchrun it is a single rank. Started again,
on any number of ranks, it goes on from its latest checkpoint, wherever in a cycle that is.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from clr_optim import CyclicalOptimizer
from clr_optim.demo.train import Digits, accuracy, build_network, split_digits

BATCH = 50  # over all ranks, so that their number does not change the course


def save(folder: Path, model: nn.Module, opt: CyclicalOptimizer) -> None:
    """A new folder, then a pointer to it: a save that is killed leaves the one before in force."""
    name = f"step-{opt.iteration}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder / name, ignore_errors=True)  # what a killed save has left
    dist.barrier()
    states = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
    dcp.save(states, checkpoint_id=folder / name)
    if dist.get_rank() == 0:  # gets here only after all ranks have written their parts
        (folder / "latest.new").write_text(name)
        (folder / "latest.new").replace(folder / "latest")  # at once or not at all


def resume(folder: Path, model: nn.Module, opt: CyclicalOptimizer) -> None:
    """Load the latest checkpoint, if there is one; the ranks need not be as many as saved it."""
    if (folder / "latest").exists():
        states = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
        dcp.load(states, checkpoint_id=folder / (folder / "latest").read_text())
        set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["opt"])


def main() -> None:
    parser = argparse.ArgumentParser(description="FSDP2 with a cyclical learning rate")
    parser.add_argument("--steps", type=int, default=300, help="to take in all (%(default)s)")
    parser.add_argument("--step-size", type=int, default=50, help="half a cycle (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="folder that all ranks see; else no saving")
    parser.add_argument("--save-every", type=int, default=25, help="in steps (%(default)s)")
    args = parser.parse_args()

    backend, device, options = "gloo", torch.device("cpu"), {}
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        options["device_id"] = device
    if "RANK" not in os.environ:  # torchrun would have set it
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, **options)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same first weights on all ranks, of which each keeps a part
    model = build_network().to(device)
    mesh = init_device_mesh(device.type, (world,))
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = CyclicalOptimizer(  # after fully_shard, which replaces the parameters
        torch.optim.AdamW(model.parameters(), lr=0.02),
        policy="triangular2",
        step_size_up=args.step_size,
        max_grad_norm=1.0,  # of all ranks' gradients together
    )
    if args.checkpoint:
        resume(args.checkpoint, model, opt)

    train, test = (Digits(d.images.to(device), d.labels.to(device)) for d in split_digits())
    while (step := opt.iteration) < args.steps:
        # The step alone decides on the batch: there is no sampler to save.
        epoch, i = divmod(step, len(train.labels) // BATCH)
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(epoch))
        mine = order[i * BATCH : (i + 1) * BATCH][rank::world]
        images, labels = train.images[mine], train.labels[mine]

        # FSDP averages over ranks, whose shares may differ by one: sums weigh all images alike.
        loss = functional.cross_entropy(model(images), labels, reduction="sum") * world / BATCH
        opt.zero_grad()
        loss.backward()
        lr = opt.get_last_lr()[0]
        opt.step()  # clips, updates, moves on in the cycle

        last = opt.iteration == args.steps
        if last or opt.iteration % 10 == 0:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                print(
                    f"step {opt.iteration}  cycle {opt.cycle:.2f}  lr {lr:.6f}  loss {mean:.5f}"
                    f"  grad norm {opt.grad_norm:.5f}",
                    flush=True,
                )
        if args.checkpoint and (last or opt.iteration % args.save_every == 0):
            save(args.checkpoint, model, opt)

    result = accuracy(model, test)  # on all ranks, since each holds a part of every layer
    if rank == 0:
        print(f"test accuracy {result:.2f} %")
    dist.destroy_process_group()
    if backend == "gloo":
        time.sleep(0.5)  # its threads still let go of tensors, and abort a Python that is ending


if __name__ == "__main__":
    main()
