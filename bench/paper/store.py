"""Keep results and checkpoints of runs in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from clr_optim.bench.paper.known import KNOWN
from clr_optim.bench.paper.one_run import Run
from clr_optim.options import make_folder

__all__ = ["Store", "key"]


class Store:
    """A folder of results: one line per finished run, one checkpoint per unfinished run.

    Several processes may share a folder if their rows or seeds differ.

    Args:
        folder: the folder.
        create: whether to create a folder that does not exist, to write into.

    Raises:
        OSError: naming ``--out``, if ``create`` is true and no file can be written there.
    """

    def __init__(self, folder: str | Path, *, create: bool = True) -> None:
        self.folder = make_folder("--out", folder) if create else Path(folder)
        self.results = self.folder / "results.jsonl"

    def is_empty(self) -> bool:
        """Whether the folder has neither results nor checkpoints."""
        return not self.results.exists() and not list(self.folder.glob("checkpoint-*.pt"))

    def read(self) -> list[dict[str, Any]]:
        """Return the finished runs; ignore an incomplete last line.

        Raises:
            ValueError: naming the line that holds no result of a run.
        """
        if not self.results.exists():
            return []
        *lines, _incomplete = self.results.read_text(encoding="utf-8").split("\n")
        runs: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                KNOWN[key(run)[0]]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.results}, line {number}: no result of a run") from error
            runs.append(run)
        return runs

    def append(self, result: Mapping[str, Any]) -> None:
        """Add a finished run, and wait until the disk has it."""
        line = json.dumps(result, ensure_ascii=False).encode() + b"\n"
        with self.results.open("ab+") as file:
            file.seek(0)
            whole, newline, incomplete = file.read().rpartition(b"\n")
            if incomplete:
                file.truncate(len(whole + newline))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def checkpoint(self, row: str, seed: int) -> Path:
        """Return the path of a run's checkpoint."""
        return self.folder / f"checkpoint-{row}-{seed}.pt"

    def save(self, run: Run) -> None:
        """Write a checkpoint. If the machine stops meanwhile, the old checkpoint stays whole."""
        path = self.checkpoint(run.row.name, run.seed)
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            torch.save(run.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)

    def load(self, run: Run) -> bool:
        """Continue ``run`` from its checkpoint.

        Returns:
            Whether the run has a checkpoint.

        Raises:
            ValueError: naming the file, if it is no checkpoint of this run.
        """
        path = self.checkpoint(run.row.name, run.seed)
        if not path.exists():
            return False
        try:
            state = torch.load(path, weights_only=True)
            run.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, UnpicklingError) as error:
            raise ValueError(
                f"{path}: no checkpoint of a run ({type(error).__name__}: {error}); remove it to "
                "begin the run anew"
            ) from error
        return True

    def drop_checkpoint(self, row: str, seed: int) -> None:
        """Remove the checkpoint of a finished run."""
        self.checkpoint(row, seed).unlink(missing_ok=True)


def key(result: Mapping[str, Any]) -> tuple[str, int]:
    """Return row and seed of a result."""
    return str(result["row"]), int(result["seed"])
