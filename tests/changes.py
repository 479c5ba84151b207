"""Changes that happen between two steps: gradients, state, parameters, groups and settings.

Each change is a function of an optimizer or of a pair of twins. The native and the Triton backend
go through the same changes.
"""

from __future__ import annotations

import copy
import io
import pickle

import torch
from native_helpers import BY_NAME, NUMBERS, drawn, like, load, members, parameters, twins, wrapped


def many(name, count, **wrap):
    """Return twins with ``count`` small parameters."""
    return twins(BY_NAME[name], [(3, 2)] * count, **wrap)


# ---- gradients that come and go


def _all(pair, k):
    pair.draw()


def _alternating(pair, k):
    pair.draw()
    drop(pair, lambda i: (i + k) % 2)


def _none(pair, k):
    pair.draw()
    drop(pair, lambda i: k % 3 == 1)


def _never(pair, k):
    pair.each(lambda opt: opt.zero_grad())


def _zeroed(pair, k):
    if k == 0:
        pair.draw()
    pair.each(lambda opt: opt.zero_grad(set_to_none=False))
    for p, q in zip(*map(members, pair.both()), strict=True):
        p.grad.add_(k - 2.5)
        q.grad.add_(k - 2.5)


def _late(pair, k):
    pair.draw()
    drop(pair, lambda i: i == 1 and k < 5)


def _other_layout(pair, k):
    pair.draw()
    if k % 2:
        for opt in pair.both():
            p = members(opt)[0]
            p.grad = p.grad.t().contiguous().t()
            assert p.grad.stride() != p.stride()


def _expanded(pair, k):
    pair.draw()
    if k % 2:
        for opt in pair.both():
            for p in members(opt):
                p.grad = torch.full((), 0.5 + k, dtype=p.dtype).expand(p.shape)


def _one_tensor_for_two(pair, k):
    pair.draw()
    for opt in pair.both():
        members(opt)[3].grad = members(opt)[1].grad


def drop(pair, which):
    for opt in pair.both():
        for i, p in enumerate(members(opt)):
            if which(i):
                p.grad = None


PATTERNS = {
    f.__name__.strip("_"): f
    for f in (
        _all, _alternating, _none, _never, _zeroed, _late, _other_layout, _expanded,
        _one_tensor_for_two,
    )
}  # fmt: skip


def sparse(grad, k):
    rows = torch.tensor([k % grad.shape[0], 0, k % grad.shape[0]])
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=True)


