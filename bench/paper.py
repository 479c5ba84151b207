"""The paper's tables rerun: rows as data, runs that survive an interruption, and the report.

Every row, the fixed ones too, is ``cifar10_full`` trained on CIFAR-10 through
:class:`~clr_optim.CyclicalOptimizer`; a schedule per row is all that differs. Reported is the
accuracy after the last iteration and never the best along the way. Nothing is tuned: what the paper
leaves open is as Caffe has it.

- The exponential policy starts from 0.001, the rate of Caffe's own solver for this network.
- AdaGrad, RMSprop, AdaDelta and Adam have Caffe's ε of 1e-8, AdaDelta the decay 0.9.
- Both rows that the paper's "fixed" may have been are there: a constant rate, and Caffe's steps.
- The last accuracy is over all test images, those on the way to it, which are for the picture, over
  the first 2,000; their order is random.

On a GPU the whole iteration (sampling, forward, backward, cyclic step) is one captured graph, which
is possible because batches' and cycle's positions lie on the device; and since so small a network
does not fill a GPU, ``--together`` trains several rows beside each other, a stream each. Resuming
is exact, to the last bit, on a CPU with the same number of threads.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
Tables 1 to 3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR

from clr_optim import CyclicalOptimizer, plotting
from clr_optim.bench.cifar10 import (
    RATE_RATIOS,
    Batches,
    Images,
    accuracy,
    cifar10_full,
    mean_image,
    parameter_groups,
    read_cifar10,
)
from clr_optim.bench.gpu import Gpu, why_no_gpu
from clr_optim.bench.machine import describe_machine
from clr_optim.schedule import (
    Schedule,
    decay,
    exp,
    exp_range,
    exp_range_bounds,
    fixed,
    one_cycle,
    sequence,
    triangular,
    triangular2,
    warm_restarts,
)

__all__ = ["DESCRIPTION", "ROWS", "CaffeSGD", "Row", "Run", "Scale", "add_arguments", "run"]

DESCRIPTION = (
    "Reruns the tables of the paper on cyclical learning rates (arXiv 1506.01186): cifar10_full on "
    "CIFAR-10. Made to run unattended: progress goes to stderr, each finished row to a file, and "
    "--resume goes on after an interruption."
)

_BATCH_SIZE = 100
_MOMENTUM = 0.9
_GAMMA = 0.99994
_EVALUATIONS = 28
_ON_THE_WAY = 2_000  # test images
_EPSILON = 1e-8
#: Points between two of the paper's accuracies that count as none: two standard errors of the
#: difference, of 10,000 test images at 80 %.
_SAME = 1.1
#: Iterations before the one that is captured into a graph.
_WARM_UP = 3
_SPEED_ROUNDS = 10


# ---- the rows


@dataclass(frozen=True)
class Scale:
    """Multiplies lengths and step sizes by a factor, and has decays come as far in them.

    Raises:
        ValueError: where a length would not be a whole number >= 1.
    """

    factor: Fraction = Fraction(1)

    def steps(self, count: int) -> int:
        """``count`` iterations of the paper."""
        scaled = count * self.factor
        if scaled.denominator != 1 or scaled < 1:
            raise ValueError(
                f"--scale {float(self.factor):g} turns {count:,} iterations into "
                f"{float(scaled):g}, which must be a whole number >= 1"
            )
        return int(scaled)

    def gamma(self, gamma: float) -> float:
        """The decay per iteration that leaves as much at the end."""
        return float(gamma ** (1 / self.factor))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        table: ``"1"``, ``"3"``, or ``"beyond"`` the paper.
        name: of its own among all tables.
        rule: the optimizer, a key of ``RULES``.
        bounds: ``(base_lr, max_lr)``, for the groups whose rate is not doubled.
        iterations: the paper's.
        schedule: from a scale.
        published: accuracy in percent, if the paper has it.
        references: the rows, mostly fixed, that it is compared with.
    """

    table: str
    name: str
    rule: str
    bounds: tuple[float, float]
    iterations: int
    schedule: Callable[[Scale], Schedule]
    published: float | None = None
    references: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name within its picture."""
        return self.name.removeprefix(f"{self.rule}-")


def _times(factor: float, schedule: Schedule) -> Schedule:
    """The schedule with all rates multiplied, whatever each group's bounds."""

    def times(end: tuple[float, float]) -> tuple[float, float]:
        return (factor * end[0], factor * end[1])

    return Schedule(
        schedule.name,
        [replace(p, lower=times(p.lower), upper=times(p.upper)) for p in schedule.phases],
    )


def _stepped(scale: Scale) -> Schedule:
    """Caffe's own: 0.001, from iteration 60,000 a tenth of it, from 65,000 a hundredth."""
    return sequence(
        [
            (fixed(), scale.steps(60_000)),
            (_times(0.1, fixed()), scale.steps(5_000)),
            (_times(0.01, fixed()), scale.steps(5_000)),
        ]
    )


#: Table 2: what the bounds 0.001 and 0.005 are multiplied by, step size, start and end.
STAGES = ((1.0, 2_000, 0, 16_000), (0.1, 1_000, 16_000, 22_000), (0.01, 500, 22_000, 25_000))


def _table2(scale: Scale) -> Schedule:
    # Bounds as shares of each group's: with absolute ones no bias would learn twice as fast.
    return sequence(
        [
            (_times(factor, triangular2(scale.steps(size))), scale.steps(end - start))
            for factor, size, start, end in STAGES
        ]
    )


def _triangular(scale: Scale) -> Schedule:
    return triangular(scale.steps(2_000))


def _windowed(window: str) -> Callable[[Scale], Schedule]:
    return lambda scale: triangular(scale.steps(2_000), window=window)


