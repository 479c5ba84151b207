"""The table of optimizer cases: its rows reach the kernels that they name, and miss none."""

from __future__ import annotations

import pytest
from cases import (
    BY_NAME,
    EVERY_CLASS,
    EVERY_KERNEL,
    OTHER_IMPLEMENTATIONS,
    WITH_KERNEL,
    WITHOUT_KERNEL,
    Case,
    Problem,
)
from internals import kernels_of

from clr_optim.rules import KERNELS, SHIPPED, STATE_SLOTS

ROWS = [*WITH_KERNEL, *OTHER_IMPLEMENTATIONS, *WITHOUT_KERNEL]


def test_no_two_rows_are_the_same():
    assert len(BY_NAME) == len(ROWS)
    unlike = {(c.cls, str(sorted(c.options.items())), str(sorted(c.wrap.items()))) for c in ROWS}
    assert len(unlike) == len(ROWS)


def test_every_kernel_and_every_class_has_a_row():
    assert [case.kernel for case in EVERY_KERNEL] == list(KERNELS)
    assert {case.cls for case in EVERY_CLASS} >= set(STATE_SLOTS)


def test_rules_fit_into_the_rows_of_a_table():
    for rule in SHIPPED.values():
        assert len(rule.scalar_states) <= rule.has_step  # the row's counter, and one scalar
        assert all(len(slots) <= 3 for slots in rule.kernels.values())


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_a_row_reaches_its_kernel(case: Case, monkeypatch):
    monkeypatch.delenv("CLR_OPTIM_BACKEND", raising=False)
    problem = Problem(case)
    opt = case.ours(problem.params)
    problem.step(opt, 0, case.closure)
    assert kernels_of(opt) == ({case.kernel} if case.kernel else set())
