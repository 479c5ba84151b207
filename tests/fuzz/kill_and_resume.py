"""Kill a trainer again and again. It must come to where a trainer comes that was never killed.

    make fuzz-kill KILLS=100

This process forks workers. It has imported torch and computed nothing. A worker trains, saves, and
tells in shared memory what it does. SIGKILL kills the worker at a random moment of a chosen phase.
The phases are a step and a save. The next worker resumes from the last complete checkpoint. In the
end another worker trains from the beginning and is not killed. At every step from which a worker
resumed, and at the end, parameters, optimizer and random numbers must be the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clr_optim import CyclicalOptimizer
from clr_optim.core.ordinary import OrdinarySteps
from clr_optim.kernels.native import load
from clr_optim.plan import Plan

PHASES = ("starts", "steps", "computes", "saves")
#: in turn
KILLED_IN = ("steps", "saves")
SAVE_EVERY = 3
#: the threads of a step
THREADS = 2

#: Seconds after which a worker is given up that has neither ended nor reached its moment.
PATIENCE = 120.0

_FORK = multiprocessing.get_context("fork")


def save_atomically(state: Any, path: Path) -> None:
    """Save so that either the old checkpoint or the new one exists, whenever the process dies."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_carelessly(state: Any, path: Path) -> None:
    """Save in place, as careless code does. The tool must find this mistake."""
    torch.save(state, path)


def save_forgetfully(state: Any, path: Path) -> None:
    """Save without the state of the random numbers. The tool must find this mistake."""
    save_atomically({**state, "random": torch.Generator().get_state()}, path)


SAVERS = {
    "atomically": save_atomically,
    "carelessly": save_carelessly,
    "forgetfully": save_forgetfully,
}


class Trainer:
    """A model that the native kernels train, with everything that a run depends on."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        # Large enough for steps that take time and several threads.
        self.model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 4))
        inner = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.opt = CyclicalOptimizer(
            inner, "exp_range", step_size_up=5, gamma=0.999, backend="native", max_grad_norm=1.0,
            cycle_momentum=True,
        )  # fmt: skip

    def backward(self) -> None:
        """Compute gradients with one thread.

        With more threads torch's products of matrices can round otherwise in a new process, if the
        machine is busy.
        """
        self.opt.zero_grad()
        torch.set_num_threads(1)
        x = torch.randn(8, 300)
        (self.model(x) - x[:, :4]).square().mean().backward()
        torch.set_num_threads(THREADS)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "random": torch.get_rng_state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def digest(state: Any) -> str:
    """Return a hash of all bits in a checkpoint."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                total.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            total.update(repr(value).encode())

    add(state)
    return total.hexdigest()


class Moment:
    """A worker's phase and how often it was entered, in memory that outlives the worker."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 64)

    def __call__(self, phase: str) -> None:
        at = PHASES.index(phase)
        self._memory[1 + at] = (self._memory[1 + at] + 1) % 256
        self._memory[0] = at

    @property
    def phase(self) -> str:
        return PHASES[self._memory[0]]

    def count(self, phase: str) -> int:
        return self._memory[1 + PHASES.index(phase)]


Saver = Callable[[Any, Path], None]


def train(
    folder: Path, moment: Callable[[str], None], saver: Saver, steps: int | None = None
) -> None:
    """Resume and train on, up to this many steps if there is a limit."""
    torch.set_num_threads(THREADS)
    checkpoint = folder / "checkpoint.pt"
    moment("starts")
    load()
    trainer = Trainer()
    if checkpoint.exists():
        trainer.resume(torch.load(checkpoint, weights_only=True))
    while steps is None or trainer.opt.iteration < steps:
        moment("computes")
        trainer.backward()
        moment("steps")
        trainer.opt.step()
        moment("computes")
        if trainer.opt.iteration % SAVE_EVERY == 0:
            state = trainer.state()
            moment("saves")
            saver(state, checkpoint)


def never_killed(pipe: Any, wanted: Sequence[int]) -> None:
    """Send the digests of a run from the beginning, at these steps."""
    torch.set_num_threads(THREADS)
    trainer = Trainer()
    found = {}
    for step in range(max(wanted) + 1):
        if step in wanted:
            found[step] = digest(trainer.state())
        if step < max(wanted):
            trainer.backward()
            trainer.opt.step()
    pipe.send(found)


def _forked(target: Callable[..., Any], *arguments: Any) -> Any:
    process = _FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _joined(process: Any) -> int:
    """Return the exit code of a worker that ends by itself."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise LostError(f"a worker did not end within {PATIENCE:g} s")
    return int(process.exitcode)


def _asked(target: Callable[..., Any], *arguments: Any) -> Any:
    here, there = _FORK.Pipe(duplex=False)
    process = _forked(target, there, *arguments)
    there.close()
    if not here.poll(PATIENCE):
        process.kill()
        raise LostError(f"a worker did not answer within {PATIENCE:g} s")
    answer = here.recv()
    process.join()
    return answer


