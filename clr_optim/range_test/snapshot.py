"""A copy of all that training changes: model, optimizer, gradients, loaders, random states.

Every value goes back into the object that holds it, so that no reference goes stale: neither an
optimizer's, nor a captured graph's. :class:`Snapshot` says what is looked into.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from clr_optim.core.warn import callers_level
from clr_optim.range_test.contents import (
    BUFFERS,
    CONTAINERS,
    GENERATORS,
    RUNNING,
    SOURCES,
    attributes_of,
    bytes_of,
    dict_of,
    is_atom,
    is_plain,
    is_wrapper,
    members_of,
    slots_of,
)
from clr_optim.range_test.put_back import (
    PutBack,
    array_back,
    generator_back,
    sharded_back,
    tensor_back,
)
from clr_optim.sharding import DTensor

__all__ = ["Snapshot"]

# Arrays and tensors of a loader or of an object count as its data, and are not copied, where they
# are larger than this and than the model.
_LARGE = 64 * 2**20
# So many objects, too, as to look into more takes seconds.
_MANY = 20_000


class Snapshot:
    """Looks into all that training changes, and puts it back.

    Looked into: tensors, arrays, containers and generators of random numbers that the modules and
    the optimizer lead to; attributes of modules and optimizers; and objects of any other class
    that lead to nothing but such data, ``large`` bytes of it at most. In the optimizer's state all
    objects are looked into, and those that cannot be are copied deeply. Loaders, samplers and
    datasets are looked into as far as they are not large.

    Args:
        modules: what is trained, and whatever else has parameters.
        optimizer: its optimizer.
        loaders: where batches come from.
        device: where it is trained.
        offload: whether tensors are copied into the CPU's memory.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: Optimizer,
        loaders: Sequence[Any],
        device: torch.device,
        offload: bool,
    ) -> None:
        self._offload = offload
        self._kept: dict[int, Any] = {}
        self._left: dict[int, Any] = {}
        self._copies: dict[int, Any] = {}
        self._put_back: list[PutBack] = []
        self._lenient = False
        self._modules = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self._reshard()
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        modular = [p for module in modules for p in module.parameters()]
        #: all parameters
        self.params: list[Tensor] = list(dict.fromkeys([*modular, *grouped]))
        buffers = [buffer for module in self._modules for buffer in module.buffers(recurse=False)]
        size = sum(bytes_of(tensor) for tensor in [*self.params, *buffers])
        self._large = max(_LARGE, size)
        self._flags = [(module, module.training) for module in self._modules]
        self._has_extra_state: set[int] = set()
        self._extra = list(filter(None, map(self._keep_extra_state, self._modules)))
        for tensor in [*self.params, *buffers]:
            self._keep(tensor)
        self._leaves = [(param, param.requires_grad, param.grad) for param in self.params]
        for _, _, grad in self._leaves:
            self._keep(grad)
        self._keep(optimizer.state, everything=True)
        self._keep(optimizer.param_groups, everything=True)
        self._keep(optimizer, everything=True)
        # What more there is need not be copied for the test to be run.
        self._lenient = True
        for module in self._modules:
            self._keep(module)
        self._persistent: list[Any] = []
        for loader in loaders:
            self._keep_loader(loader)
        self._keep_global_random({device, *(p.device for p in self.params)})

    def set_workers_aside(self) -> None:
        """Have loaders start workers anew, so that persistent ones keep what they have come to."""
        for loader in self._persistent:
            if "_iterator" in vars(loader):
                vars(loader)["_iterator"] = None
            else:
                warnings.warn(
                    f"the workers of the loader {type(loader).__name__} persist, and their state "
                    "cannot be put back: give lr_range_test a loader with persistent_workers=False",
                    UserWarning,
                    stacklevel=callers_level(),
                )

    def restore(self) -> None:
        """Put everything back; may be called again."""
        self._reshard()
        errors: list[Exception] = []

        def attempt(put_back: PutBack) -> None:
            try:
                put_back()
            except Exception as error:  # the rest is put back all the same
                errors.append(error)

        with torch.no_grad():
            for put_back in [*self._extra, *self._put_back]:
                attempt(put_back)
            for param, requires_grad, grad in self._leaves:
                attempt(functools.partial(setattr, param, "grad", grad))
                if param.requires_grad != requires_grad:
                    attempt(functools.partial(param.requires_grad_, requires_grad))
        for module, flag in self._flags:
            if module.training != flag:
                module.training = flag
        if errors:
            reasons = [f"{type(error).__name__}: {error}".partition("\n")[0] for error in errors]
            told = "; ".join(dict.fromkeys(reasons))
            warnings.warn(
                f"the range test could not put back {len(errors)} of {len(self._kept)} objects "
                f"({told}): load a checkpoint before training on",
                RuntimeWarning,
                stacklevel=callers_level(),
            )

    def _reshard(self) -> None:
        """Give FSDP's modules their sharded parameters: a forward without backward leaves others.

        Whole ones are theirs only for a while.
        """
        modules: list[Any] = self._modules
        for module in modules:
            if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):
                module.reshard()

    # ---- what is looked into

    def _keep(self, root: Any, everything: bool = False) -> None:
        """Copy what ``root`` leads to; ``everything``: objects that hold more than data, too."""
        stack = [root]
        while stack:
            value = stack.pop()
            if self._is_done(value):
                continue
            members = members_of(value)
            if members is None:
                if everything or type(value).__module__ == "itertools":
                    self._copy_deeply(value)
            elif everything or issubclass(
                type(value), (Tensor, np.ndarray, nn.Module, Optimizer, *CONTAINERS)
            ):
                self._note(value)
                stack.extend(members)
            else:
                self._keep_data(value)

    def _keep_data(self, root: Any, owners: list[Any] | None = None) -> None:
        """Copy what an object leads to if that is nothing but data, and not large.

        Args:
            root: the object.
            owners: takes the loaders, samplers and datasets; without it, they are not data.
        """
        found: dict[int, Any] = {}
        size = 0
        stack = [root]
        while stack:
            value = stack.pop()
            if id(value) in found or self._is_done(value):
                continue
            if issubclass(type(value), SOURCES) and owners is not None:
                owners.append(value)
                continue
            members = None if id(value) in self._left else members_of(value)
            size += bytes_of(value)
            if (
                members is None
                or size > self._large
                or len(found) > _MANY
                or issubclass(type(value), SOURCES)
            ):
                self._left[id(root)] = root
                if owners is not None and issubclass(type(root), CONTAINERS):
                    self._note(root)  # the order of its members, which loaders shuffle
                return
            found[id(value)] = value
            stack.extend(members)
        for value in found.values():
            self._note(value)

    def _keep_loader(self, loader: Any) -> None:
        if issubclass(type(loader), CONTAINERS):
            self._keep_data(loader, owners=[])  # batches, which a model may change in place
        stack = [loader]
        while stack:
            owner = stack.pop()
            attributes = attributes_of(owner)
            if attributes is None or self._is_done(owner) or id(owner) in self._left:
                continue
            if any(issubclass(type(value), RUNNING) for value in attributes.values()):
                continue
            if attributes.get("persistent_workers") is True:
                self._persistent.append(owner)
            self._note(owner)
            for name, value in attributes.items():
                kind = type(value)
                if name == "_iterator":
                    continue
                if is_plain(kind) or issubclass(kind, SOURCES):
                    stack.append(value)
                elif not issubclass(kind, (nn.Module, Optimizer)):
                    self._keep_data(value, owners=stack)

    def _is_done(self, value: Any) -> bool:
        return is_atom(type(value)) or id(value) in self._kept

    def _copy_deeply(self, value: Any) -> None:
        """Keep a deep copy of what cannot be looked into, if there can be one."""
        self._kept[id(value)] = value
        own = {id(thing): thing for thing in [*self.params, *self._modules]}
        try:
            self._copies[id(value)] = copy.deepcopy(value, own)
        except Exception:  # a lock, a file, a stream, a process group: leave it unchanged
            return

    def _resolve(self, value: Any) -> Any:
        """The object itself; its deep copy where there is one, and it has changed."""
        if not self._copies or id(value) not in self._copies:
            return value
        kept = self._copies[id(value)]
        try:
            return value if (value == kept) is True else kept
        except Exception:
            return kept

    # ---- how it is put back

    def _note(self, value: Any) -> None:
        """Copy what is in a value itself, and remember how to put it back."""
        if self._is_done(value):
            return
        self._kept[id(value)] = value
        try:
            self._put_back += self._ways_back(value)
        except Exception as error:
            if not self._lenient or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            self._left[id(value)] = value

    def _ways_back(self, value: Any) -> list[PutBack]:
        kind = type(value)
        ways: list[PutBack] = []
        if issubclass(kind, Tensor):
            if issubclass(kind, DTensor):
                ways.append(sharded_back(value, self._offload))
            elif not is_traceable_wrapper_subclass(value):
                ways.append(tensor_back(value, self._offload))
        elif issubclass(kind, np.ndarray):
            ways.append(array_back(value))
        elif issubclass(kind, GENERATORS):
            ways.append(generator_back(value))
        elif issubclass(kind, BUFFERS):
            saved = value[:]
            ways.append(lambda: value.__setitem__(slice(None), saved))
        elif issubclass(kind, dict):
            ways.append(self._keep_dict(value))
        elif issubclass(kind, (list, deque, set)):
            ways.append(self._keep_members(value))
        attributes = attributes_of(value)
        if attributes is not None and kind not in CONTAINERS:
            ways.append(self._keep_attributes(value, attributes))
        return ways

    def _keep_dict(self, value: dict[Any, Any]) -> PutBack:
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        saved = list(base.items(value))

        def put_back() -> None:
            now = [(key, self._resolve(item)) for key, item in saved]
            pairs = list(base.items(value))
            if len(pairs) == len(now) and all(
                a is b and x is y for (a, x), (b, y) in zip(pairs, now, strict=True)
            ):
                return
            base.clear(value)
            for key, item in now:
                base.__setitem__(value, key, item)

        return put_back

    def _keep_members(self, value: Any) -> PutBack:
        saved = list(value)
        base: Any = next(kind for kind in (list, deque, set) if isinstance(value, kind))
        add = base.update if base is set else base.extend

        def put_back() -> None:
            now = [self._resolve(item) for item in saved]
            members = list(value)
            if len(members) != len(now) or any(
                a is not b for a, b in zip(members, now, strict=True)
            ):
                base.clear(value)
                add(value, now)

        return put_back

    def _keep_attributes(self, value: Any, attributes: dict[str, Any]) -> PutBack:
        kind, saved, whole = type(value), dict(attributes), not is_wrapper(type(value))
        slots = slots_of(kind)

        def put_back() -> None:
            if type(value) is not kind:
                value.__class__ = kind
            now = {name: self._resolve(item) for name, item in saved.items()}
            own = dict_of(value)
            if id(value) in self._has_extra_state:
                # Objects that are not looked into are as set_extra_state has made them.
                now |= {name: own[name] for name in now if name in own and self._is_left(now[name])}
            inside = [name for name in now if name not in slots]
            if whole and list(own) != inside:
                own.clear()
            for name in inside:
                if name not in own or own[name] is not now[name]:
                    own[name] = now[name]
            for name in slots:
                if name in now:
                    object.__setattr__(value, name, now[name])
                elif hasattr(value, name):
                    object.__delattr__(value, name)

        return put_back

    def _is_left(self, value: Any) -> bool:
        return not self._is_done(value) and members_of(value) != []

    def _keep_extra_state(self, module: nn.Module) -> PutBack | None:
        """What ``get_extra_state`` returns, for state that Python does not see."""
        kind = type(module)
        if (
            kind.get_extra_state is nn.Module.get_extra_state
            or kind.set_extra_state is nn.Module.set_extra_state
        ):
            return None
        try:
            saved = copy.deepcopy(module.get_extra_state())
        except Exception:
            return None

        self._has_extra_state.add(id(module))
        return lambda: module.set_extra_state(copy.deepcopy(saved))

    def _keep_global_random(self, devices: Iterable[torch.device]) -> None:
        def add(put: Callable[..., Any], *state: Any) -> None:
            self._put_back.append(lambda: put(*state))

        add(torch.set_rng_state, torch.get_rng_state())
        add(random.setstate, random.getstate())
        add(np.random.set_state, np.random.get_state())
        for device in devices:
            if device.type in ("cuda", "xpu"):
                module = torch.get_device_module(device)
                add(module.set_rng_state, module.get_rng_state(device), device)
