"""Changes between two steps on the Triton backend: tensors, state, threads, checkpoints."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from internals import (
    act_before_triton_launch,
    device_positions,
    fail_after_triton_launches,
    only_device_knows,
)
from native_helpers import BY_NAME, DTYPES, KERNELS, feed, members, parameters, unaligned, wrapped
from triton_helpers import (
    DEVICE,
    INTERPRETED,
    MARKS,
    RUNS,
    Contract,
    assert_alike,
    changes,
    choose_triton,
    contract,
    count_launches,
    drawn,
    kernels,
    named,
    twins,
)

from clr_optim.backends.triton.mirror import Mirror

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)
launches = pytest.fixture(name="launches")(count_launches)


# ---- memory


def test_a_default_device_is_not_ours():
    """A default device is for the model's tensors, not for the step's tensors on the host."""
    pair = twins(BY_NAME["adam-wd"], max_grad_norm=0.5)
    with torch.device("meta"):
        pair.ours.step()  # nothing has a gradient
    for _ in range(2):
        pair.draw()
        feed(pair.twin, pair.ours)
        with torch.device("meta"):
            pair.ours.step()
            assert pair.ours.grad_norm.device == DEVICE
            assert pair.ours.iteration
        torch.nn.utils.clip_grad_norm_(members(pair.twin), 0.5)
        pair.twin.step()
        assert_alike(pair.ours, pair.twin)


def test_steps_in_inference_mode_and_out_of_it():
    """In inference mode torch can step an optimizer without state."""
    pair = twins(BY_NAME["sgd"])
    for k in range(5):
        pair.draw()
        with torch.inference_mode(k in (0, 3)):
            pair.step()
            pair.ours.set_bounds(max_lr=0.1 * (k + 1))
        assert pair.ours.iteration == k + 1


def test_gradients_dropped_between_scan_and_launch(monkeypatch):
    """Another thread calls zero_grad(), and its forward pass takes the gradients' memory."""
    size = 200_000
    (weight,) = parameters(drawn([(size,)], torch.float32))
    opt = wrapped(torch.optim.SGD([weight], lr=1.0), backend="triton", base_lr=1.0, max_lr=1.0)
    weight.grad = torch.ones_like(weight)
    opt.step()
    taken = []

    def drop_gradient():
        weight.grad = None
        taken.extend(torch.full((size,), 7.0, device=DEVICE) for _ in range(4))

    act_before_triton_launch(monkeypatch, opt, drop_gradient)
    weight.grad = torch.ones_like(weight)
    reference = weakref.ref(weight.grad)
    before = weight.detach().clone()
    opt.step()
    assert torch.equal(weight, before - 1)
    assert reference() is None  # the step has released the gradient


def test_a_layout_without_groups_is_saved():
    """The step counters stay on the device: the layout does not say where torch has them."""
    pair = twins(BY_NAME["adam-wd"])
    pair.run(1)
    pair.ours.optimizer.register_state_dict_post_hook(lambda _, saved: {"flat": saved["state"]})
    assert set(pair.ours.state_dict()) == {"flat", "clr_optim"}


