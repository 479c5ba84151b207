"""Training with a range test in its middle equals training without: whatever has state."""

from __future__ import annotations

import array
import contextlib
import io
import random
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from clr_optim import CyclicalOptimizer
from clr_optim.range_test import RangeTest, lr_range_test

# torch's own, where an optimizer of torch's is the first to make a sparse tensor.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

# ---- models, whose forward takes (n, 4) to (n, 3) and leaves traces


class Leaves(nn.Module):
    """A layer whose output depends on how often, and with what, it was called."""

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
    """Stands for an object of C++: no one can look into it or copy it."""

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
    """Some hold the model, or each other."""

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
    """Buffers that change shape, stride, dtype and memory, appear and vanish."""

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
    """Parameters that are turned in their memory, frozen, renamed, and hold attributes."""

    def trace(self, y):
        weight = self.layer.weight
        weight.data = weight.data.t().contiguous().t()
        self.layer.bias.requires_grad_(not self.layer.bias.requires_grad)
        weight.calls = getattr(weight, "calls", 0) + 1
        self.extra = nn.Parameter(torch.ones(2))
        return weight.calls


class HiddenModule(Leaves):
    """A teacher that is no submodule."""

    def prepare(self):
        self.hidden = [nn.BatchNorm1d(3)]

    def trace(self, y):
        self.hidden[0](y)
        return float(self.hidden[0].running_mean.sum())


class Uncopyable(Leaves):
    """What cannot be copied is left as it is, and does not keep the rest from being put back."""

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
    """Its hidden state goes on from batch to batch."""

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


# ---- optimizers, whose state is of every kind


class History:
    def __init__(self) -> None:
        self.values = deque(maxlen=3)
        self.lock = threading.Lock()


class Opaque:
    """Copies itself, so that no one need know what is in it."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def __deepcopy__(self, memo):
        return Opaque(self.count)


class Odd(torch.optim.Optimizer):
    """Steps along a mix of the last gradients that depends on all of its state."""

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
    """Leaves all to an optimizer that it holds."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)

    def step(self, closure=None):
        self.inner.step()


