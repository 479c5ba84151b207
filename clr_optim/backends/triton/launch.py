"""A bucket's launches: its rows, gradients, chunks and constants on the device, and the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.backends import device as current
from clr_optim.backends.triton.mirror import Mirror
from clr_optim.backends.triton.prebound import AddressTable, Call, RowCall, launch
from clr_optim.plan import Bucket

__all__ = ["Launch", "most_programs"]

# A chunk has few blocks, so that the last programs of a launch end together. A launch of many
# programs rather has larger chunks, as each program reads tables first.
_FEW_BLOCKS, _MANY_BLOCKS = 2, 8

# A launch of more rounds of programs has many blocks per chunk. A round is what runs at a time: so
# many programs on each processor.
_ROUNDS = 16
_RESIDENT = 6

# Up to this number of programs, each computes its constants: see `whole_step`.
_MOST_PROGRAMS = 2000


class Launch:
    """The tables of a bucket on its device, and the launches that read them.

    The rows seldom change, so the device has them from an earlier step. The addresses of the
    gradients come from the host whenever they differ.
    """

    def __init__(self, bucket: Bucket) -> None:
        from clr_optim.kernels.triton import multi_tensor

        self.bucket = bucket
        self._compiled_for = multi_tensor.constants_for(
            bucket.kernel,
            bucket.rule_slots,
            bucket.dtype,
            bucket.number_dtypes,
            bucket.average,
            bucket.has_masters,
            current.warp(bucket.device),
        )
        self._lanes = self._compiled_for.prepare["LANES"]
        self._rows, self._gradients, self._chunks = (Mirror(bucket.device) for _ in range(3))
        self._constants: Tensor | None = None
        # The editions of the bucket that rows and chunks on the device come from.
        self._edition = self._edition_of_chunks = -1
        self._numels: list[int] = []
        self._row_kernel: Any = None  # the compiled kernel that updates a row
        self._blocks = _FEW_BLOCKS
        self._takes_whole_step = False
        self._passed: list[int] = []
        self._reads_table = False
        #: programs of an update, one per chunk
        self.count = 0

    # ---- the tables

    def refresh(
        self, *, is_alone: bool, clips: bool, is_done: Callable[[Tensor], bool] | None = None
    ) -> None:
        """Bring the tables on the device up to date.

        Args:
            is_alone: whether the step has no other launch on this device.
            clips: whether the step needs the norm of the gradients.
            is_done: tells which parameters a backward pass has updated; None: none.

        Raises:
            RuntimeError: if the step is being captured, and anything but the addresses of the
                gradients changed.
        """
        bucket = self.bucket
        gradients = bucket.gradients
        if is_done is not None and bucket.average is not None:
            gradients = self._without_done(is_done)
        self.refresh_rows()
        if bucket.edition != self._edition_of_chunks:
            self._take_chunks(bucket.table)
            self._edition_of_chunks = bucket.edition
        self._takes_whole_step = is_alone and self.count <= most_programs(bucket.device)
        self._passed = self._passed_in(gradients) if self._takes_whole_step else []
        self._reads_table = clips or not self._passed
        if not self._reads_table:
            return
        if current.is_capturing():
            self._gradients.put_in_graph(gradients)
        else:
            self._gradients.put(gradients)
            self._gradients.stage()

    def refresh_rows(self) -> None:
        """Bring the rows on the device up to date, for launches of single rows."""
        bucket = self.bucket
        if bucket.edition == self._edition:
            return
        table = bucket.table
        # Upload first: if a capture refuses the upload, nothing else has changed.
        self._rows.fill(table.view(np.int64).reshape(len(table), -1))
        self._numels = table["numel"].tolist()
        self._edition = bucket.edition

    def _without_done(self, is_done: Callable[[Tensor], bool]) -> npt.NDArray[np.int64]:
        """Return the addresses of the gradients, with a mark at rows that are updated already."""
        from clr_optim.kernels.triton.prepare import DONE

        gradients = self.bucket.gradients.copy()
        gradients[[is_done(param) for param in self.bucket.params]] = DONE
        return gradients

    def _take_chunks(self, table: npt.NDArray[Any]) -> None:
        from clr_optim.kernels.triton import prepare

        bucket = self.bucket
        pairs = self._chunks_of(table)
        self._chunks.put(pairs)
        self.count = len(pairs)
        shape = (len(table), prepare.WIDTH)
        if self._constants is None or self._constants.shape != shape:
            wide = bucket.dtype == torch.float64
            self._constants = torch.empty(
                shape, dtype=torch.float64 if wide else torch.float32, device=bucket.device
            )

    def _chunks_of(self, table: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """Return the chunks of the rows, ``(row, chunk)`` each: one at least, perhaps empty."""
        block = self._compiled_for.multi_tensor["BLOCK"]
        blocks = -(-table["numel"] // block)
        in_round = _RESIDENT * current.processors(self.bucket.device)
        many = blocks.sum() > _ROUNDS * _FEW_BLOCKS * in_round
        self._blocks = _MANY_BLOCKS if many else _FEW_BLOCKS
        chunks = -(-blocks // self._blocks)
        of_row = np.repeat(np.arange(len(table)), chunks)
        index = np.arange(len(of_row)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        pairs = np.stack([of_row, index], axis=1).astype(np.int32)
        return pairs if len(pairs) else np.zeros((1, 2), dtype=np.int32)

    @staticmethod
    def _passed_in(gradients: npt.NDArray[np.int64]) -> list[int]:
        """Return the addresses that travel as arguments; none if there are too many."""
        from clr_optim.kernels.triton.multi_tensor import PASSED

        if len(gradients) > PASSED:
            return []
        return [*gradients.tolist(), *[0] * (PASSED - len(gradients))]

    def tables(self) -> Iterator[Tensor | None]:
        """Return the tables on the device."""
        yield from (self._rows.table, self._gradients.table, self._chunks.table, self._constants)

    def address_table(self) -> AddressTable:
        """Return the table of addresses that native code keeps up to date."""
        return AddressTable(self.bucket, self._gradients.table if self._reads_table else None)

    def note_uploads(self, launches: Any) -> None:
        """Take note of the addresses that native code has uploaded.

        Args:
            launches: the launches that native code has made, see :mod:`.prebound`.
        """
        if self._reads_table:
            self._gradients.note(launches.addresses(self.bucket.native))

    def doubt_uploads(self) -> None:
        """Upload the addresses again in the next step."""
        self._gradients.forget()

    def give_up(self) -> list[object]:
        """Return the tables that a captured step reads, and writes at every replay."""
        given: list[object] = [self._rows.lend(), self._chunks.lend(), self._constants]
        return [*given, self._gradients.give_up()] if self._reads_table else given

    # ---- the kernels

    def sum_squares(self, scale: Tensor, sums: Tensor) -> Call:
        """Sum the squares of the gradients, chunk by chunk.

        Args:
            scale: the factor that the gradients in memory carry, float32.
            sums: receives the sums, float64, one per chunk.
        """
        from clr_optim.kernels.triton import gate

        rows, gradients, chunks, _ = self.tables()
        return launch(
            gate.sum_of_squares, (self.count,),
            (chunks, rows, gradients, self._blocks, scale, sums),
            self._compiled_for.sum_of_squares,
        )  # fmt: skip

    def update(self, tables: tuple[Any, ...], *, is_last: bool) -> list[Call]:
        """Update the bucket's tensors, and advance their step counters.

        Args:
            tables: as :meth:`Clock.tables` returns them.
            is_last: whether the step has no further launch on this device, so that this one
                advances the position.
        """
        from clr_optim.kernels.triton import multi_tensor, prepare

        rows, gradients, chunks, constants = self.tables()
        count = len(self.bucket.params)
        if self._takes_whole_step:
            if gradients is None:  # all addresses are passed, and no gradient is read from here
                gradients = rows
            passed = self._passed or [0] * multi_tensor.PASSED
            return [
                launch(
                    multi_tensor.whole_step, (self.count,),
                    (chunks, rows, gradients, self._blocks, count, *tables, *passed),
                    {"ARE_PASSED": bool(self._passed), **self._compiled_for.whole_step},
                    (self.bucket, "g0") if self._passed else None,
                )
            ]  # fmt: skip
        return [
            launch(
                prepare.prepare, (-(-count // self._lanes),),
                (rows, gradients, count, constants, *tables, int(is_last)),
                self._compiled_for.prepare,
            ),
            launch(
                multi_tensor.multi_tensor, (self.count,),
                (chunks, rows, gradients, constants, self._blocks),
                self._compiled_for.multi_tensor,
            ),
        ]  # fmt: skip

    def update_row(self, index: int, gradient: int, tables: tuple[Any, ...]) -> None:
        """Update one tensor, and advance its step counter alone.

        Args:
            index: the number of the row.
            gradient: the address of its gradient.
            tables: as :meth:`Clock.tables` returns them.
        """
        from clr_optim.kernels.triton import row_step

        programs, blocks = self._shape_of_row(index)
        done = launch(
            row_step.row_step, (programs,),
            self._arguments_of_row(index, gradient, blocks, tables), self._compiled_for.whole_step,
        )  # fmt: skip
        self._row_kernel = done.compiled

    def row_call(self, tables: tuple[Any, ...]) -> RowCall | None:
        """Return the launch of a row for native code; None before the first :meth:`update_row`."""
        if self._row_kernel is None:
            return None
        call = Call(self._row_kernel, (1,), self._arguments_of_row(0, 0, 1, tables))
        return RowCall(call, self.bucket, self._shape_of_row)

    def _shape_of_row(self, index: int) -> tuple[int, int]:
        """Return the programs that update a row, and the blocks per chunk."""
        blocks = -(-self._numels[index] // self._compiled_for.whole_step["BLOCK"])
        in_round = _RESIDENT * current.processors(self.bucket.device)
        # Each program computes the constants, so more than a round of programs would take longer.
        in_chunk = max(_FEW_BLOCKS, -(-blocks // in_round))
        return max(1, -(-blocks // in_chunk)), in_chunk

    def _arguments_of_row(
        self, index: int, gradient: int, blocks: int, tables: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        groups, width, ints, floats, phases, control, gate, *_ = tables
        rows = self._rows.table
        return rows, index, gradient, blocks, groups, width, ints, floats, phases, control, gate


@functools.cache
def most_programs(device: torch.device) -> int:
    """Return up to how many programs a step takes one launch, and not two.

    In one launch each program computes the constants, in float64. Many GPUs compute that slowly:
    there, one launch serves if no processor has more than one program.
    """
    return _MOST_PROGRAMS if current.has_fast_float64(device) else current.processors(device)
