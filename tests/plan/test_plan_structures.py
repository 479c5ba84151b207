"""Python and C++ agree on the order of kernels, dtypes and columns."""

from __future__ import annotations

import re

from places import ROOT

from clr_optim.backends.native import library
from clr_optim.plan import DTYPES
from clr_optim.rules import KERNELS


def test_kernels_have_the_same_order():
    assert library().kernel_names() == tuple(KERNELS)


def test_dtypes_have_the_same_order():
    assert library().dtype_names() == tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def test_a_row_has_the_columns_that_are_named():
    source = (ROOT / "kernels/native/kernels.h").read_text()
    (body,) = re.findall(r"struct Row {(.*?)};", re.sub("//.*", "", source), re.DOTALL)
    found = []
    for name, length in re.findall(r"(\w+)(?:\[(\d+)\])?;", body):
        found += [f"{name}{i}" for i in range(int(length))] if length else [name]
    assert tuple(found) == library().ROW


def test_answers_have_different_numbers():
    lib = library()
    for names in (
        "ALL_ACTIVE SOME_IDLE CHANGED GROUPS_CHANGED SETTINGS_CHANGED STATE_CHANGED WOKEN NESTED",
        "TAKEN OUT_OF_VALUES OBSERVED REPLACED WRITTEN OUTDATED IN_USE UNSERVED SKIPPED",
    ):
        numbers = [getattr(lib, name) for name in names.split()]
        assert numbers == [*range(len(numbers))]