def _read(pipe: Any, checkpoint: Path) -> None:
    """Return step and digest of a checkpoint, read in another process."""
    if not checkpoint.exists():
        pipe.send((0, None))
        return
    try:
        state = torch.load(checkpoint, weights_only=True)
    except Exception as error:
        pipe.send((-1, f"{type(error).__name__}: {error}"))
        return
    pipe.send((state["optimizer"]["param_groups"][0]["clr_step"], digest(state)))


class LostError(Exception):
    """A kill has cost more than the steps since the last checkpoint."""


class Run:
    """A run in a folder, and the digests of its checkpoints after each kill."""

    def __init__(self, folder: Path, saver: Saver = save_atomically) -> None:
        self.folder, self.saver = folder, saver
        self.killed: Counter[str] = Counter()
        self.seen: dict[int, str] = {}
        self.last = 0

    def after(self, phase: str) -> None:
        """Check what a kill has left."""
        self.killed[phase] += 1
        step, found = _asked(_read, self.folder / "checkpoint.pt")
        if step < 0:
            raise LostError(f"killed while it {phase}, the checkpoint does not load: {found}")
        if step < self.last:
            raise LostError(f"killed while it {phase}: from step {self.last} back to {step}")
        if found is not None and self.seen.setdefault(step, found) != found:
            raise LostError(f"killed while it {phase}: step {step} is not what it was")
        self.last = step

    def kill_at_random(self, chance: random.Random, wanted: str) -> None:
        """Kill a worker at a random moment of a phase.

        If the phase ends before, the next phase serves.
        """
        moment = Moment()
        process = _forked(train, self.folder, moment, self.saver)
        times = chance.randrange(1, 8)
        patience = time.monotonic() + PATIENCE
        while moment.count(wanted) < times:
            if time.monotonic() > patience:
                process.kill()
                raise LostError(f"within {PATIENCE:g} s no worker came to where it {wanted}")
            if not process.is_alive():
                raise LostError(f"a worker ended by itself with exit code {process.exitcode}")
            time.sleep(0.0002)
        longest = {"steps": 0.002, "saves": 0.01}[wanted]
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.join()
        self.after(moment.phase)

    def kill_at(self, phase: str, owner: Any, name: str, call: int) -> None:
        """Let a worker kill itself in place of the n-th call of a function."""
        process = _forked(self._train_until, owner, name, call)
        if (code := _joined(process)) != -signal.SIGKILL:
            raise LostError(f"a worker ended with exit code {code}, and never called {name}")
        self.after(phase)

    def _train_until(self, owner: Any, name: str, call: int) -> None:
        function, calls = getattr(owner, name), 0

        def deadly(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                for target in arguments:
                    if isinstance(target, Path):
                        target.write_bytes(b"PK, and no more of it")
                    elif hasattr(target, "write"):
                        target.write(b"PK, and no more of it")
                        target.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        setattr(owner, name, deadly)
        enough = self.last + (call + 1) * SAVE_EVERY
        train(self.folder, lambda phase: None, self.saver, enough)

    def finish(self) -> int:
        """Train to the end and compare with a run that was never killed.

        Return the number of steps.
        """
        steps = self.last + 4 * SAVE_EVERY - self.last % SAVE_EVERY
        process = _forked(train, self.folder, lambda phase: None, self.saver, steps)
        if code := _joined(process):
            raise LostError(f"the last worker ended with exit code {code}")
        self.after("ends")
        del self.killed["ends"]
        right = _asked(never_killed, sorted(self.seen))
        wrong = [step for step, found in self.seen.items() if found != right[step]]
        if wrong or self.last != steps:
            raise LostError(f"of {steps} steps, {self.last} done, these are others: {wrong}")
        return steps


#: A phase, and the call of a function in it that is never completed.
MOMENTS: tuple[tuple[str, Any, str, int], ...] = (
    ("saves", torch, "save", 3),  # begun, and not written
    ("saves", os, "fsync", 2),  # written, and not yet renamed
    ("steps", Plan, "commit", 1),  # parameters are new, the position is not
    ("steps", OrdinarySteps, "_hand_down", 3),  # between two steps that native code takes alone
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz-kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed", action="store_true", help="at a few moments, always the same")
    parser.add_argument("--saves", choices=SAVERS, default="atomically")
    given = parser.parse_args(arguments)
    chance = random.Random(given.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), SAVERS[given.saves])
        try:
            for moment in MOMENTS if given.fixed else ():
                run.kill_at(*moment)
            for number in range(0 if given.fixed else given.kills):
                run.kill_at_random(chance, KILLED_IN[number % len(KILLED_IN)])
                if (number + 1) % 10 == 0:
                    told = json.dumps(dict(run.killed))
                    print(f"{number + 1} kills, at step {run.last}: {told}", flush=True)
            steps = run.finish()
        except LostError as error:
            print(f"after {run.killed.total()} kills: {error}", file=sys.stderr)
            return 1
    print(
        f"{run.killed.total()} kills survived in {time.monotonic() - began:.0f} s: "
        + ", ".join(f"{count} while it {phase}" for phase, count in run.killed.most_common())
        + f"; {steps} steps, the same bits as without, at each of {len(run.seen)} checkpoints"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
