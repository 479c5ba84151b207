"""Write the archives in tests/data/resume: checkpoints and pickles in the middle of a training.

    python tests/write_resume_data.py torch native
    TRITON_INTERPRET=1 python tests/write_resume_data.py triton

clr_optim 0.1.0 wrote the archives. They represent the files of users: every later version must read
them. Never write an archive again to make a test pass. This script refuses to overwrite one.

An archive holds a folder for each course. ``state.pt`` is ``torch.save(opt.state_dict())``,
``optimizer.pickle`` is ``pickle.dumps(opt)``, both after ``SAVED`` steps. ``expected.json`` holds
parameters and groups then and after ``END`` steps, and the rates and momenta of the steps between.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import lzma
import pickle
import platform
import random
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from places import TESTS
from torch import Tensor
from torch.nn import Parameter

from clr_optim import CyclicalOptimizer, __version__
from clr_optim.schedule import Schedule, one_cycle, sequence, triangular, triangular2

FOLDER = TESTS / "data" / "resume"
BACKENDS = ("torch", "native", "triton")

#: Steps before the files were written, and in all. A cycle of 8 steps is cut on its way down.
SAVED, END = 6, 15
#: The step at which the last parameter gets its first gradient.
LATE = 8
SHAPES = ((3, 4), (7,), ())

_optim = torch.optim
_FUSED = (_optim.SGD, _optim.Adam, _optim.AdamW, _optim.Adagrad, _optim.Adadelta, _optim.RMSprop)
_CYCLED = {"cycle_momentum": True, "base_momentum": 0.6, "max_momentum": 0.95}


@dataclass(frozen=True)
class Course:
    """An optimizer, a schedule and options of the wrapper.

    ``arithmetic`` says that rates and scalars need no ``exp2``, ``pow`` or ``cos``. Then C++ and
    interpreter only add, multiply, divide and take roots, in a fixed order, and a processor with
    fused multiply-add must reproduce every bit. Other functions come from a machine's own library.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    policy: str | Schedule = "triangular"
    wrap: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    lr: float = 0.02
    arithmetic: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        return BACKENDS if self.cls in _FUSED else ("torch",)

    @property
    def max_grad_norm(self) -> float | None:
        return self.wrap.get("max_grad_norm")

    def plain(self) -> torch.optim.Optimizer:
        """Return torch's optimizer on new parameters, the second and third in a slower group."""
        draw = random.Random(1)
        params = [Parameter(_drawn(draw, shape, self.dtype)) for shape in SHAPES]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": self.lr / 2}]
        return self.cls(groups, **{"lr": self.lr, "foreach": False, **self.options})

    def make(self, backend: str) -> CyclicalOptimizer[Any]:
        sizes = {} if isinstance(self.policy, Schedule) else {"step_size_up": 4}
        return CyclicalOptimizer(
            self.plain(), self.policy, backend=backend, **{**sizes, **self.wrap}
        )


def _courses() -> Iterator[Course]:
    momentum = {"momentum": 0.9, "weight_decay": 0.01}
    warm = sequence([(triangular(3), 5), (triangular2(2), None)])
    once = one_cycle(14)
    for name, cls, options, policy, wrap in (
        ("sgd", _optim.SGD, {}, "triangular", {}),
        ("sgd-momentum", _optim.SGD, momentum, "triangular2", _CYCLED),
        ("sgd-nesterov", _optim.SGD, {"momentum": 0.9, "nesterov": True}, once, _CYCLED),
        ("sgd-dampening", _optim.SGD, {**momentum, "dampening": 0.25}, warm, {}),
        ("adagrad", _optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}, "triangular", {}),
        ("adagrad-maximize", _optim.Adagrad, {"maximize": True}, once, {}),
        ("adadelta", _optim.Adadelta, {}, "triangular2", {}),
        ("rmsprop", _optim.RMSprop, {"weight_decay": 0.1}, "triangular", {}),
        ("rmsprop-momentum", _optim.RMSprop, {"momentum": 0.9}, "triangular2", _CYCLED),
        ("rmsprop-centered", _optim.RMSprop, {"centered": True}, warm, {}),
        (
            "rmsprop-momentum-centered",
            _optim.RMSprop,
            {"momentum": 0.9, "centered": True},
            once,
            _CYCLED,
        ),
    ):
        yield Course(name, cls, options, policy, wrap, arithmetic=True)
    yield Course(
        "sgd-bfloat16", _optim.SGD, momentum, "triangular", _CYCLED, torch.bfloat16, arithmetic=True
    )
    powers = {"gamma": 0.97}
    for name, cls, options, policy, wrap in (
        ("sgd-exp_range", _optim.SGD, momentum, "exp_range", {**powers, **_CYCLED}),
        ("adam", _optim.Adam, {"weight_decay": 0.1}, "triangular", {}),
        ("adam-amsgrad", _optim.Adam, {"amsgrad": True}, "exp_range", {**powers, **_CYCLED}),
        ("adam-clipped", _optim.Adam, {}, once, {**_CYCLED, "max_grad_norm": 1.0}),
        ("adamw", _optim.AdamW, {}, "triangular", {"window": "hann"}),
        ("adamw-amsgrad", _optim.AdamW, {"amsgrad": True}, "triangular2", _CYCLED),
        ("adadelta-exp_range_bounds", _optim.Adadelta, {}, "exp_range_bounds", powers),
        ("nadam", _optim.NAdam, {}, "exp_range", {**powers, **_CYCLED}),
        ("radam", _optim.RAdam, {}, "triangular", {}),
        ("adamax", _optim.Adamax, {}, once, _CYCLED),
    ):
        yield Course(name, cls, options, policy, wrap)
    yield Course("adam-float64", _optim.Adam, {}, "triangular", _CYCLED, torch.float64)


