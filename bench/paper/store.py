"""Store."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from clr_optim.bench.paper.one_run import Run
from clr_optim.bench.paper.rows import ROWS

__all__ = ["Store", "key"]


class Store:
    """The folder of results: a line for each finished run, a checkpoint for each begun one.

    Several processes may share it if their rows or seeds differ.

    Args:
        folder: made if it is not there.
        made: whether it may be made.
    """

    def __init__(self, folder: str | Path, *, made: bool = True) -> None:
        self.folder = Path(folder)
        if made:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.results = self.folder / "results.jsonl"

    def is_empty(self) -> bool:
        """Whether nothing was ever begun here."""
        return not self.results.exists() and not list(self.folder.glob("checkpoint-*.pt"))

    def read(self) -> list[dict[str, Any]]:
        """The finished runs; the rest of a line whose writing was cut off is not one.

        Raises:
            ValueError: naming the line that is none of ours.
        """
        if not self.results.exists():
            return []
        *lines, _cut_off = self.results.read_text(encoding="utf-8").split("\n")
        runs: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                ROWS[key(run)[0]]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.results}, line {number}: no result of a run") from error
            runs.append(run)
        return runs

    def append(self, result: Mapping[str, Any]) -> None:
        """Add a finished run, on the disk when this returns."""
        line = json.dumps(result, ensure_ascii=False).encode() + b"\n"
        with self.results.open("ab+") as file:
            file.seek(0)
            whole, newline, cut_off = file.read().rpartition(b"\n")
            if cut_off:
                file.truncate(len(whole + newline))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def checkpoint(self, row: str, seed: int) -> Path:
        """Where a run's checkpoint lies."""
        return self.folder / f"checkpoint-{row}-{seed}.pt"

    def save(self, run: Run) -> None:
        """Write a checkpoint; whenever the machine stops, this or the one before is whole."""
        path = self.checkpoint(run.row.name, run.seed)
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            torch.save(run.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)

    def load(self, run: Run) -> bool:
        """Have ``run`` go on from its checkpoint; whether there is one."""
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
        """Remove what a finished run no longer needs."""
        self.checkpoint(row, seed).unlink(missing_ok=True)


def key(result: Mapping[str, Any]) -> tuple[str, int]:
    return str(result["row"]), int(result["seed"])
