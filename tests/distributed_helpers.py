"""Processes for tests on several ranks. They start once and run one function after another.

A test hands a function of its module to :class:`Ranks`. Every process calls the function under a
new process group (gloo, on the CPU), with warnings as errors.
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

#: Seconds after which a test fails whose ranks wait for one another.
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
                # torch raises these for its own code.
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
                dist.init_process_group(
                    "gloo",
                    rank=rank,
                    world_size=world,
                    store=dist.FileStore(store, world),
                    timeout=datetime.timedelta(seconds=TIMEOUT_S / 2),
                )
                dist.barrier()  # no process may end before another has found it
                try:
                    result = getattr(importlib.import_module(module), name)(*args)
                finally:
                    dist.destroy_process_group()
            connection.send((True, result))
        except BaseException:  # the test raises it
            connection.send((False, traceback.format_exc()))


class Ranks:
    """Up to ``most`` processes. The first test that asks for one starts them all."""

    def __init__(self, most: int, folder: Path) -> None:
        self._most = most
        self._folder = folder
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._jobs = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(*args)`` on ranks 0 to ``world - 1``.

        Return their results, which must pickle.
        """
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
            self.close()  # the other ranks may still wait
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failed))
        return [result for _, result in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Without this each process would warn about the number of threads.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for rank in range(self._most):
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, child_end), daemon=True)
            process.start()
            child_end.close()
            self._processes.append(process)
            self._connections.append(parent_end)

    def close(self) -> None:
        """End the processes. The next test starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []
