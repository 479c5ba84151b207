"""Checkpoints and pickles that clr_optim 0.1.0 wrote are read, and the training goes on.

What is compared, and how closely:

- On load, everything bit for bit: parameters, rates, momenta and our keys in the groups.
- On ``backend="torch"``, every later step bit for bit with the plain torch optimizer.
- On ``native`` and ``triton``, every later step with the plain torch optimizer up to rounding. The
  end of the course must equal the stored end bit for bit wherever every machine agrees: if the
  course needs arithmetic alone (see ``Course.arithmetic``) and the processor has fused
  multiply-add, or if processor and libraries are those that wrote the archive.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import pickletools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from native_helpers import assert_alike, assert_identical, feed
from triton_helpers import INTERPRETED
from write_resume_data import (
    BACKENDS,
    COURSES,
    END,
    SAVED,
    Course,
    give_gradients,
    machine,
    members,
    rates_of,
    read,
    record,
)

from clr_optim import CyclicalOptimizer

#: Relative to the largest value of a tensor, over the steps after the load.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}

archive = functools.cache(read)


def _marked(course: Course, backend: str) -> Any:
    here = (backend == "triton") is INTERPRETED
    why = "needs TRITON_INTERPRET=1" if backend == "triton" else "runs without TRITON_INTERPRET=1"
    marks = [pytest.mark.skipif(not here, reason=why)]
    return pytest.param(course, backend, marks=marks, id=f"{course.name}-{backend}")


FILES = [
    _marked(course, backend)
    for backend in BACKENDS
    for course in COURSES
    if backend in course.backends
]


def _is_certain(course: Course, backend: str) -> bool:
    """Whether this machine must come to every bit of the end that is stored."""
    written = json.loads(archive(backend)["written_by.json"])
    if all(written[name] == value for name, value in machine().items()):
        return True
    has_fma = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return course.arithmetic and backend != "torch" and has_fma


def _plain(course: Course, saved: Any, state: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer where the course was cut."""
    plain = course.plain()
    _set_params(plain, saved["params"])
    plain.load_state_dict(state)
    return plain


def _set_params(opt: torch.optim.Optimizer, values: Any) -> None:
    for p, value in zip(members(opt), values, strict=True):
        p.data.copy_(torch.tensor(value, dtype=torch.float64))


def _same_rates(opt: CyclicalOptimizer[Any], stored: Any, exact: bool) -> None:
    for found, wanted in zip(rates_of(opt), stored, strict=True):
        assert found == wanted if exact else found == pytest.approx(wanted, rel=1e-14, abs=0)
    assert opt.get_last_lr() == [rates[0] for rates in rates_of(opt)]


@pytest.mark.parametrize("how", ["checkpoint", "pickle"])
@pytest.mark.parametrize(("course", "backend"), FILES)
def test_a_training_goes_on(course, backend, how):
    files = archive(backend)
    stored = json.loads(files[f"{course.name}/expected.json"])
    saved = stored["saved"]

    def state() -> Any:
        return torch.load(io.BytesIO(files[f"{course.name}/state.pt"]), weights_only=True)

    if how == "pickle":
        opt = pickle.loads(files[f"{course.name}/optimizer.pickle"])
        assert type(opt.optimizer) is course.cls
        assert opt.schedule == course.make("torch").schedule
    else:
        opt = course.make(backend)
        _set_params(opt, saved["params"])
        opt.load_state_dict(state())
    assert type(opt) is CyclicalOptimizer
    assert opt.iteration == SAVED
    assert record(opt) == saved

    plain = _plain(course, saved, state())
    assert_identical(opt, plain)
    certain = _is_certain(course, backend)
    for step, rates in zip(range(SAVED, END), stored["rates"], strict=True):
        _same_rates(opt, rates, course.arithmetic or certain)
        feed(plain, opt)
        for each in (opt, plain):
            give_gradients(each, step)
            if each is plain and course.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(members(plain), course.max_grad_norm)
            each.step()
        if backend == "torch":
            assert_identical(opt, plain)
        elif course.dtype in ROUNDING:  # torch's bfloat16 rounds after every operation
            assert_alike(opt, plain, ROUNDING[course.dtype])

    assert backend in opt.explain()
    assert opt.iteration == END
    _same_rates(opt, stored["end"]["rates"], course.arithmetic or certain)
    assert record(opt)["keys"] == stored["end"]["keys"]
    if certain:
        assert record(opt) == stored["end"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_archive_holds_every_course(backend):
    """If a row of the table were deleted, its file would no longer be read."""
    found = {name.partition("/")[0] for name in archive(backend)} - {"written_by.json"}
    assert found == {course.name for course in COURSES if backend in course.backends}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pickles_name_public_classes_alone(backend):
    """A later version must keep these names where they are, and no others."""
    named = {
        name
        for file, data in archive(backend).items()
        if file.endswith(".pickle")
        for name in _names_in(data)
    }
    assert {name for name in named if name.startswith("clr_optim")} == {
        "clr_optim.optimizer.CyclicalOptimizer",
        "clr_optim.schedule.Schedule",
        "clr_optim.schedule.Phase",
    }


def _names_in(data: bytes) -> Iterator[str]:
    """Return the classes and functions that a pickle names."""
    texts: list[str] = []
    memo: list[str | None] = []
    latest: str | None = None
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        if opcode.name == "MEMOIZE":
            memo.append(latest)
        if opcode.name in ("BINGET", "LONG_BINGET"):
            value = memo[value]
        latest = value if isinstance(value, str) else None
        if latest is not None:
            texts.append(latest)
