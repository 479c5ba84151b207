"""Several processes for tests of what runs on several: started once, given functions to run.

A test hands the name of a function of its module to :class:`Ranks`; every process calls it under a
process group of its own (gloo, on the CPU), with the warnings of ordinary tests as errors.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: A collective that some rank never joins ends the test, after so long.
TIMEOUT_S = 120.0


def _serve(rank: int, connection: Any) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        module, name, world, store, args = job
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # torch's own, of its own making.
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
                dist.init_process_group(
                    "gloo",
                    rank=rank,
                    world_size=world,
                    store=dist.FileStore(store, world),
                    timeout=datetime.timedelta(seconds=TIMEOUT_S / 2),
                )
                dist.barrier()  # or one might be gone before another has found it
                try:
                    result = getattr(importlib.import_module(module), name)(*args)
                finally:
                    dist.destroy_process_group()
            connection.send((True, result))
        except BaseException:  # whatever it is, the test is to tell
            connection.send((False, traceback.format_exc()))


class Ranks:
    """Up to ``most`` processes, started when the first test asks for one."""

    def __init__(self, most: int, folder: Path) -> None:
        self._most = most
        self._folder = folder
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._jobs = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on ranks 0 to ``world - 1``; their results, which must pickle."""
        assert world <= self._most
        if not self._processes:
            self._start()
        self._jobs += 1
        store = str(self._folder / f"store-{self._jobs}")
        job = (function.__module__, function.__name__, world, store, args)
        for connection in self._connections[:world]:
            connection.send(job)
        answers = []
        for rank, connection in enumerate(self._connections[:world]):
            if not connection.poll(TIMEOUT_S):
                self.close()
                raise AssertionError(f"rank {rank} of {world} did not answer: {job}")
            try:
                answers.append(connection.recv())
            except EOFError:
                self.close()
                raise AssertionError(f"rank {rank} of {world} died: {job}") from None
        failed = [(rank, text) for rank, (good, text) in enumerate(answers) if not good]
        if failed:
            self.close()  # who knows in which state the others are
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failed))
        return [result for _, result in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Otherwise each would warn about it.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for rank in range(self._most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def close(self) -> None:
        """End the processes; the next test starts others."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []
