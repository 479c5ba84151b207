"""Events that save, load, copy and wrap again."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from native_helpers import HALF, NUMBERS, failure, load, members
from torch import Tensor

from clr_optim import CyclicalOptimizer
from fuzz.events import FLAG, WHICH, event
from fuzz.expected import POLICIES
from fuzz.pair import Pair
from fuzz.setups import FLAGS


class CheckpointEvents(Pair):
    """Save, load, copy and wrap again."""

    def loads(self, state: Any, twin_state: Any) -> bool:
        """Load both. Return False if ours refused state with which torch cannot step."""
        error = failure(lambda opt: opt.load_state_dict(state), self.ours)
        if error is not None:
            if not self.is_refusal(error, twin_state):
                raise error
            return False
        load(self.twin, twin_state)
        if self.masters:
            self.restore_wide(twin_state)
        return True

    def restore_wide(self, twin_state: Any) -> None:
        """Give the twin the float32 state of a checkpoint, which torch's load has rounded."""
        for group, saved in zip(self.twin.param_groups, twin_state["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for name, t in twin_state["state"].get(index, {}).items():
                    if isinstance(t, Tensor) and name not in NUMBERS:
                        self.twin.state[p][name] = t.clone()

    def is_refusal(self, error: Exception, twin_state: Any) -> bool:
        """Return whether ours refused a checkpoint that torch loads and then cannot step with."""
        if not isinstance(error, ValueError):
            return False
        loaded = copy.deepcopy(self.twin)
        loaded.load_state_dict(copy.deepcopy(twin_state))
        for p in members(loaded):
            p.grad = torch.zeros_like(p)
        return failure(lambda opt: opt.step(), loaded) is not None

    def from_torch(self) -> Any:
        """Return torch's checkpoint with the flags that our optimizer was built with."""
        state = copy.deepcopy(self.twin.state_dict())
        if not self.exact:
            for saved, group in zip(state["param_groups"], self.ours.param_groups, strict=True):
                saved.update({k: group[k] for k in FLAGS if k in group})
        return state

    @event(0.5)
    def load_own_state_dict(self) -> bool | None:
        twin_state = copy.deepcopy(self.twin.state_dict())
        done = self.loads(copy.deepcopy(self.ours.state_dict()), twin_state)
        self.overwritten = False
        return None if done else False

    @event(0.5, sets=FLAG)
    def load_torchs_state_dict(self, sets: bool) -> bool | None:
        """A checkpoint without a position starts at 0."""
        state = self.from_torch()
        if not self.loads(state, copy.deepcopy(self.twin.state_dict())):
            return False
        self.overwritten = False
        if sets:
            self.ours.set_iteration(self.expected.position)
        else:
            self.expected.position = 0
        return None

    @event(0.4, own=FLAG)
    def load_beneath(self, own: bool) -> bool | None:
        """Load into the wrapped optimizer, as code does that still holds a reference to it."""
        if self.masters:
            return False  # torch's load rounds float32 state, and the next step raises
        rates = self.expected.rates() if own else [g["lr"] for g in self.twin.param_groups]
        if not any(rates):
            return False  # with zero gradients, a loaded rate of 0 looks like a checkpointer's step
        if own:
            state = copy.deepcopy(self.ours.state_dict())
            twin_state = copy.deepcopy(self.twin.state_dict())
        else:
            state = self.from_torch()
            twin_state = copy.deepcopy(self.twin.state_dict())
            self.expected.position = 0
        # A kernel widens the states of one element that torch's load has cast to 16 bits.
        self.ours.optimizer.load_state_dict(state)
        self.twin.load_state_dict(twin_state)
        for opt in () if self.exact else self.pair():
            for values in map(opt.state.get, members(opt)):
                for name in NUMBERS & (values or {}).keys():
                    if isinstance(values[name], Tensor) and values[name].dtype in HALF:
                        values[name] = values[name].float()
        self.overwritten = True  # until the next step
        self.noticed()
        return None

    @event(0.5)
    def torch_loads_ours(self) -> bool | None:
        """torch keeps our keys, which it does not know."""
        ours = copy.deepcopy(self.ours.state_dict())
        state = copy.deepcopy(self.ours.state_dict())
        self.overwritten = False  # state_dict() wrote our rates into the groups
        for saved, group in zip(state["param_groups"], self.twin.param_groups, strict=True):
            if not self.exact:
                saved.update({k: group[k] for k in (*FLAGS, "lr") if k in group})
            for key in [key for key in saved if key.startswith("clr_")]:
                del saved[key]
        return None if self.loads(ours, state) else False

    def shapes(self) -> Any:
        """Return what a checkpoint must fit. A kernel's state also has its parameter's layout."""
        return [
            [(p.shape, p.stride() if self.only_kernels else ()) for p in group["params"]]
            for group in self.twin.param_groups
        ]

    @event(0.7)
    def save(self) -> None:
        def written(state: Any) -> bytes:
            file = io.BytesIO()
            torch.save(state, file)
            return file.getvalue()

        files = [written(opt.state_dict()) for opt in self.pair()]
        self.overwritten = False
        self.saved = files, copy.deepcopy(self.expected), self.shapes()

    @event(0.7)
    def load(self) -> bool | None:
        """Load an older checkpoint if its shapes still fit."""
        if self.saved is None or self.saved[2] != self.shapes():
            return False
        files, then, _ = self.saved
        states = [torch.load(io.BytesIO(file), weights_only=not self.odd) for file in files]
        if not self.loads(*states):
            return False
        self.overwritten = False
        then, ends = copy.deepcopy(then), self.expected.ends
        self.expected, self.expected.ends = then, ends
        return None

    @event(0.7, to_torch=(False, False, True), own=FLAG)
    def change_backend(self, to_torch: bool, own: bool) -> bool | None:
        """Wrap again for another backend, from our checkpoint or torch's."""
        if self.exact or (to_torch and self.only_kernels):
            return False
        saved = copy.deepcopy(self.ours.state_dict()) if own else self.from_torch()
        bounds = self.expected.bounds
        schedule = POLICIES[self.expected.policy].schedule
        if not schedule.has_bounds:
            low, high = zip(*bounds, strict=True)
            base = list(low) if schedule.reads_base_lr else None
            self.wrap.update(base_lr=base, max_lr=list(high))
        inner = self.ours.optimizer
        self.noticed()  # only the device may know of an overflow: ask before wrapping again
        self.ours = CyclicalOptimizer(
            inner, **{**self.wrap, "backend": "torch" if to_torch else "auto"}
        )
        self.overwritten = False
        # The new wrapper starts at 0, unless the optimizer has loaded a checkpoint and not stepped
        # since.
        assert self.ours.iteration in (0, self.expected.position)
        error = failure(lambda opt: opt.load_state_dict(saved), self.ours)
        if error is not None and not self.is_refusal(error, self.twin.state_dict()):
            raise error
        self.ours.set_iteration(self.expected.position)
        self.listen()
        return None

    @event(0.7, pickled=FLAG)
    def keep_a_copy(self, pickled: bool) -> None:
        """Neither torch nor we copy gradients and hooks."""
        kept = self.ours, self.twin, self.expected, self.ended
        whole = (*self.pair(), self.expected)
        ours, twin, expected = (
            pickle.loads(pickle.dumps(whole)) if pickled else copy.deepcopy(whole)
        )
        self.ours, self.twin, self.expected = ours, twin, expected
        self.listen()
        self.others = [*self.others, (*self.pair(), self.expected, self.ended, False)][-2:]
        self.ours, self.twin, self.expected, self.ended = kept

    @event(0.7, i=WHICH)
    def go_on_with_a_copy(self, i: int) -> bool | None:
        if not self.others:
            return False
        i %= len(self.others)
        now = (*self.pair(), self.expected, self.ended, self.overwritten)
        other, self.others[i] = self.others[i], now
        self.ours, self.twin, self.expected, self.ended, self.overwritten = other
        return None
