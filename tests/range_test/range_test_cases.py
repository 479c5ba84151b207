"""Models, optimizers and loaders with every kind of state that training changes."""

from __future__ import annotations

import array
import io
import random
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cases import EVERY_CLASS
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

# ---- models: forward maps (n, 4) to (n, 3) and changes state


class Leaves(nn.Module):
    """A layer whose output depends on all earlier calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.prepare()

    def prepare(self) -> None: ...

    def trace(self, y: Tensor) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * (1.0 + 0.1 * np.tanh(self.trace(y.detach())))


class ANumber(Leaves):
    scale = 1.0

    def trace(self, y):
        self.scale = 0.9 * self.scale + float(y.abs().max())
        return self.scale


class ExtraState(ANumber):
    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


class Native:
    """Stands for a C++ object: Python cannot search or copy it."""

    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0


class ExtraStateOfANativeObject(Leaves):
    def prepare(self):
        self.native = Native()

    def trace(self, y):
        self.native.count += 1
        return self.native.count

    def get_extra_state(self):
        return self.native.count

    def set_extra_state(self, state):
        self.native.count = state


class ExtraStateInANewObject(ExtraStateOfANativeObject):
    def set_extra_state(self, state):
        self.native = Native()
        self.native.count = state


class Containers(Leaves):
    def prepare(self):
        self.nested = {"list": [1.0], "deque": deque([1.0], maxlen=5), "tuple": ([0.5], "name")}
        self.counts, self.order = Counter(a=1), OrderedDict(a=1)
        self.names, self.default = {"a"}, defaultdict(list)
        self.bytes, self.numbers = bytearray(b"ab"), array.array("d", [1.0])

    def trace(self, y):
        value = float(y.mean())
        self.nested["list"].append(value)
        self.nested["deque"].append(value)
        self.nested["tuple"][0].append(value)
        self.nested[str(len(self.names))] = value
        self.counts["a"] += 1
        self.order.move_to_end("a")
        self.names.add(str(value))
        self.default["a"].append(value)
        self.bytes += b"c"
        self.numbers.append(value)
        things = (self.nested, self.names, self.bytes, self.default["a"])
        return sum(self.numbers) + sum(self.nested["deque"]) + sum(map(len, things))


class Arrays(Leaves):
    def prepare(self):
        self.values, self.grown = np.ones(3), np.zeros(1)
        self.objects = np.array([[1.0], None], dtype=object)
        self.tensor, self.graph = torch.zeros(3), None

    def trace(self, y):
        self.values *= 0.9
        self.grown.resize(len(self.grown) + 1, refcheck=False)
        self.objects[0].append(1.0)
        self.tensor += y.mean(0)
        self.graph = y.sum() * self.layer.weight.sum()
        return self.values.sum() + len(self.grown) + len(self.objects[0]) + float(self.tensor.sum())


@dataclass
class Meter:
    total: float = 0.0
    values: list[float] = field(default_factory=list)
    last: Tensor | None = None
    parent: Any = None


class Slots:
    __slots__ = ("__weakref__", "later", "total")

    def __init__(self) -> None:
        self.total = 0.0


class Objects(Leaves):
    """Objects that hold the model, or each other."""

    def prepare(self):
        self.meter, self.slots = Meter(parent=[self]), Slots()
        self.meter.parent.append(self.meter)
        self.space = types.SimpleNamespace(total=0.0)

    def trace(self, y):
        self.meter.total += float(y.mean())
        self.meter.values.append(1.0)
        self.meter.last = y if self.meter.last is None else self.meter.last.add_(1.0)
        self.slots.total += 1.0
        self.slots.later = 1.0 + getattr(self.slots, "later", 0.0)
        self.space.total += 0.1
        return sum((*self.meter.values, self.slots.later, self.space.total, self.slots.total))


class Generators(Leaves):
    def prepare(self):
        self.torch_, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.old = np.random.default_rng(1), np.random.RandomState(1)
        self.bits, self.system = np.random.MT19937(1), random.SystemRandom()

    def trace(self, y):
        drawn = float(torch.rand((), generator=self.torch_)) + self.python.random()
        return drawn + self.numpy.random() + self.old.rand() + float(self.bits.random_raw() % 7)


class Buffers(Leaves):
    """Buffers that change shape, stride, dtype and memory, appear and disappear."""

    def prepare(self):
        self.register_buffer("resized", torch.ones(1))
        self.register_buffer("shrunk", torch.arange(6.0))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3))
        self.register_buffer("moved", torch.ones(2))
        self.register_buffer("set", torch.ones(2))
        self.register_buffer("cast", torch.ones(2))
        self.register_buffer("grown", torch.ones(5))
        self.register_buffer("vanishing", torch.ones(2))
        self.register_buffer("none", None)
        self.register_buffer("wide", torch.ones(1).expand(6), persistent=False)
        self.register_buffer("sparse", torch.eye(3).to_sparse())

    def trace(self, y):
        size = len(self.resized) + 1
        self.resized.resize_(size).fill_(0.1)
        self.shrunk.resize_(3).mul_(0.5)
        self.turned.data = self.turned.data.t()
        self.turned[0] += 1.0
        self.moved.data = self.moved.data * 1.1
        self.set.set_(torch.full((size,), 0.2))
        self.cast.data = self.cast.data.double() * 1.1
        self.grown.untyped_storage().resize_(4 * (5 + size))
        self.wide[:1] += 0.1
        self.sparse.add_(torch.sparse_coo_tensor([[0], [1]], [0.1], (3, 3), check_invariants=True))
        if hasattr(self, "vanishing"):
            del self.vanishing
        self.none = torch.ones(2)
        self.register_buffer(f"new{size}", torch.ones(1))
        found = [self.resized, self.shrunk[:1], self.turned[:, 0], self.moved, self.set, self.cast]
        return float(sum(b.sum() for b in [*found, self.wide[0], self.sparse.to_dense()])) + len(
            list(self.buffers())
        )


class Parameters(Leaves):
    """Parameters that change stride and requires_grad, appear, and hold attributes."""

    def trace(self, y):
        weight = self.layer.weight
        weight.data = weight.data.t().contiguous().t()
        self.layer.bias.requires_grad_(not self.layer.bias.requires_grad)
        weight.calls = getattr(weight, "calls", 0) + 1
        self.extra = nn.Parameter(torch.ones(2))
        return weight.calls


class HiddenModule(Leaves):
    """A module in a list, which is no submodule."""

    def prepare(self):
        self.hidden = [nn.BatchNorm1d(3)]

    def trace(self, y):
        self.hidden[0](y)
        return float(self.hidden[0].running_mean.sum())


class Uncopyable(Leaves):
    """Objects without a copy stay unchanged, and the other state is put back."""

    def prepare(self):
        self.things = {
            "lock": threading.Lock(), "file": io.StringIO("text"), "thread": threading.Thread(),
            "function": lambda: 1, "iterator": iter([1]), "generator": (i for i in range(3)),
            "stream": torch.Stream, "native": Native(), "list": [1.0],
        }  # fmt: skip
        self.lock = threading.RLock()

    def trace(self, y):
        self.things["list"].append(1.0)
        return sum(self.things["list"])


class CountingHook:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module, args, output):
        self.calls += 1
        return output * (1.0 + 0.01 * self.calls)


def hooked() -> nn.Module:
    model = nn.Linear(4, 3)
    model.register_forward_hook(CountingHook())
    return model


class Recurrent(nn.Module):
    """Carries its hidden state from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.layer, self.state = nn.LSTM(4, 3), nn.Linear(3, 3), None

    def forward(self, x):
        y, state = self.lstm(x, self.state)
        self.state = tuple(part.detach() for part in state)
        return self.layer(y)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])
        self.b[0].weight = self.a.weight

    def forward(self, x):
        return self.b[1](self.b[0](self.a(x)))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + self.table((x[:, 0] > 0).long()).sum()