COURSES = list(_courses())


# ---- the course of a training


def _drawn(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return multiples of 1/64 in [-2, 2), which every dtype holds and every machine draws."""
    count = int(np.prod(shape))
    values = [(int(draw.random() * 256) - 128) / 64 for _ in range(count)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)


def members(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def give_gradients(opt: torch.optim.Optimizer, step: int) -> None:
    draw = random.Random(1000 + step)
    *early, late = members(opt)
    for p in early:
        p.grad = _drawn(draw, p.shape, p.dtype)
    late.grad = _drawn(draw, late.shape, late.dtype) if step >= LATE else None


def rates_of(opt: torch.optim.Optimizer) -> list[list[float]]:
    """Return rate and momentum of each group, as the next step uses them."""
    return [
        [float(g["lr"]), *([g["betas"][0]] if "betas" in g else []), *_momentum(g)]
        for g in opt.param_groups
    ]


def _momentum(group: Mapping[str, Any]) -> list[float]:
    return [group["momentum"]] if "momentum" in group else []


def record(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Return parameters, rates and our keys of the groups, as JSON gives them back."""
    return {
        "params": [p.detach().double().tolist() for p in members(opt)],
        "rates": rates_of(opt),
        "keys": [
            {k: v for k, v in group.items() if k.startswith("clr_")} for group in opt.param_groups
        ],
    }


def machine() -> dict[str, str]:
    """Return what the last bit of a result can depend on."""
    return {
        "torch": str(torch.__version__).partition("+")[0],
        "numpy": np.__version__,
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else "",
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "libc": " ".join(platform.libc_ver()),
    }


# ---- archives


def read(backend: str) -> dict[str, bytes]:
    """Return the files of an archive by their names."""
    with tarfile.open(FOLDER / f"{backend}.tar.xz") as archive:
        return {
            each.name: archive.extractfile(each).read()  # type: ignore[union-attr]
            for each in archive.getmembers()
        }


def _write(backend: str) -> None:
    path = FOLDER / f"{backend}.tar.xz"
    if path.exists():
        raise SystemExit(f"{path} exists: it represents the files of users and must not change")
    by = {"clr_optim": __version__, **machine()}
    files = {"written_by.json": json.dumps(by).encode()}
    for course in COURSES:
        if backend in course.backends:
            files.update(_saved(course, backend))
    with tarfile.open(path, "w:xz", preset=9 | lzma.PRESET_EXTREME) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _saved(course: Course, backend: str) -> Iterator[tuple[str, bytes]]:
    opt = course.make(backend)
    for step in range(SAVED):
        give_gradients(opt, step)
        opt.step()
    opt.zero_grad()
    checkpoint = io.BytesIO()
    torch.save(opt.state_dict(), checkpoint)
    yield f"{course.name}/state.pt", checkpoint.getvalue()
    yield f"{course.name}/optimizer.pickle", pickle.dumps(opt)
    saved, rates = record(opt), []
    for step in range(SAVED, END):
        rates.append(rates_of(opt))
        give_gradients(opt, step)
        opt.step()
    expected = {"saved": saved, "rates": rates, "end": record(opt)}
    yield f"{course.name}/expected.json", json.dumps(expected).encode()


if __name__ == "__main__":
    if "triton" in sys.argv[1:]:
        import triton_helpers  # noqa: F401  (it mends Triton's interpreter)
    for each in sys.argv[1:]:
        _write(each)