OPTIMIZERS = {
    case.name: case.make
    for case in CASES
    if not case.closure and not case.only_2d and not case.sparse
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
    """Shuffles its order in place, and has all kinds of generators."""

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


# ---- training with and without


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def trained(
    model: str, optimizer: str, loader: str, wrapped: bool, between: Any, before: int = 1
) -> list[Any]:
    """Losses and parameters of two parts of a training, with something between them."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    net, batches = MODELS[model](), LOADERS[loader]()
    opt = OPTIMIZERS[optimizer](net.parameters())
    if wrapped:
        opt = CyclicalOptimizer(opt, step_size_up=3)
    seen = []

    def epoch() -> None:
        for batch in batches:
            opt.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            opt.step()
            seen.append(loss.detach())

    for _ in range(before):
        epoch()
    between(net, opt, batches)
    epoch()
    tensors = [*net.parameters(), *net.buffers()]
    kept = [t.detach().to_dense().clone() for t in tensors]
    return [*seen, *kept, torch.rand(1), torch.tensor([random.random(), np.random.rand()])]


def run(net: nn.Module, opt: Any, batches: Any, **options: Any) -> RangeTest:
    options = {"start_lr": 1e-4, "end_lr": 0.1, "num_steps": 5, **options}
    return lr_range_test(net, opt, batches, step_fn=loss_of, **options)


def nothing(*args: Any) -> None: ...


def assert_trains_as_without(*what: Any, between: Any = run, before: int = 1) -> None:
    without = trained(*what, between=nothing, before=before)
    with_test = trained(*what, between=between, before=before)
    assert len(without) == len(with_test)
    for a, b in zip(without, with_test, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_on_as_before(model):
    assert_trains_as_without(model, "sgd", "list", False)


@pytest.mark.parametrize("optimizer", ["odd", "inner"])
@pytest.mark.parametrize("before", [0, 1])
def test_odd_optimizers_train_on_as_before(optimizer, before):
    assert_trains_as_without("ANumber", optimizer, "list", False, before=before)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_goes_on_as_before(loader):
    assert_trains_as_without("ANumber", "sgd", loader, False)


def interrupted(where: str, error: type[BaseException]) -> Any:
    """A range test that ends by an exception in the loader, the model, the loss or the step."""

    def between(net: nn.Module, opt: Any, batches: Any) -> None:
        calls = []

        def raise_(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise error("from here")

        def step_fn(net: nn.Module, batch: Any) -> Tensor:
            loss = loss_of(net, batch)
            if where == "loss":
                raise_()
            return loss

        def loader() -> Any:
            for batch in batches:
                if where == "loader":
                    raise_()
                yield batch

        handles = []
        if where == "model":
            handles.append(net.register_forward_hook(raise_))
        if where == "step":
            handles.append(opt.register_step_post_hook(raise_))
        caught = contextlib.nullcontext() if error is KeyboardInterrupt else pytest.raises(error)
        with caught:
            lr_range_test(
                net, opt, loader() if where == "loader" else batches, step_fn=step_fn,
                start_lr=1e-4, end_lr=0.1, num_steps=5,
            )  # fmt: skip
        assert len(calls) == 3
        for handle in handles:
            handle.remove()

    return between


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loader", "model", "loss", "step"])
@pytest.mark.parametrize("model", ["Containers", "Buffers"])
def test_after_an_exception_too(model, where, error):
    assert_trains_as_without(model, "odd", "list", False, between=interrupted(where, error))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from(sorted(LOADERS)),
    st.booleans(),
    st.integers(0, 1),
    st.booleans(),
)
def test_training_with_a_range_test_equals_training_without(
    model, optimizer, loader, wrapped, before, offload
):
    if model == "embedding":
        optimizer = optimizer if optimizer in ("odd", "sgd", "adagrad") else "sgd"

    def between(net, opt, batches):
        run(net, opt, batches, offload=offload)

    assert_trains_as_without(model, optimizer, loader, wrapped, between=between, before=before)


# ---- the same objects, the same memory, and no more copies than needed


def test_contents_go_back_into_the_same_objects():
    model, buffers = nn.Sequential(Containers(), nn.Linear(3, 4), Objects()), Buffers()
    both = nn.ModuleList([model, buffers])
    opt = Odd([*model.parameters(), *buffers.parameters()])
    batch = LOADERS["list"]()[0]

    def step_fn(both: nn.ModuleList, batch: Any) -> Tensor:
        model, buffers = both
        return functional.mse_loss(model(batch[0]) + buffers(batch[0]), batch[1])

    step_fn(both, batch).backward()
    opt.step()
    opt.zero_grad(set_to_none=False)

    def objects() -> list[Any]:
        found: list[Any] = [opt.state, opt.meter, opt.meter.values, opt.param_groups]
        for state in opt.state.values():
            found += [*state.values(), *state["last"], state["history"].values]
        for p in [*both.parameters(), *both.buffers()]:
            found += [p, p.grad]
        containers, _, objects = model
        found += [*vars(containers).values(), *containers.nested.values(), *vars(objects).values()]
        return [thing for thing in found if not isinstance(thing, Opaque)]

    before = objects()
    places = [
        (t.data_ptr(), t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes())
        for t in [*both.parameters(), *(b for b in both.buffers() if not b.is_sparse)]
        if t is not buffers.resized and t is not buffers.grown  # whose memory torch has moved
    ]
    lr_range_test(both, opt, [batch], step_fn=step_fn, start_lr=0, end_lr=0.1, num_steps=4)
    after = objects()
    assert list(map(id, before)) == list(map(id, after))
    assert places == [
        (t.data_ptr(), t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes())
        for t in [*both.parameters(), *(b for b in both.buffers() if not b.is_sparse)]
        if t is not buffers.resized and t is not buffers.grown
    ]
    assert buffers.grown.untyped_storage().nbytes() == 4 * (5 + 2)


class Large(Leaves):
    """Leads to data that no one may copy: more than there is memory for, were it touched."""

    def prepare(self):
        self.images = Images()
        self.dataset = dataset()

    def trace(self, y):
        self.images.calls += 1
        return 1.0


class Images:
    def __init__(self) -> None:
        self.calls, self.rng = 0, np.random.default_rng(0)
        self.pixels = np.broadcast_to(np.zeros(1), (2**50,))
        self.order = np.arange(3)

    def __iter__(self):
        self.calls += 1
        self.rng.shuffle(self.order)
        return iter(LOADERS["list"]())


def test_what_a_model_or_loader_draws_from_is_not_copied():
    model, loader = Large(), Images()
    loader.model = model
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    assert model.images.calls == 5  # an object that holds as much is left as it is
    assert loader.calls == 0
    assert loader.order.tolist() == [0, 1, 2]
    assert loader.rng.random() == np.random.default_rng(0).random()


class Telling(Dataset):
    """Says how often its worker has been asked, and which process that is."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i):
        self.calls += 1
        return torch.full((4,), float(self.calls)), torch.zeros(3)


@pytest.mark.parametrize("started", [False, True], ids=["new", "started"])
def test_persistent_workers_keep_what_they_have_come_to(started):
    loader = DataLoader(Telling(), batch_size=2, num_workers=1, persistent_workers=True)
    model = nn.Linear(4, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    if started:
        assert [x[1, 0].item() for x, _ in loader] == [2.0, 4.0]
    workers = loader._iterator
    run(model, opt, loader)
    assert loader._iterator is workers
    assert [x[1, 0].item() for x, _ in loader] == ([6.0, 8.0] if started else [2.0, 4.0])


class Workers(OwnLoader):
    def __init__(self) -> None:
        super().__init__()
        self.persistent_workers = True


def test_workers_that_cannot_be_set_aside_are_named(monkeypatch):
    monkeypatch.setitem(LOADERS, "workers", Workers)
    with pytest.warns(
        UserWarning, match="workers of the loader Workers persist.*persistent_workers=False"
    ) as told:
        assert_trains_as_without("ANumber", "sgd", "workers", False)
    assert told[0].filename == __file__


class FailsToLoad(ANumber):
    def get_extra_state(self):
        return 1

    def set_extra_state(self, state):
        raise OSError("no such state")


def test_what_cannot_be_put_back_is_said_and_the_rest_is_put_back():
    model = FailsToLoad()
    weight = model.layer.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="could not put back 1 of .*OSError: no such state"):
        run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    assert torch.equal(model.layer.weight, weight)
    assert model.scale == 1.0


def test_memory_that_is_given_away_is_given_away_again():
    """As FSDP does with whole parameters."""
    model = ANumber()
    model.register_buffer("whole", torch.ones(5))
    model.whole.untyped_storage().resize_(0)
    model.register_forward_hook(lambda m, x, y: m.whole.untyped_storage().resize_(20) and None)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    assert model.whole.untyped_storage().nbytes() == 0


def test_memory_that_cannot_be_written_is_not_written():
    numbers = np.frombuffer(b"12345678" * 2, dtype=np.float64)
    model = ANumber()
    model.numbers = numbers
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    assert model.numbers is numbers


def test_a_script_module_is_put_back():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