class Averaged(Leaves):
    def prepare(self):
        self.average = torch.optim.swa_utils.AveragedModel(nn.Linear(4, 3))

    def trace(self, y):
        self.average.update_parameters(self.layer)
        return float(self.average.module.weight.detach().sum())


MODELS = {
    cls.__name__: cls
    for cls in (
        ANumber, ExtraState, ExtraStateOfANativeObject, ExtraStateInANewObject, Containers, Arrays,
        Objects, Generators, Buffers, Parameters, HiddenModule, Uncopyable, Recurrent, Tied,
        Averaged,
    )
} | {
    "norms": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
    ),
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "spectral-old": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "weight": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "hook": hooked,
    "embedding": Embedded,
}  # fmt: skip


# ---- optimizers with every kind of state


class History:
    def __init__(self) -> None:
        self.values = deque(maxlen=3)
        self.lock = threading.Lock()


class Opaque:
    """Copies itself by __deepcopy__."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def __deepcopy__(self, memo):
        return Opaque(self.count)


class Odd(torch.optim.Optimizer):
    """Steps along the mean of the last gradients, scaled by all of its state."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr, "odd": Opaque()})
        self.generator = torch.Generator().manual_seed(7)
        self.numpy = np.random.default_rng(7)
        self.python = random.Random(7)
        self.steps, self.meter = 0, Meter()

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        self.meter.values.append(0.01)
        noise = float(torch.rand((), generator=self.generator))
        noise += self.numpy.random() + self.python.random() + sum(self.meter.values)
        for group in self.param_groups:
            group["odd"].count += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
                state = self.state[p]
                if not state:
                    state["last"] = deque(maxlen=4)
                    state["numbers"] = np.zeros(2)
                    state["history"] = History()
                    state["meter"] = Meter()
                    state["opaque"] = Opaque()
                    state["seen"] = set()
                    state["sparse"] = torch.zeros(3).to_sparse()
                    state["nested"] = {"a": [torch.zeros(()), (torch.zeros(1),)]}
                state["last"].append(grad.clone())
                state["numbers"] += (1.0, noise)
                state["history"].values.append(noise)
                state["meter"].values.append(1.0)
                state["opaque"].count += 1
                state["seen"].add(self.steps)
                state["sparse"].add_(torch.ones(3).to_sparse())
                state["nested"]["a"][0] += 1
                state["nested"]["a"][1][0].add_(1.0)
                mixed = sum(state["numbers"]) + sum(state["history"].values) + len(state["seen"])
                mixed += sum(state["meter"].values) + state["opaque"].count + group["odd"].count
                mixed += float(state["sparse"].to_dense().sum() + state["nested"]["a"][0])
                mixed += float(state["nested"]["a"][1][0])
                p.sub_(torch.stack(list(state["last"])).mean(0) * group["lr"] * np.tanh(mixed))