class Odd:
    """Gradients whose memory at their address does not hold their values."""

    @staticmethod
    def negated(p, values):
        return torch.complex(values, -values).conj().imag

    @staticmethod
    def zeros(p, values):
        return torch._efficientzerotensor(p.shape, dtype=p.dtype)

    @staticmethod
    def wrapper(p, values):
        from torch.testing._internal.two_tensor import TwoTensor

        return TwoTensor(values, values.clone())

    @staticmethod
    def subclass(p, values):
        class Doubled(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                def plain(x):
                    return x.as_subclass(torch.Tensor) * 2 if isinstance(x, Doubled) else x

                with torch._C.DisableTorchFunctionSubclass():
                    return func(*map(plain, args), **(kwargs or {}))

        return values.as_subclass(Doubled)


# ---- checkpoints and copies


def reload(opt, backend):
    """Save a checkpoint, and load it into a new optimizer of the given backend."""
    file = io.BytesIO()
    torch.save({"params": members(opt), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [torch.nn.Parameter(p.detach().clone()) for p in saved["params"]]
    defaults = {k: v for k, v in opt.defaults.items() if k not in ("lr", "decoupled_weight_decay")}
    new = wrapped(type(opt.optimizer)(params, lr=opt.defaults["lr"], **defaults), backend=backend)
    new.load_state_dict(saved["opt"])
    return new


def through_pickle(opt):
    return pickle.loads(pickle.dumps(opt))


# ---- tensors, state and groups


def swap_data(opt):
    for p in members(opt):
        p.data = like(p.detach() * 2, p)


def swap_layout(opt):
    p = members(opt)[0]
    p.data = p.detach().t().contiguous().t()


def swap_shape(opt):
    p = members(opt)[0]
    p.grad = None
    p.data = drawn([(2, 6)], p.dtype)[0]


def shrink(opt):
    """Keep the address, but with fewer elements."""
    p = members(opt)[1]
    p.grad = None
    p.data = p.detach()[:4]
    for name, t in opt.state[p].items():
        if name not in NUMBERS:
            opt.state[p][name] = t[:4]


def shrink_in_place(opt):
    p = members(opt)[1]
    p.grad = None
    p.data = p.detach().resize_(4)
    for name, t in opt.state[p].items():
        if name not in NUMBERS:
            t.resize_(4)


def shrink_the_parameter_alone(opt):
    p = members(opt)[1]
    p.grad = None
    p.data = p.detach()[:4]


def grow(opt):
    p = members(opt)[1]
    p.grad = None
    p.data = torch.cat([p.detach(), p.detach()])
    for name, t in opt.state[p].items():
        if name not in NUMBERS:
            opt.state[p][name] = torch.cat([t, t])


def replace_state(opt):
    for state in opt.state.values():
        for name in list(state):
            state[name] = state[name] + 1


def swap_state_data(opt):
    for state in opt.state.values():
        for name, t in state.items():
            t.data = state[name].detach() * 0.5 if name != "step" else t + 2


def transpose_state(opt):
    state = opt.state[members(opt)[0]]
    for name, t in state.items():
        if t.dim() == 2:
            state[name] = t.t().contiguous().t()


def widen_counters(opt):
    for state in opt.state.values():
        if "step" in state:
            state["step"] = state["step"].double()


def half_the_counters(opt):
    state = opt.state[members(opt)[0]]
    if "step" in state:
        state["step"] = state["step"].bfloat16()


def one_counter_for_two(opt):
    one, two = (opt.state[p] for p in members(opt)[:2])
    if "step" in one:
        two["step"] = one["step"]


def one_buffer_for_two(opt):
    one, two = members(opt)[1], members(opt)[3]
    for name, t in opt.state[one].items():
        opt.state[two][name] = t


def delete_state_tensor(opt):
    state = opt.state[members(opt)[0]]
    state.pop(next(reversed(list(state))))


def none_in_state(opt):
    state = opt.state[members(opt)[0]]
    state[next(reversed(list(state)))] = None


def delete_state_of_one(opt):
    del opt.state[members(opt)[0]]


def clear_state_of_one(opt):
    opt.state[members(opt)[0]].clear()


def clear_state(opt):
    opt.state.clear()


def new_state_dicts(opt):
    for p in list(opt.state):
        opt.state[p] = {name: t.clone() for name, t in opt.state[p].items()}


def new_state_object(opt):
    inner = getattr(opt, "optimizer", opt)
    inner.state = copy.copy(inner.state)


def load_own(opt):
    load(opt, copy.deepcopy(opt.state_dict()))


def load_other(opt):
    other = copy.deepcopy(opt)
    for p in members(other):
        p.grad = like(torch.ones(p.shape), p)
    other.step()
    load(opt, other.state_dict())


def to_float32(opt):
    for p in members(opt):
        p.grad = None
        p.data = p.detach().float()


def to_float32_and_back(opt):
    to_float32(opt)
    for p in members(opt):
        p.data = p.detach().double()


def cast_with_state(opt):
    to_float32(opt)
    for state in opt.state.values():
        for name, t in state.items():
            state[name] = t.float()


def cast_one(opt):
    p = members(opt)[0]
    p.grad = None
    p.data = p.detach().float()


def add_group(opt):
    opt.add_param_group({"params": parameters(drawn(((3, 2), ()), torch.float64, 8)), "lr": 0.02})


def append_in_place(opt):
    opt.param_groups[0]["params"].extend(parameters(drawn([(3,)], torch.float64, 8)))


def remove_in_place(opt):
    del opt.param_groups[0]["params"][1]


def replace_in_place(opt):
    opt.param_groups[0]["params"][1] = parameters(drawn([(6,)], torch.float64, 8))[0]


def reverse_in_place(opt):
    opt.param_groups[0]["params"].reverse()


def new_list(opt):
    opt.param_groups[0]["params"] = list(opt.param_groups[0]["params"])[::-1]


def a_tuple(opt):
    opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"])


def new_group_dict(opt):
    opt.param_groups[0] = dict(opt.param_groups[0])


def freeze(opt):
    members(opt)[0].requires_grad_(False)


def gaps(opt):
    p = members(opt)[0]
    p.grad = None
    p.data = drawn([(5, 6)], p.dtype)[0][:, ::2]


def share_memory(opt):
    params = members(opt)
    params[3].data = params[1].detach()


EVENTS = [
    swap_data, swap_layout, swap_shape, shrink, shrink_in_place, shrink_the_parameter_alone,
    grow, replace_state, swap_state_data, transpose_state, widen_counters,
    half_the_counters, one_counter_for_two, one_buffer_for_two, delete_state_tensor, none_in_state,
    delete_state_of_one, clear_state_of_one, clear_state, new_state_dicts, new_state_object,
    load_own, load_other, to_float32, to_float32_and_back, cast_with_state, cast_one, add_group,
    append_in_place, remove_in_place, replace_in_place, reverse_in_place, new_list, a_tuple,
    new_group_dict, freeze, gaps, share_memory,
]  # fmt: skip


# ---- settings


SETTINGS = {
    "betas": {"betas": (0.3, 0.7)},
    "amsgrad-on": {"amsgrad": True},
    "amsgrad-off": {"amsgrad": False},
    "momentum-0": {"momentum": 0},
    "momentum-0.5": {"momentum": 0.5},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.5},
    "weight-decay": {"weight_decay": 0.5},
    "weight-decay-0": {"weight_decay": 0},
    "tensor-weight-decay": {"weight_decay": torch.tensor(0.25, dtype=torch.float64)},
    "maximize": {"maximize": True},
    "eps": {"eps": 0.5},
    "lr-decay": {"lr_decay": 0.5},
    "rho": {"rho": 0.2},
    "alpha": {"alpha": 0.2},
    "centered": {"centered": True},
    "not-centered": {"centered": False},
    "decoupled": {"decoupled_weight_decay": True},
    "differentiable": {"differentiable": True},
    "foreach": {"foreach": True},
}
