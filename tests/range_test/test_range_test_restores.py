"""Training with a range test in its middle equals training without, for every kind of state."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from range_test_cases import (
    LOADERS,
    MODELS,
    OPTIMIZERS,
    ANumber,
    Buffers,
    Containers,
    Leaves,
    Objects,
    Odd,
    Opaque,
    OwnLoader,
    dataset,
    examples,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from clr_optim import CyclicalOptimizer
from clr_optim.range_test import RangeTest, lr_range_test
from clr_optim.range_test.record import Record

# torch warns when one of its optimizers makes the first sparse tensor.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

# ---- training with and without


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def trained(
    model: str, optimizer: str, loader: str, wrapped: bool, between: Any, before: int = 1
) -> list[Any]:
    """Return losses and parameters of a training, with a call between two parts."""
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
    """Return a range test that an exception in loader, model, loss or step ends."""

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
        optimizer = optimizer if optimizer in ("odd", "sgd", "adagrad-decay-start") else "sgd"

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
        if t is not buffers.resized and t is not buffers.grown  # torch has moved their memory
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
    """Holds data that must not be copied: a copy would not fit into memory."""

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


def test_large_data_of_a_model_or_loader_are_not_copied():
    model, loader = Large(), Images()
    loader.model = model
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    assert model.images.calls == 5  # an object with so much data is not put back
    assert loader.calls == 0
    assert loader.order.tolist() == [0, 1, 2]
    assert loader.rng.random() == np.random.default_rng(0).random()


class Telling(Dataset):
    """Returns the number of calls in its worker."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i):
        self.calls += 1
        return torch.full((4,), float(self.calls)), torch.zeros(3)


@pytest.mark.parametrize("started", [False, True], ids=["new", "started"])
def test_persistent_workers_keep_their_state(started):
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


def test_a_failure_to_put_back_warns_and_the_rest_is_put_back():
    model = FailsToLoad()
    weight = model.layer.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="could not put back 1 of .*OSError: no such state"):
        run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    assert torch.equal(model.layer.weight, weight)
    assert model.scale == 1.0


@pytest.mark.parametrize("size", [0, 4])
def test_freed_memory_is_freed_again(size):
    """FSDP frees the memory of whole parameters."""
    model = ANumber()
    model.register_buffer("whole", torch.ones(5))
    model.whole.untyped_storage().resize_(size)
    model.register_forward_hook(lambda m, x, y: m.whole.untyped_storage().resize_(20) and None)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    assert model.whole.untyped_storage().nbytes() == size
    assert model.whole.shape == (5,)


def test_read_only_memory_is_not_written():
    numbers = np.frombuffer(b"12345678" * 2, dtype=np.float64)
    model = ANumber()
    model.numbers = numbers
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    assert model.numbers is numbers


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch 2.14 and later
def test_a_script_module_is_put_back():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Folder(Dataset):
    """Like an image folder: shuffles many names."""

    def __init__(self) -> None:
        self.samples = [(f"name {i}", [i]) for i in range(25_000)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i):
        if i == 0:
            random.shuffle(self.samples)
        return examples()[i]


def test_a_long_list_gets_its_order_back_without_a_search_of_its_members(monkeypatch):
    data = Folder()
    names = list(data.samples)
    model = nn.Linear(4, 3)
    noted, note = [], Record.copy

    def counted(self: Record, value: Any) -> None:
        noted.append(1)
        note(self, value)

    monkeypatch.setattr(Record, "copy", counted)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=4))
    assert all(a is b for a, b in zip(data.samples, names, strict=True))
    assert len(noted) < 10_000


class Unclonable(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.detach:
            raise NotImplementedError("no detach")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_tensor_that_cannot_be_copied_does_not_end_the_test():
    model = ANumber()
    model.odd = torch.ones(2).as_subclass(Unclonable)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), LOADERS["list"]())
    assert model.scale == 1.0