@pytest.mark.parametrize("first", [True, False])
def test_ctrl_c_between_device_and_host(first, monkeypatch):
    """The device has advanced, and the host has no note of it."""
    pair = twins(BY_NAME["adam-wd"])
    if not first:
        pair.draw()
        pair.step()
    pair.draw()
    feed(pair.twin, pair.ours)
    with monkeypatch.context() as patch:
        fail_after_triton_launches(patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            pair.ours.step()
    pair.twin.step()
    assert pair.ours.iteration == 2 - first
    assert_alike(pair.ours, pair.twin)
    for _ in range(2):
        pair.draw()
        pair.step()
    assert pair.ours.iteration == 4 - first
    assert not only_device_knows(pair.ours)


def test_a_device_that_joins_stands_where_the_others_do(monkeypatch):
    """The host may not know the position. The test plays a second device by another index."""
    from clr_optim.plan import Bucket

    begin = Bucket.begin

    def on_two(self, first, lib):
        begin(self, first, lib)
        if self.dtype == torch.float64 and DEVICE.type == "cpu":
            self.device = torch.device("cpu", 1)

    monkeypatch.setattr(Bucket, "begin", on_two)
    weights = parameters(drawn([(4,)], torch.float32)) + parameters(drawn([(4,)], torch.float64))
    opt = wrapped(torch.optim.SGD(weights[:1], lr=0.1), backend="triton", step_size_up=4)
    for overflow in (0.0, 0.0, 1.0, 0.0, 1.0):
        weights[0].grad = torch.ones_like(weights[0])
        opt.grad_scale = torch.ones((), device=DEVICE)
        opt.found_inf = torch.full((), overflow, device=DEVICE)
        opt.step()
    del opt.grad_scale, opt.found_inf
    opt.optimizer.add_param_group({"params": weights[1:], "lr": 0.1})
    weights[1].grad = torch.ones_like(weights[1])
    opt.step()
    assert device_positions(opt) == [4] * (2 if DEVICE.type == "cpu" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=contract.name_of)
@pytest.mark.parametrize("which", ["parameters", "gradients", "both"])
def test_tensors_that_are_not_aligned(which, dtype):
    contract = Contract(BY_NAME["adamw-ams"], dtype, drawn([(3, 5), (17,)], torch.float64))
    if which != "gradients":
        for opt in (contract.ours, contract.twin):
            for p in members(opt)[1:]:
                p.data = unaligned(p.detach())
        contract.segments = []
        contract._take()
    for k in range(3):
        grads = drawn([(3, 5), (17,)], dtype, k + 1)
        if which != "parameters" and k != 1:  # and aligned again in between
            grads = [grads[0], unaligned(grads[1])]
            assert grads[1].data_ptr() % 16
        contract.step(grads)
    contract.compare()


@pytest.mark.parametrize("count", [3, 12])
def test_gradients_that_come_and_go_upload_their_addresses_alone(count, monkeypatch):
    pair = twins(BY_NAME["adam"], [(5,)] * count, max_grad_norm=1e9)
    pair.run(2)
    uploads = []
    fill = Mirror.fill
    monkeypatch.setattr(
        Mirror, "fill", lambda mirror, table: (uploads.append(table.size), fill(mirror, table))
    )
    for k in range(6):
        pair.draw()
        changes.drop(pair, lambda i: i % 2 == k % 2)  # noqa: B023
        uploads.clear()
        pair.step()
        assert uploads == [count], k


def test_a_clipped_step_copies_nothing_on_the_device(monkeypatch):
    pair = twins(BY_NAME["adamw"], max_grad_norm=1e9)
    pair.run(1)
    monkeypatch.setattr(torch, "cat", None)
    pair.run(2)


EVENTS = [
    getattr(changes, name)
    for name in (
        # Only changes that make no tensors: those would lie on the CPU.
        "swap_data", "swap_layout", "shrink", "shrink_in_place", "grow", "replace_state",
        "swap_state_data", "transpose_state", "widen_counters", "half_the_counters",
        "one_counter_for_two", "one_buffer_for_two", "delete_state_tensor", "none_in_state",
        "delete_state_of_one", "clear_state_of_one", "clear_state", "new_state_dicts",
        "new_state_object", "load_own", "load_other", "cast_with_state", "remove_in_place",
        "reverse_in_place", "new_list", "a_tuple", "new_group_dict", "freeze", "share_memory",
    )
]  # fmt: skip


def add_group(opt):
    values = drawn(((3, 2), ()), torch.float64, 8)
    opt.add_param_group({"params": parameters(values), "lr": 0.02})


def _cells():
    names = [case.name for case in KERNELS]
    for i, event in enumerate([*EVENTS, add_group]):
        # SGD, which counts no steps, and one of the other kernels in turn.
        chosen = ["sgd-nest-wd", names[2 + i % 8]] if INTERPRETED else names
        yield from ((event, BY_NAME[name]) for name in chosen)


@pytest.mark.parametrize("cell", list(_cells()), ids=named)
def test_events(cell):
    event, case = cell
    pair = twins(case, ((5, 3), (7,), (), (7,)), backend="auto")
    tolerance = 1e-5 if event.__name__ == "cast_with_state" else 1e-12
    pair.run(2)
    pair.each(event)
    pair.step(tolerance)  # with the gradients that are left
    pair.run(1, tolerance)
    pair.each(event)
    pair.run(1, tolerance)


@pytest.mark.skipif(RUNS and not INTERPRETED, reason="the machine's tensors are on the CPU")
def test_any_order_of_events(launches):
    """Some seeds of the fuzzer, played through the kernels."""
    from fuzz.run import drawn, play

    for seed in range(100, 106):
        play(*drawn("triton", seed, 40))
    assert sum(len(counted.taken()) for counted in launches) > 40


@pytest.mark.parametrize("duplicate", [copy.deepcopy, changes.through_pickle])
@pytest.mark.parametrize("name", ["sgd-mom", "adamw-ams"])
def test_a_copy_and_the_original_go_on(name, duplicate):
    contract.assert_a_copy_and_the_original_go_on(twins(BY_NAME[name]), duplicate, steps=2)


@kernels
def test_a_backward_through_an_older_graph_raises(case):
    pair = twins(case, ((3, 3), (3,)))
    contract.assert_a_backward_through_an_older_graph_raises(pair.ours)


def test_training_a_model():
    def make(backend):
        torch.manual_seed(6)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
        )
        model = model.double().to(DEVICE, memory_format=torch.channels_last)
        case = BY_NAME["adamw"]
        return model, case.ours(model.parameters(), backend=backend, max_grad_norm=1.0)

    runs = [make("torch"), make("triton")]
    generator = torch.Generator().manual_seed(11)
    for _ in range(5):
        x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64).to(DEVICE)
        y = torch.randint(0, 3, (8,), generator=generator).to(DEVICE)
        for model, opt in runs:
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    assert_alike(runs[1][1], runs[0][1], 1e-10)


