"""Import the function of ``--model MODULE:FUNCTION``, and check what the function returns."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clr_optim.options import OptionError

__all__ = ["UserModel", "load_model"]


@dataclass(frozen=True)
class UserModel:
    """The user's parameters; and model, loss and loader, if the function returns these too."""

    name: str
    params: list[Tensor]
    model: nn.Module | None = None
    loss_fn: Any = None
    loader: Any = None
    optimizer: Optimizer | None = None

    @property
    def summary(self) -> str:
        """The name, the number and dtype of the parameters, and their device."""
        values = sum(param.numel() for param in self.params)
        dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in self.params})
        count = "1 tensor" if len(self.params) == 1 else f"{len(self.params)} tensors"
        where = self.params[0].device
        return f"{self.name}: {count}, {values:,} values, {', '.join(dtypes)}, on {where}"


def load_model(text: str, seed: int, *, training: bool = False) -> UserModel:
    """Call the user's function.

    Args:
        text: ``MODULE:FUNCTION``. The module may lie in the present folder. The function takes no
            arguments. It returns an ``nn.Module``, or an iterable of parameters, or
            ``(model, loss_fn, loader)``, or ``(model, loss_fn, loader, optimizer)``.
        seed: of torch's global generator, for the first weights.
        training: whether loss and loader are needed.

    Raises:
        OptionError: naming what is wrong.
    """
    function = _find(text)
    torch.manual_seed(seed)
    try:
        returned = function()
    except Exception as error:
        traceback.print_exc()
        raise OptionError(f"--model {text}: {type(error).__name__} in the function") from error
    found = _read(text, returned)
    if training and (found.model is None or found.loader is None):
        raise OptionError(
            f"--model {text} must return (model, loss_fn, loader), got {_described(returned)}"
        )
    return found


def _find(text: str) -> Any:
    """Import the function."""
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise OptionError(f"--model must be MODULE:FUNCTION, as in train:make_model, got {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's module imports
        raise OptionError(
            f"--model {text}: there is no module {module_name!r}; give a module in {here}, without "
            ".py, or an installed one"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
        raise OptionError(
            f"--model {text}: {module_name} has no function {name!r}; there are "
            f"{', '.join(known) or 'none'}"
        )
    return function


def _read(text: str, returned: Any) -> UserModel:
    """Tell the forms of the returned value apart."""
    if isinstance(returned, nn.Module):
        return UserModel(text, _trained(text, returned.parameters()), returned)
    if isinstance(returned, (tuple, list)) and returned and isinstance(returned[0], nn.Module):
        if len(returned) not in (3, 4):
            raise OptionError(
                f"--model {text} must return (model, loss_fn, loader) and perhaps an optimizer, "
                f"got {_described(returned)}"
            )
        model, loss_fn, loader, *rest = returned
        optimizer = rest[0] if rest else None
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise OptionError(
                f"--model {text}: the fourth item must be a torch.optim.Optimizer, got "
                f"{type(optimizer).__name__}"
            )
        params = _trained(text, model.parameters())
        return UserModel(text, params, model, loss_fn, loader, optimizer)
    if isinstance(returned, Iterable) and not isinstance(returned, Tensor):
        return UserModel(text, _trained(text, returned))
    raise OptionError(
        f"--model {text} must return a torch.nn.Module, an iterable of parameters, or (model, "
        f"loss_fn, loader), got {_described(returned)}"
    )


def _trained(text: str, params: Iterable[Any]) -> list[Tensor]:
    """Return the parameters that an optimizer would train."""
    listed = list(params)
    for param in listed:
        if not isinstance(param, Tensor):
            raise OptionError(
                f"--model {text} must return parameters as tensors, got {_described(listed)}"
            )
    trained = [param for param in listed if param.requires_grad]
    if not trained:
        raise OptionError(f"--model {text}: there is no parameter with requires_grad")
    if len({param.device for param in trained}) > 1:
        raise OptionError(f"--model {text}: the parameters must be on one device")
    return trained


def _described(returned: Any) -> str:
    if isinstance(returned, (tuple, list)):
        return f"({', '.join(type(item).__name__ for item in returned[:4])})"
    return type(returned).__name__
