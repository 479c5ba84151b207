"""Python and C++ agree on structures, answers, and the order of kernels and dtypes."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from places import ROOT

from clr_optim.kernels.native import load
from clr_optim.plan import DTYPES
from clr_optim.plan.structures import BUCKET, ROW, Answer, Scan, View
from clr_optim.rules import KERNELS


def view_h() -> str:
    """The C++ declarations, without comments."""
    folder = ROOT / "kernels/native"
    source = "".join((folder / name).read_text() for name in ("kernels.h", "view.h"))
    return re.sub("//.*", "", source)


def fields_of(name: str) -> list[str]:
    """The fields of a C++ structure in their order; an array counts as numbered fields."""
    (body,) = re.findall(rf"struct {name} {{(.*?)}};", view_h(), re.DOTALL)
    found = []
    for declaration in body.split(";"):
        if declaration.strip():
            (field, length) = re.findall(r"(\w+)(?:\[(\d+)\])?$", declaration.strip())[0]
            found += [f"{field}{i}" for i in range(int(length))] if length else [field]
    return found


@pytest.mark.parametrize("structure", [Scan, View])
def test_structures_have_the_same_fields(structure):
    found = fields_of(structure.__name__)
    assert found == [name for name, _ in structure._fields_]
    assert ctypes.sizeof(structure) == 8 * len(found)
    assert [getattr(structure, name).offset for name in found] == [*range(0, 8 * len(found), 8)]


@pytest.mark.parametrize(("name", "dtype"), [("Row", ROW), ("Bucket", BUCKET)])
def test_tables_have_the_same_columns(name, dtype):
    found = fields_of(name)
    assert found == list(dtype.names)
    assert dtype == np.dtype([(field, np.int64) for field in found])


def test_answers_have_the_same_numbers():
    (body,) = re.findall(r"enum Answer {(.*?)};", view_h(), re.DOTALL)
    found = {name: int(value) for name, value in re.findall(r"(\w+) = (-?\d+),", body)}
    assert len(found) == 9
    assert found == {name: value for name, value in vars(Answer).items() if name.isupper()}


def test_kernels_have_the_same_order():
    assert load().kernel_names() == tuple(KERNELS)


def test_dtypes_have_the_same_order():
    found = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert list(load().dtype_names()) == found