def _fixed(scale: Scale) -> Schedule:
    return fixed()


def _adaptive(
    rule: str, bounds: tuple[float, float], at_fixed: float, *cyclic: tuple[int, float]
) -> list[Row]:
    """Table 3's rows of an optimizer: the lower bound for 70,000 iterations, and cyclic ones."""
    name = f"{rule}-fixed"
    rows = [Row("3", name, rule, (bounds[0], bounds[0]), 70_000, _fixed, at_fixed)]
    for length, published in cyclic:
        suffix = "" if length == 25_000 else f"-{length // 1000}k"
        rows.append(
            Row(
                "3",
                f"{rule}-triangular{suffix}",
                rule,
                bounds,
                length,
                _triangular,
                published,
                (name,),
            )
        )
    return rows


_BOUNDS = (0.001, 0.006)
_BASE = (0.001, 0.001)
_FIXED = ("fixed", "fixed-stepped")
_BEYOND = 24_000  # six whole cycles

ROWS: dict[str, Row] = {
    row.name: row
    for row in [
        Row("1", "fixed", "sgd", _BASE, 70_000, _fixed, 81.4),
        Row("1", "fixed-stepped", "sgd", _BASE, 70_000, _stepped, 81.4, ("fixed",)),
        Row("1", "triangular2", "sgd", (0.001, 0.005), 25_000, _table2, 81.4, _FIXED),
        Row(
            "1", "decay", "sgd", (0.001, 0.007), 25_000, lambda s: decay(s.steps(4_000)), 78.5,
            _FIXED,
        ),
        Row(
            "1", "exp", "sgd", _BASE, 70_000, lambda s: exp(gamma=s.gamma(_GAMMA)), 79.1, _FIXED
        ),
        Row(
            "1", "exp_range", "sgd", _BOUNDS, 42_000,
            lambda s: exp_range(s.steps(2_000), gamma=s.gamma(_GAMMA)), 82.2, _FIXED,
        ),
        Row(
            "1", "exp_range_bounds", "sgd", _BOUNDS, 42_000,
            lambda s: exp_range_bounds(s.steps(2_000), gamma=s.gamma(_GAMMA)), 82.2, _FIXED,
        ),
        *_adaptive("nesterov", (0.001, 0.006), 82.1, (25_000, 81.3)),
        *_adaptive("adam", (0.0005, 0.002), 81.4, (25_000, 79.8), (70_000, 81.1)),
        *_adaptive("rmsprop", (0.0001, 0.0003), 75.2, (25_000, 72.8), (70_000, 75.1)),
        *_adaptive("adagrad", (0.003, 0.035), 74.6, (25_000, 76.0)),
        *_adaptive("adadelta", (0.01, 0.1), 67.3, (25_000, 67.3)),
        Row("beyond", "window-triangle", "sgd", _BOUNDS, _BEYOND, _windowed("triangle"), None,
            _FIXED),
        Row("beyond", "window-welch", "sgd", _BOUNDS, _BEYOND, _windowed("welch"), None,
            ("window-triangle",)),
        Row("beyond", "window-hann", "sgd", _BOUNDS, _BEYOND, _windowed("hann"), None,
            ("window-triangle",)),
        Row("beyond", "one_cycle", "sgd", _BOUNDS, _BEYOND,
            lambda s: one_cycle(s.steps(_BEYOND)), None, _FIXED),
        Row("beyond", "warm_restarts", "sgd", _BOUNDS, _BEYOND,
            lambda s: warm_restarts(s.steps(1_600), period_multiplier=2), None, _FIXED),
    ]
}  # fmt: skip

_TITLES = {
    "1": "Table 1: policies",
    "3": "Table 3: adaptive methods",
    "beyond": "Beyond the paper",
    "sgd": "SGD",
    "nesterov": "SGD + Nesterov",
    "adam": "Adam",
    "rmsprop": "RMSprop",
    "adagrad": "AdaGrad",
    "adadelta": "AdaDelta",
}


# ---- the optimizers


class CaffeSGD(Optimizer):
    """SGD with momentum as Caffe has it, the rate inside the buffer.

    ``V = μ·V + lr·(g + decay·W)``, then ``W −= V``, or with Nesterov's
    ``W −= (1 + μ)·V − μ·V_before``. Under a constant rate that is :class:`torch.optim.SGD`; when
    the rate changes, what torch multiplies by the new one still has the old one here.

    Source: Caffe's ``sgd_solver.cpp`` and ``nesterov_solver.cpp``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; ``closure`` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            momentum = group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"]
                before = buffer.clone() if group["nesterov"] else None
                grad = param.grad.add(param, alpha=group["weight_decay"])
                buffer.mul_(momentum).add_(grad, alpha=group["lr"])
                if before is None:
                    param.sub_(buffer)
                else:
                    param.sub_(buffer, alpha=1.0 + momentum).add_(before, alpha=momentum)
        return loss


Groups = list[dict[str, Any]]

RULES: dict[str, Callable[[Groups], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=_MOMENTUM),
    "nesterov": lambda groups: torch.optim.SGD(groups, momentum=_MOMENTUM, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.999), eps=_EPSILON),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, alpha=0.99, eps=_EPSILON),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, eps=_EPSILON),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, rho=0.9, eps=_EPSILON),
}
_CAFFE_RULES: dict[str, Callable[[Groups], Optimizer]] = {
    "sgd": lambda groups: CaffeSGD(groups, momentum=_MOMENTUM),
    "nesterov": lambda groups: CaffeSGD(groups, momentum=_MOMENTUM, nesterov=True),
}


# ---- one run


@dataclass(frozen=True)
class Data:
    """What all runs share: images on the device, the training images' mean, a fingerprint."""

    training: Images
    test: Images
    mean: Tensor
    digest: str