# ---- checkpoints


@kernels
def test_a_run_may_change_backend_at_checkpoints(case):
    pair = twins(case)
    others = ("torch", "native") if INTERPRETED else ("torch", "auto")
    for backend in (others[0], "triton", others[1], "triton"):
        pair.run(2)
        pair.ours = changes.reload(pair.ours, backend)
        assert pair.ours.iteration == int(pair.ours.param_groups[0]["clr_step"])
        assert_alike(*pair.both())
    pair.run(2)


def test_a_checkpoint_is_as_torch_writes_it():
    pair = twins(BY_NAME["adamw-ams"])
    pair.run(3)
    ours, expected = pair.ours.state_dict(), pair.twin.state_dict()
    assert list(ours["state"]) == list(expected["state"])
    for mine, other in zip(ours["state"].values(), expected["state"].values(), strict=True):
        assert list(mine) == list(other)
        for name, t in other.items():
            assert (mine[name].device, mine[name].dtype) == (t.device, t.dtype), name
        assert mine["step"].item() == 3
    pair.run(1)
    assert ours["state"][0]["step"].item() in (3, 4)  # torch's own counters go on in the checkpoint
    pair.twin.load_state_dict(copy.deepcopy(pair.ours.state_dict()))
    pair.run(2)


def test_a_checkpoint_keeps_state_of_no_parameter():
    pair = twins(BY_NAME["adam"])
    pair.run(1)
    pair.ours.state["global_step"] = 5
    saved = pair.ours.state_dict()
    assert saved["state"]["global_step"] == 5
    pair.ours.load_state_dict(saved)
    pair.run(1)


def test_a_plain_checkpoint_loads_and_the_position_is_set():
    pair = twins(BY_NAME["adam"])
    pair.run(3)
    pair.ours.load_state_dict(copy.deepcopy(pair.twin.state_dict()))
    assert pair.ours.iteration == 0
    pair.run(2)
    pair.ours.set_iteration(9)
    pair.run(2)