class Inner(torch.optim.Optimizer):
    """Hands its steps to an optimizer inside."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)

    def step(self, closure=None):
        self.inner.step()


OPTIMIZERS = {
    case.name: case.make
    for case in EVERY_CLASS
    if not case.closure and not case.only_2d and not case.sparse
    if case.cls is not torch.optim.Rprop  # which reads its first rate alone, and is refused
} | {"odd": Odd, "inner": Inner}


# ---- loaders


def examples(n: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, generator=generator), torch.randn(3, generator=generator)) for _ in range(n)
    ]


class OwnSampler(Sampler):
    epoch = 0

    def __iter__(self):
        self.epoch += 1
        order = np.random.default_rng(self.epoch).permutation(12)
        return iter(order.tolist())

    def __len__(self) -> int:
        return 12


class Augmented(Dataset):
    def __init__(self) -> None:
        self.data, self.rng, self.file = examples(), np.random.default_rng(0), None
        self.cache: dict[int, Tensor] = {}
        self.calls = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i):
        self.file = io.StringIO() if self.file is None else self.file
        self.calls += 1
        x, y = self.data[i]
        x = self.cache.setdefault(i, x + self.calls)
        return x + self.rng.random(), y


class OwnLoader:
    """Shuffles its order in place, and draws from two kinds of generators."""

    def __init__(self) -> None:
        self.order, self.epoch, self.data = np.arange(3), 0, examples()
        self.random, self.numpy = random.Random(3), np.random.RandomState(3)

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        self.epoch += 1
        self.numpy.shuffle(self.order)
        for i in self.order:
            rows = self.data[4 * i : 4 * i + 4]
            x, y = (torch.stack(part) for part in zip(*rows, strict=True))
            yield x + 0.1 * self.epoch + self.random.random(), y


class Wraps:
    def __init__(self, loader: Any) -> None:
        self.loaders = [loader]

    def __iter__(self):
        yield from self.loaders[0]


def dataset() -> TensorDataset:
    return TensorDataset(*map(torch.stack, zip(*examples(), strict=True)))


def batches(**options: Any) -> DataLoader:
    return DataLoader(dataset(), batch_size=4, **options)


LOADERS = {
    "list": lambda: list(batches()),
    "shuffled": lambda: batches(shuffle=True),
    "generator": lambda: batches(shuffle=True, generator=torch.Generator().manual_seed(2)),
    "sampler": lambda: batches(sampler=OwnSampler()),
    "batch sampler": lambda: DataLoader(
        dataset(), batch_sampler=torch.utils.data.BatchSampler(OwnSampler(), 4, False)
    ),
    "augmented": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "own": OwnLoader,
    "wrapped": lambda: Wraps(batches(sampler=OwnSampler())),
}