def read(folder: str | Path, device: torch.device | str = "cpu") -> Data:
    """CIFAR-10 from its official binary layout; errors as in :func:`read_cifar10`."""
    training, test = read_cifar10(folder)
    if len(training) < _BATCH_SIZE:
        raise ValueError(
            f"{folder}: {len(training)} training images, fewer than a batch of {_BATCH_SIZE}"
        )
    digest = _digest([training.pixels, training.labels, test.pixels, test.labels])
    mean = mean_image(training)  # on the host, so that it is the same wherever one trains
    return Data(training.to(device), test.to(device), mean, digest)


def _digest(tensors: Sequence[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


class Run:
    """A row at one seed: model, optimizer, batches, and what was measured so far.

    The seed decides the weights and the order of the images; the same one means the same of both
    for every row.

    Args:
        row: what to train.
        seed: as above.
        scale: of lengths and step sizes.
        data: to train on and to test with.
        device: where.
        caffe: whether SGD has the rate inside the momentum buffer, as Caffe.
    """

    def __init__(
        self,
        row: Row,
        seed: int,
        scale: Scale,
        data: Data,
        *,
        device: torch.device | str = "cpu",
        caffe: bool = False,
    ) -> None:
        self.row, self.seed, self.data = row, seed, data
        self.iterations = scale.steps(row.iterations)
        self.device = torch.device(device)
        rules = {**RULES, **_CAFFE_RULES} if caffe else RULES
        self.model = cifar10_full(seed).to(self.device)
        base_lr, max_lr = row.bounds
        inner = rules[row.rule](parameter_groups(self.model, max_lr))
        #: whether Triton's kernels serve, so that a graph can be captured
        self.on_kernels = self.device.type == "cuda" and not isinstance(inner, CaffeSGD)
        self.optimizer: Any = CyclicalOptimizer(
            inner,
            row.schedule(scale),
            base_lr=[base_lr * ratio for ratio in RATE_RATIOS],
            max_lr=[max_lr * ratio for ratio in RATE_RATIOS],
            backend="triton" if self.on_kernels else "auto",
        )
        self.batches = Batches(
            data.training, data.mean, batch_size=_BATCH_SIZE, seed=seed, device=self.device
        )
        self.settings = {
            "row": row.name,
            "seed": seed,
            "scale": str(scale.factor),
            "iterations": self.iterations,
            "bounds": list(row.bounds),
            "schedule": self.optimizer.schedule.to_dict(),
            "optimizer": type(inner).__name__,
            "momentum": "caffe" if caffe else "torch",
            "batch_size": _BATCH_SIZE,
            "training_images": len(data.training),
            "test_images": len(data.test),
            "data": data.digest,
            "device": self.device.type,
        }
        self.every = math.ceil(self.iterations / _EVALUATIONS)
        self.iteration = 0
        #: ``(iterations, accuracy in percent after so many)``
        self.curve: list[tuple[int, float]] = []
        self.training_s = self.evaluation_s = 0.0
        self._graph: Callable[[], object] | None = None
        self._stream = None
        if self.device.type == "cuda":
            self._stream = Gpu().stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    def apart(self) -> AbstractContextManager[object]:
        """On a GPU the run's own stream, on which all of it happens: others may be beside it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @property
    def is_done(self) -> bool:
        """Whether the last iteration has been, and its accuracy measured."""
        return bool(self.curve) and self.curve[-1][0] == self.iterations

    def _one(self) -> None:
        inputs, labels = self.batches.sample()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def capture(self) -> None:
        """Make the iteration a graph, after a few that are taken as all others."""
        # Positions of batches and cycle lie on the device: the host only counts.
        self._graph = Gpu().capture(self._one, warm_up=_WARM_UP)
        self.iteration += _WARM_UP

    def iterate(self) -> None:
        """One iteration: a batch, forward, backward, a step."""
        (self._graph or self._one)()
        self.iteration += 1

    @property
    def next_evaluation(self) -> int:
        """The iteration after which accuracy is measured: at equal distances, and at the end."""
        return min((self.curve[-1][0] if self.curve else 0) + self.every, self.iterations)

    def evaluate(self) -> None:
        """Measure the accuracy: at the end on all test images, before on the first 2,000."""
        begin = perf_counter()
        test = self.data.test
        if self.iteration < self.iterations:
            test = Images(test.pixels[:_ON_THE_WAY], test.labels[:_ON_THE_WAY])
        value = accuracy(self.model, test, self.data.mean)
        self.curve.append((self.iteration, value))
        if self.is_done:  # a run that its graph keeps alive would keep its copy of the images
            self._graph = None
        self.evaluation_s += perf_counter() - begin

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on as if nothing had been."""
        return {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.batches.position,
            "random": torch.get_rng_state(),
            "iteration": self.iteration,
            "curve": self.curve,
            "training_s": self.training_s,
            "evaluation_s": self.evaluation_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: if it is another run's.
        """
        _check_settings(self.settings, state["settings"], "the checkpoint")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.position = state["position"]
        torch.set_rng_state(state["random"])
        self.iteration, self.curve = state["iteration"], list(state["curve"])
        self.training_s, self.evaluation_s = state["training_s"], state["evaluation_s"]

    def result(self) -> dict[str, Any]:
        """A finished run as a line of the results."""
        weights = list(self.model.state_dict().values())
        return {
            **self.settings,
            "table": self.row.table,
            "published": self.row.published,
            "published_iterations": self.row.iterations,
            "cycles": self.optimizer.schedule.cycle(self.iterations),
            "accuracy": self.curve[-1][1],
            "curve": self.curve,
            "finite": all(bool(w.isfinite().all()) for w in weights),
            "weights": _digest(weights),
            "training_s": round(self.training_s, 2),
            "evaluation_s": round(self.evaluation_s, 2),
            "iterations_per_s": round(self.iterations / self.training_s, 2),
        }


def _check_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str) -> None:
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ValueError(
                f"{whose} has {key} {theirs.get(key)!r}, and this run {value!r}: give the options "
                "that it was made with, or another folder with --out"
            )


# ---- many runs, unattended


class _Stop:
    """Notes SIGINT and SIGTERM, so that what is under way can be saved.

    A second SIGINT ends it at once; SIGTERM may come twice of one request, as from ``timeout``.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __exit__(self, *error: object) -> None:
        self._put_back()


class _Progress:
    """A line on stderr: in place on a terminal, else at most every half a minute.

    Args:
        runs: how many there are to do.
        iterations: of all of them together.
    """

    def __init__(self, runs: int, iterations: int) -> None:
        self._terminal = sys.stderr.isatty()
        self._every = 0.5 if self._terminal else 30.0
        self._runs, self._left = runs, iterations
        self._done = 0
        self._at: dict[tuple[str, int], tuple[int, int]] = {}  # a run's number, and its iteration
        self._begin = self._shown = perf_counter()

    def begin(self, run: Run) -> None:
        """The next run, of which what its checkpoint holds needs not be done."""
        self._left -= run.iteration
        self._at[run.row.name, run.seed] = (len(self._at) + 1, run.iteration)

    def show(self, run: Run) -> None:
        """Say where the run is, if it is time."""
        which = run.row.name, run.seed
        number, at = self._at[which]
        self._done += run.iteration - at
        self._left -= run.iteration - at
        self._at[which] = (number, run.iteration)
        now = perf_counter()
        if now - self._shown < self._every and not run.is_done:
            return
        self._shown = now
        rate = max(self._done, 1) / (now - self._begin)  # evaluations count here
        last = f"{run.curve[-1][1]:.2f} %" if run.curve else "not evaluated yet"
        line = (
            f"[{number}/{self._runs}] {run.row.name}, seed {run.seed}: "
            f"{run.iteration:,}/{run.iterations:,}, {rate:.1f} it/s in all, {last}; left: "
            f"{_duration(self._left / rate)}"
        )
        ending = "\n" if run.is_done or not self._terminal else ""
        print(
            f"\r\033[K{line}" if self._terminal else line, end=ending, file=sys.stderr, flush=True
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


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
                ROWS[_key(run)[0]]
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


def _key(result: Mapping[str, Any]) -> tuple[str, int]:
    return str(result["row"]), int(result["seed"])


class _Training:
    """A run on its way, and the clock of its training and its checkpoints."""

    def __init__(self, run: Run, save: Callable[[Run], None], save_every_s: float) -> None:
        self.run, self._save, self._every = run, save, save_every_s
        if run.on_kernels and run.iterations - run.iteration > _WARM_UP:
            run.capture()
            run.synchronize()
        self._saved = self._since = perf_counter()

    def _pause(self) -> None:
        self.run.synchronize()
        self.run.training_s += perf_counter() - self._since

    def save(self) -> None:
        """Write a checkpoint."""
        self._pause()
        self._save(self.run)
        self._saved = self._since = perf_counter()

    def advance(self) -> None:
        """One iteration, or one evaluation; a checkpoint before it, if it is time."""
        run = self.run
        if perf_counter() - self._saved >= self._every:
            self.save()
        if run.iteration < run.next_evaluation:
            run.iterate()
        else:
            self._pause()
            run.evaluate()
            self._since = perf_counter()


def train(
    runs: Iterable[Run],
    save: Callable[[Run], None],
    stopped: Callable[[], int],
    show: Callable[[Run], None],
    save_every_s: float,
    together: int = 1,
    finish: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Train runs to the end, saving now and then.

    Args:
        runs: each is asked for when there is room for it.
        save: writes a checkpoint.
        stopped: true as soon as all are to be saved and left.
        show: called with a run after each of its iterations and evaluations.
        save_every_s: seconds between checkpoints of a run.
        together: how many are trained beside each other, an iteration each in turn.
        finish: called with a run that came to its end.

    Returns:
        The runs that were under way when it was stopped.
    """
    waiting = iter(runs)
    under_way: list[_Training] = []
    while True:
        while len(under_way) < together and (run := next(waiting, None)) is not None:
            with run.apart():
                under_way.append(_Training(run, save, save_every_s))
        if not under_way:
            return []
        if stopped():
            for training in under_way:
                with training.run.apart():
                    training.save()
            return [training.run for training in under_way]
        for training in tuple(under_way):
            run = training.run
            with run.apart():
                training.advance()
                show(run)
                if run.is_done:
                    finish(run)
                    under_way.remove(training)


def _train_all(
    rows: Sequence[Row], scale: Scale, data: Data, store: Store, args: argparse.Namespace
) -> int:
    """Every row at every seed that is not in the store yet; returns the signal that ended it."""
    common = {
        "scale": str(scale.factor),
        "momentum": "caffe" if args.caffe_momentum else "torch",
        "batch_size": _BATCH_SIZE,
        "data": data.digest,
        "device": args.device,
    }
    finished = set()
    for result in store.read():
        _check_settings(common, result, str(store.results))
        finished.add(_key(result))
        store.drop_checkpoint(*_key(result))  # should it have ended between the two
    # Seeds outermost: whenever this is stopped, as many rows as can be are whole.
    jobs = [
        (row, seed)
        for seed in range(args.seeds)
        for row in rows
        if (row.name, seed) not in finished
    ]
    progress = _Progress(len(jobs), sum(scale.steps(row.iterations) for row, _ in jobs))
    machine = describe_machine()
    if args.device == "cuda":
        cudnn = torch.backends.cudnn
        own = {"tf32": cudnn.allow_tf32, "cudnn_benchmark": cudnn.benchmark}
        machine = {**machine, **Gpu().describe(), **own}
    more = {"data_note": args.data_note, "machine": machine, "together": args.together}

    def begun() -> Iterator[Run]:
        for row, seed in jobs:
            run = Run(row, seed, scale, data, device=args.device, caffe=args.caffe_momentum)
            with run.apart():  # or the run's own stream might not wait for it
                store.load(run)
            progress.begin(run)
            yield run

    def finish(run: Run) -> None:
        store.append({**run.result(), **more})
        store.drop_checkpoint(run.row.name, run.seed)

    with _Stop() as stop:
        left = train(
            begun(),
            store.save,
            lambda: stop.signal,
            progress.show,
            60.0 * args.checkpoint_every,
            args.together,
            finish,
        )
    for run in left:
        print(
            f"\nstopped after {run.iteration:,} of {run.iterations:,} iterations of "
            f"{run.row.name}, seed {run.seed}, and saved: the same command with --resume goes on "
            "from there",
            file=sys.stderr,
        )
    return stop.signal if left else 0


# ---- how fast


def measure_speed(
    data: Data, device: torch.device | str = "cpu", iterations: int = 200
) -> dict[str, Any]:
    """Iterations per second, in turns: ours, as a graph on a GPU, and torch's with its CyclicLR.

    Args:
        data: to train on.
        device: where.
        iterations: of each, in ten turns.

    Returns:
        The median over turns by variant, under ``"iterations_per_s"``, and the device.
    """
    ours = _speed_run(data, device)
    variants: dict[str, Callable[[], None]] = {"clr_optim": ours.iterate}
    if ours.on_kernels:
        graph = _speed_run(data, device)
        graph.capture()
        variants["clr_optim, one graph"] = graph.iterate
    for name, fused in (("torch.optim.SGD + CyclicLR", None), ("the same, fused", True)):
        variants[name] = _torch_iteration(data, device, fused)
    turn = max(1, iterations // _SPEED_ROUNDS)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for iterate in variants.values():
        for _ in range(_WARM_UP):
            iterate()
    for _ in range(_SPEED_ROUNDS):
        for name, iterate in variants.items():
            ours.synchronize()
            begin = perf_counter()
            for _ in range(turn):
                iterate()
            ours.synchronize()
            rates[name].append(turn / (perf_counter() - begin))
    medians = {name: round(statistics.median(each), 2) for name, each in rates.items()}
    return {"device": str(device), "threads": torch.get_num_threads(), "iterations_per_s": medians}


def _speed_run(data: Data, device: torch.device | str) -> Run:
    return Run(ROWS["window-triangle"], 0, Scale(), data, device=device)


def _torch_iteration(
    data: Data, device: torch.device | str, fused: bool | None
) -> Callable[[], None]:
    """What a user of torch alone would write."""
    model = cifar10_full(0).to(device)
    base_lr, max_lr = _BOUNDS
    optimizer = torch.optim.SGD(parameter_groups(model, max_lr), momentum=_MOMENTUM, fused=fused)
    scheduler = CyclicLR(
        optimizer,
        base_lr=[base_lr * ratio for ratio in RATE_RATIOS],
        max_lr=[max_lr * ratio for ratio in RATE_RATIOS],
        step_size_up=2_000,
        cycle_momentum=False,
    )
    batches = Batches(data.training, data.mean, batch_size=_BATCH_SIZE, device=device)

    def iterate() -> None:
        inputs, labels = batches.sample()
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()

    return iterate


# ---- the report


def summarize(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every table that was begun, those not run too: means over seeds.

    Returns:
        Dictionaries with ``"row"``, ``"table"``, ``"published"``, ``"published_iterations"``, and
        for what was run ``"accuracy"`` (mean, percent), ``"spread"`` (standard deviation of a
        sample, None for one seed), ``"iterations"``, ``"cycles"``, ``"seeds"``, ``"training_s"``
        (mean), ``"curve"`` (means), ``"test_images"``, ``"comparisons"`` (with other rows) and
        ``"relation"`` (a sentence on them).
    """
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_row.setdefault(result["row"], []).append(result)
    tables = {ROWS[name].table for name in by_row}
    rows: dict[str, dict[str, Any]] = {}
    for row in ROWS.values():
        if row.table not in tables:
            continue
        rows[row.name] = {
            "row": row.name,
            "table": row.table,
            "published": row.published,
            "published_iterations": row.iterations,
        }
        if row.name in by_row:
            runs = by_row[row.name]
            finals = [run["accuracy"] for run in runs]
            curves = [dict(map(tuple, run["curve"])) for run in runs]
            rows[row.name].update(
                accuracy=statistics.fmean(finals),
                spread=statistics.stdev(finals) if len(finals) > 1 else None,
                iterations=runs[0]["iterations"],
                cycles=runs[0]["cycles"],
                seeds=len(runs),
                test_images=runs[0]["test_images"],
                training_s=statistics.fmean(run["training_s"] for run in runs),
                finite=all(run["finite"] for run in runs),
                # A resumed run's points may lie an iteration or two off the others'.
                curve=[
                    (iteration, statistics.fmean(curve[iteration] for curve in curves))
                    for iteration in curves[0]
                    if all(iteration in curve for curve in curves)
                ],
            )
    for name, summary in rows.items():
        if "accuracy" in summary:
            summary["comparisons"] = _comparisons(ROWS[name], rows)
            summary["relation"] = _relation(ROWS[name], rows)
    return list(rows.values())


def _comparisons(row: Row, rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a row is beside each that it is compared with, here and, where it says so, in the paper.

    Returns:
        Dictionaries with ``"with"`` (a row's name), ``"difference"`` (points of accuracy),
        ``"same"`` (how many count as none: two standard errors of it, see :func:`_error`; those
        of seeds only where there are several), ``"found"`` (a verdict), and where the paper has
        both rows ``"expected"`` (its verdict), ``"published_difference"`` and ``"holds"``: True,
        False, ``"in direction"`` for a difference that is another one in size, or ``"and more"``
        where the same accuracy was expected of fewer iterations, and they gave a higher one.
    """
    here = rows[row.name]
    comparisons = []
    for name in row.references:
        there, other = rows.get(name, {}), ROWS[name]
        if "accuracy" not in there:
            continue
        same = 2 * math.hypot(_error(here), _error(there))
        difference = here["accuracy"] - there["accuracy"]
        comparison = {
            "with": name,
            "difference": difference,
            "same": same,
            "found": _verdict(difference, same),
        }
        # The paper has one "fixed": between the two that it may have been it says nothing.
        if row.name not in _FIXED and row.published is not None and other.published is not None:
            theirs = round(row.published - other.published, 1)
            expected = _verdict(theirs, _SAME)
            holds: bool | str = expected == comparison["found"]
            if holds and abs(difference) > same < abs(difference - theirs):
                holds = "in direction"
            promised = expected == _AS_ACCURATE and here["iterations"] < there["iterations"]
            if promised and difference > same:
                holds = "and more"
            comparison.update(expected=expected, published_difference=theirs, holds=holds)
        comparisons.append(comparison)
    return comparisons


def _relation(row: Row, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence on whether what the paper found of a row, beside others, is so here."""
    here = rows[row.name]
    text = f"`{row.name}`: {here['accuracy']:.2f} % after {here['iterations']:,} iterations"
    if here["cycles"] % 1:
        text += f", in the middle of cycle {math.ceil(here['cycles'])}"
    if not here["finite"]:
        text += ", its weights no longer finite"
    if not row.references:
        return text + "; the others are compared with it."
    clauses = []
    for comparison in here["comparisons"]:
        name, found = comparison["with"], comparison["found"]
        there, other = rows[name], ROWS[name]
        clause = (
            f"{found} `{name}` ({there['accuracy']:.2f} %, {comparison['difference']:+.2f}, "
            f"within {comparison['same']:.2f} being the same)"
        )
        if here["iterations"] != there["iterations"]:
            clause += f" in {here['iterations'] / there['iterations']:.0%} of its iterations"
        if "holds" in comparison:
            figures = f"({row.published} against {other.published} %)"
            if not comparison["holds"]:
                clause += f", which in the paper is {comparison['expected']} it {figures}: its "
                clause += "relation does not hold here"
            elif comparison["holds"] is True:
                clause += f", as in the paper {figures}: its relation holds here"
            elif comparison["holds"] == "and more":
                clause += f", which in the paper is {comparison['expected']} it {figures}: its "
                clause += "relation holds here, and more"
            else:
                clause += f", as in the paper {figures}, but by another amount: its relation holds "
                clause += "here in direction only"
        elif name.startswith("window"):
            equivalent = found == _AS_ACCURATE
            clause += f": the windows are {'' if equivalent else 'not '}equivalent here"
        clauses.append(clause)
    if not clauses:
        clauses = [
            f"{' or '.join(f'`{name}`' for name in row.references)} to compare it with: not run"
        ]
    return f"{text}; {'; '.join(clauses)}."


def _error(summary: Mapping[str, Any]) -> float:
    """The standard error of an accuracy, points: by its test images and, where known, its seeds."""
    share = summary["accuracy"] / 100
    by_images = 100 * math.sqrt(share * (1 - share) / summary["test_images"])
    return math.hypot(by_images, (summary["spread"] or 0.0) / math.sqrt(summary["seeds"]))


_AS_ACCURATE = "as accurate as"


def _verdict(difference: float, same: float) -> str:
    if abs(difference) <= same:
        return _AS_ACCURATE
    return "more accurate than" if difference > 0 else "less accurate than"


def markdown(results: Sequence[Mapping[str, Any]], speed: Mapping[str, Any] | None = None) -> str:
    """The tables, a sentence for each row, and what they were made with."""
    summaries = summarize(results)
    lines = [*_preamble(results), ""]
    for table in dict.fromkeys(summary["table"] for summary in summaries):
        rows = [summary for summary in summaries if summary["table"] == table]
        lines += [
            f"**{_TITLES[table]}**",
            "",
            "| row | published, % | measured, % | iterations | seeds | time |",
            "| --- | --- | --- | --- | --- | --- |",
            *map(_line, rows),
            "",
            *(f"- {row['relation']}" for row in rows if "relation" in row),
            "",
        ]
    if speed is not None:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in speed["iterations_per_s"].items())
        lines += [f"Iterations per second on {speed['device']}: {rates}.", ""]
    return "\n".join(lines)


def _preamble(results: Sequence[Mapping[str, Any]]) -> list[str]:
    first = results[0]
    lines = [
        "Accuracy on CIFAR-10's test images after the last iteration, mean ± standard deviation "
        f"over seeds; `cifar10_full`, batches of {first['batch_size']}, no augmentation.",
    ]
    factor = Fraction(first["scale"])
    if factor != 1:
        lines.append(
            f"All lengths and step sizes are the paper's × {float(factor):g}, and decays come as "
            "far in them: rows can be compared with each other, and hardly with the paper's."
        )
    lines.append(
        "Momentum as in Caffe, the rate inside the buffer."
        if first["momentum"] == "caffe"
        else "Momentum as in torch, the rate outside the buffer (Caffe has it inside)."
    )
    lines += [f"Data: {note}" for note in dict.fromkeys(r["data_note"] for r in results) if note]
    machines = dict.fromkeys(
        f"{m.get('gpu') or m['cpu']}, {m['threads']} threads, torch {m['torch']}, "
        f"clr_optim {m['clr_optim']}"
        for m in (result["machine"] for result in results)
    )
    if any(result["machine"].get("tf32") for result in results):
        lines.append("Convolutions in TF32, as torch has them on such a GPU unless told otherwise.")
    together = max(result.get("together", 1) for result in results)
    if together > 1:
        lines.append(f"Times are of runs that shared the GPU, {together} beside each other.")
    return [*lines, f"Machine: {'; '.join(machines)}."]


def _line(row: Mapping[str, Any]) -> str:
    published = "–"
    if row["published"] is not None:
        published = f"{row['published']} at {row['published_iterations']:,}"
    if "accuracy" not in row:
        return f"| {row['row']} | {published} | not run | | | |"
    measured = f"{row['accuracy']:.2f}"
    if row["spread"] is not None:
        measured += f" ± {row['spread']:.2f}"
    iterations = f"{row['iterations']:,}"
    if row["cycles"]:
        iterations += f" ({row['cycles']:g} cycles)"
    return (
        f"| {row['row']} | {published} | {measured} | {iterations} | {row['seeds']} | "
        f"{_duration(row['training_s'])} |"
    )


def report(folder: str | Path) -> str:
    """Write ``paper.md``, ``paper.json`` and the pictures of a folder of results.

    Without matplotlib there are no pictures, and a line on stderr says so: who trained for hours on
    another machine can have them drawn later.

    Returns:
        The Markdown.

    Raises:
        ValueError: if there are no results.
    """
    store = Store(folder, made=False)
    results = store.read()
    if not results:
        raise ValueError(f"{store.results}: no finished run to report on")
    speed_file = store.folder / "speed.json"
    speed = json.loads(speed_file.read_text()) if speed_file.exists() else None
    summaries = summarize(results)
    text = markdown(results, speed)
    (store.folder / "paper.md").write_text(text, encoding="utf-8")
    whole = {"rows": summaries, "runs": results, "speed": speed}
    (store.folder / "paper.json").write_text(
        json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    try:
        plotting.require_matplotlib()
    except ImportError as error:
        print(f"{error}; then --report draws them", file=sys.stderr)
        return text
    for name, panels in _pictures(summaries).items():
        plotting.save(plotting.plot_paper_curves(panels), store.folder / f"{name}.png")
    return text


_BEGIN, _END = "<!-- made by clr-optim bench paper --report --readme -->", "<!-- /made -->"


def write_readme(path: str | Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Put a table of all rows between the two marks that a Markdown file has for it.

    Raises:
        OSError: if the file cannot be read or written.
        ValueError: if it lacks the marks.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{path} has no place for the table: put these lines in: {_BEGIN} {_END}")
    table = "\n".join(readme_table(summarize(results)))
    path.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


def readme_table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Published and measured figures of all rows, and whether the paper's relation holds."""
    lines = [
        "| row | the paper, % (iterations) | here, % (iterations) | the paper's relation here |",
        "| --- | --- | --- | --- |",
    ]
    for row in summaries:
        published = "–"
        if row["published"] is not None:
            published = f"{row['published']} ({row['published_iterations']:,})"
        if "accuracy" not in row:
            lines.append(f"| {row['row']} | {published} | not run | |")
            continue
        relations = []
        for comparison in row["comparisons"]:
            words = {
                True: "holds: ", False: "**does not hold**: ", None: "",
                "in direction": "in direction only: ", "and more": "holds, and more: ",
            }[comparison.get("holds")]  # fmt: skip
            relation = f"{words}{comparison['found']} {comparison['with']}"
            if words:
                relation += (
                    f" ({comparison['difference']:+.1f} points, "
                    f"{comparison['published_difference']:+.1f} in the paper)"
                )
            relations.append(relation)
        spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
        lines.append(
            f"| {row['row']} | {published} | {row['accuracy']:.1f}{spread} ({row['iterations']:,}) "
            f"| {'; '.join(relations)} |"
        )
    return lines


Curves = dict[str, list[tuple[int, float]]]


def _pictures(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curves]]:
    """Curves by picture, panel and label: Table 3 has a panel for each optimizer."""
    pictures: dict[str, dict[str, Curves]] = {}
    for summary in summaries:
        if "curve" in summary:
            row = ROWS[summary["row"]]
            name = "beyond" if row.table == "beyond" else f"table-{row.table}"
            panel = _TITLES[row.rule if row.table == "3" else row.table]
            curves = pictures.setdefault(name, {}).setdefault(panel, {})
            curves[row.label] = summary["curve"]
    return pictures


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--data", metavar="DIR", help="CIFAR-10, binary version, unpacked")
    add("--table", type=_tables, metavar="1|2|3|beyond", help="or several, as 1,3; 2 is one of 1")
    add("--rows", type=_row_names, metavar="A,B", help=f"only these: {', '.join(ROWS)}")
    add(
        "--scale",
        type=_scale,
        default=Scale(),
        metavar="F",
        help="multiplies lengths and step sizes; 0.1 or 1/10",
    )
    add("--seeds", type=_count, default=1, metavar="N", help="how many, from 0 (1)")
    add("--device", type=_device, default="cpu", help="cpu, or cuda, which is ROCm's name too")
    add("--threads", type=_count, metavar="N", help=f"({torch.get_num_threads()})")
    add(
        "--together",
        type=_count,
        default=1,
        metavar="N",
        help="on a GPU, which one such network does not fill: rows trained beside each other (1)",
    )
    add("--out", default="paper-out", metavar="DIR", help="results and checkpoints (paper-out)")
    add("--resume", action="store_true", help="go on with what is in there")
    add("--checkpoint-every", type=_minutes, default=3.0, metavar="MIN", help="minutes (3)")
    add("--caffe-momentum", action="store_true", help="SGD with the rate inside the buffer")
    add("--data-note", default="", metavar="TEXT", help="kept with the results and printed by them")
    add("--report", action="store_true", help="train nothing, only report on what is in --out")
    add("--readme", metavar="FILE", help="with --report: renew the table between its marks in FILE")
    add(
        "--speed",
        type=_count,
        metavar="N",
        help="train nothing, only measure iterations per second over N of them",
    )


def _tables(text: str) -> list[str]:
    known = ("1", "2", "3", "beyond")
    tables = text.split(",")
    for table in tables:
        if table not in known:
            raise argparse.ArgumentTypeError(f"no table {table!r}; there are {', '.join(known)}")
    return tables


def _row_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"no row {name!r}; there are {', '.join(ROWS)}")
    return names


def _scale(text: str) -> Scale:
    with suppress(ValueError, ZeroDivisionError):
        if 0 < Fraction(text) <= 100:
            return Scale(Fraction(text))
    raise argparse.ArgumentTypeError(f"must be a number above 0, as 0.1 or 1/10, got {text!r}")


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 10**6):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of minutes >= 0, got {text!r}")


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and (problem := why_no_gpu()):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return text


def _chosen(args: argparse.Namespace) -> list[Row]:
    if args.table is None and args.rows is None:
        raise argparse.ArgumentError(None, "give --table 1, 2, 3 or beyond, or --rows")
    tables = args.table or ["1", "3", "beyond"]
    rows = [
        row
        for row in ROWS.values()
        if row.table in tables or ("2" in tables and row.name == "triangular2")
    ]
    if args.rows is not None:
        for name in args.rows:
            if ROWS[name] not in rows:
                raise argparse.ArgumentError(
                    None, f"--rows {name}: not in table {', '.join(tables)}"
                )
        rows = [row for row in rows if row.name in args.rows]
    for row in rows:
        _check_lengths(row, args.scale)
    return rows


def _check_lengths(row: Row, scale: Scale) -> None:
    try:
        scale.steps(row.iterations)
        row.schedule(scale)
    except ValueError as error:
        words = f"{error}, for row {row.name}: a multiple of 0.01 serves all rows"
        raise argparse.ArgumentError(None, words) from error


def stages(scale: Scale) -> str:
    """Table 2 in words."""
    base_lr, max_lr = ROWS["triangular2"].bounds
    return "\n".join(
        [
            "| base_lr | max_lr | step size | start | end |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {factor * base_lr:g} | {factor * max_lr:g} | {scale.steps(size):,} | "
                f"{scale.steps(start) if start else 0:,} | {scale.steps(end):,} |"
                for factor, size, start, end in STAGES
            ),
        ]
    )


@contextmanager
def _surroundings(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads or before[0])
    # All batches are of one shape: the fastest convolutions for it are worth looking for.
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def run(args: argparse.Namespace) -> int:
    """Do what the options ask for.

    Returns:
        The exit code: 0, or 128 + the signal that stopped it.

    Raises:
        argparse.ArgumentError: for options, data and results that do not go together.
        OSError: noticed before anything is trained.
    """
    try:
        if args.report:
            print(report(args.out))
            if args.readme:
                write_readme(args.readme, Store(args.out).read())
            return 0
        if args.readme:
            raise argparse.ArgumentError(None, f"--readme {args.readme}: only with --report")
        if args.data is None:
            raise argparse.ArgumentError(None, "--data is missing: the folder of CIFAR-10's files")
        if args.together > 1 and args.device == "cpu":
            words = "only on a GPU; on a CPU start a process for each, with --rows and --threads 1"
            raise argparse.ArgumentError(None, f"--together {args.together}: {words}")
        with _surroundings(args.threads):
            return _speed(args) if args.speed else _run(_chosen(args), args)
    except ValueError as error:  # in the words of what refused it
        raise argparse.ArgumentError(None, str(error)) from error


def _speed(args: argparse.Namespace) -> int:
    store = Store(args.out)
    speed = measure_speed(read(args.data, args.device), args.device, args.speed)
    (store.folder / "speed.json").write_text(json.dumps(speed, indent=1) + "\n")
    for name, rate in speed["iterations_per_s"].items():
        print(f"{name}: {rate:g} iterations/s")
    return 0


def _run(rows: Sequence[Row], args: argparse.Namespace) -> int:
    data = read(args.data, args.device)
    store = Store(args.out)
    if not args.resume and not store.is_empty():
        raise argparse.ArgumentError(
            None,
            f"--out {args.out}: there are results; add --resume to go on with them, or give "
            "another folder",
        )
    if args.table and "2" in args.table:
        print(stages(args.scale) + "\n", flush=True)
    ended = _train_all(rows, args.scale, data, store, args)
    if store.read():
        print(report(args.out))
    return 128 + ended if ended else 0
