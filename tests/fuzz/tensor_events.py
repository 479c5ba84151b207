"""Events that concern gradients, parameters and state tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from native_helpers import dense, like, members, unaligned
from torch import Tensor

from fuzz.events import FLAG, SEEDS, WHICH, event
from fuzz.pair import Pair
from fuzz.setups import HAVE_SPARSE


class TensorEvents(Pair):
    """Give, drop and move tensors."""

    # ---- gradients

    @event(6.0, seed=SEEDS)
    def backward(self, seed: int) -> None:
        """Give all parameters new gradients."""
        self.stale = 0
        for opt in self.pair():
            for i, p in enumerate(members(opt)):
                if p.requires_grad:
                    p.grad = like(self.normal(p.shape, seed + i), p)

    @event(2.0, seed=SEEDS)
    def backward_by_autograd(self, seed: int) -> bool | None:
        """Add to the gradients by autograd, which decides about their memory."""
        if self.in_backward:
            return False
        for opt in self.pair():
            self.own_memory(opt)
            terms = [
                (p * self.normal(p.shape, seed + i).to(p.dtype)).sum().double()
                for i, p in enumerate(members(opt))
                if p.requires_grad
            ]
            if not terms:
                return False
            torch.stack(terms).sum().backward()
        return None

    @event(1.0, seed=SEEDS)
    def accumulate(self, seed: int) -> None:
        for opt in self.pair():
            self.own_memory(opt)
            for i, p in enumerate(members(opt)):
                if p.grad is not None and p.grad.layout is torch.strided:
                    p.grad.add_(self.normal(p.shape, seed + i))

    @staticmethod
    def own_memory(opt: Any) -> None:
        """Copy expanded gradients, to which nothing can be added in place."""
        for p in members(opt):
            if p.grad is not None and p.grad.layout is torch.strided and 0 in p.grad.stride():
                p.grad = p.grad.clone()

    @event(1.5, i=WHICH)
    def drop_a_gradient(self, i: int) -> None:
        for _, p in self.pick(i):
            p.grad = None

    @event(1.5, to_none=FLAG)
    def zero_grad(self, to_none: bool) -> None:
        self.both(lambda opt: opt.zero_grad(set_to_none=to_none))

    @event(1.0, i=WHICH, seed=SEEDS, kind=("transposed", "expanded", "strided"))
    def gradient_of_another_layout(self, i: int, seed: int, kind: str) -> bool | None:
        # torch's fused steps read such gradients as if they had their parameter's layout.
        if self.only_kernels or self.flag == "fused":
            return False
        for _, p in self.pick(i):
            values = self.normal(p.shape, seed).to(p.dtype)
            backwards = tuple(range(values.dim()))[::-1]
            if kind == "transposed":
                p.grad = values.permute(backwards).contiguous().permute(backwards)
            elif kind == "expanded":
                p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)
            else:
                p.grad = torch.stack([values, values], -1)[..., 1]
        return None

    @event(1.0, i=WHICH, seed=SEEDS)
    def sparse_gradient(self, i: int, seed: int) -> bool | None:
        """Give a sparse gradient, as an embedding does.

        With weight decay torch refuses in mid-step.
        """
        needs_norm = self.clip is not None or self.skip is not None
        if self.only_kernels or needs_norm or self.case.cls not in HAVE_SPARSE:
            return False
        for opt, p in self.pick(i):
            if p.dim() == 2 and p.shape[0] and not opt.param_groups[0]["weight_decay"]:
                rows = torch.tensor([seed % p.shape[0]])
                values = self.normal((1, p.shape[1]), seed).to(p.dtype)
                p.grad = torch.sparse_coo_tensor(
                    rows[None], values, p.shape, check_invariants=True
                ).coalesce()
        return None

    # ---- tensors

    @event(1.0, i=WHICH)
    def swap_data(self, i: int) -> None:
        for _, p in self.pick(i):
            p.data = like(p.detach() * 0.5, p)

    @event(1.0, i=WHICH, whole=FLAG)
    def transpose_data(self, i: int, whole: bool) -> None:
        """Transpose a parameter's memory, alone or together with its state."""
        whole = whole or self.only_kernels
        for opt, p in self.pick(i):
            if p.dim() == 2 and (p.grad is None or p.grad.layout is torch.strided):
                p.data = p.detach().t().contiguous().t()
                if whole:
                    p.grad = None
                    for name, t in opt.state.get(p, {}).items():
                        if isinstance(t, Tensor) and t.shape == p.shape:
                            opt.state[p][name] = dense(t).t().contiguous().t()

    @event(1.0, i=WHICH, length=range(1, 5), move=FLAG)
    def resize(self, i: int, length: int, move: bool) -> bool | None:
        """Shrink a parameter and its state, as pruning does, in the old memory or in new memory."""
        if self.in_backward:
            return False  # autograd keeps the shape that a parameter with a hook had
        for opt, p in self.pick(i):
            if p.dim() == 1 and p.numel() > length:
                was, p.grad = p.shape, None
                p.data = p.detach()[:length].clone() if move else p.detach()[:length]
                for name, t in opt.state.get(p, {}).items():
                    if isinstance(t, Tensor) and t.shape == was:
                        opt.state[p][name] = t.to_dense()[:length]
        return None

    @event(1.0, i=WHICH)
    def replace_state(self, i: int) -> None:
        for opt, p in self.pick(i):
            for name, t in list(opt.state.get(p, {}).items()):
                if isinstance(t, Tensor):
                    opt.state[p][name] = t.clone()

    @event(1.0, i=WHICH, what=("parameter", "gradient", "state"))
    def move_off_alignment(self, i: int, what: str) -> bool | None:
        """Move a tensor one element past the start of new memory, off a multiple of 16 bytes."""

        def movable(t: Any) -> bool:
            strided = isinstance(t, Tensor) and t.layout is torch.strided and t.numel()
            return bool(strided) and 0 not in t.stride()

        did = False
        for opt, p in self.pick(i):
            if what == "parameter" and movable(p):
                p.data, did = unaligned(p.detach()), True
            elif what == "gradient" and movable(p.grad):
                p.grad, did = unaligned(p.grad), True
            elif what == "state":
                for name, t in opt.state.get(p, {}).items():
                    if movable(t) and name != "step":
                        opt.state[p][name], did = unaligned(t), True
        return None if did else False

    @event(0.7, i=WHICH)
    def refill_state(self, i: int) -> None:
        for opt, p in self.pick(i):
            for t in opt.state.get(p, {}).values():
                if isinstance(t, Tensor) and t.layout is torch.strided:
                    t.data = t.detach() * 2

    @event(0.7, i=WHICH)
    def widen_counter(self, i: int) -> bool | None:
        """Make the counter float64, as ``.double()`` of a whole module may."""
        if self.flag:
            return False  # a checkpoint makes it float32 again: our own does, torch's does not
        for opt, p in self.pick(i):
            counter = opt.state.get(p, {}).get("step")
            if isinstance(counter, Tensor):
                opt.state[p]["step"] = counter.double()
        return None

    @event(1.0, i=WHICH)
    def rebuild_state_dict(self, i: int) -> None:
        for opt, p in self.pick(i):
            if p in opt.state:
                opt.state[p] = dict(opt.state[p])

    @event(1.0, i=WHICH)
    def delete_state(self, i: int) -> None:
        for opt, p in self.pick(i):
            opt.state.pop(p, None)

    @event(0.7, i=WHICH)
    def delete_a_buffer(self, i: int) -> None:
        """Delete a buffer of SGD, which torch then makes anew."""
        for opt, p in self.pick(i):
            if self.case.cls is torch.optim.SGD and p in opt.state:
                opt.state[p].pop("momentum_buffer", None)

    @event(0.5)
    def a_new_state_object(self) -> None:
        self.ours.optimizer.state = copy.copy(self.ours.optimizer.state)
