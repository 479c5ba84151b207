"""Every optimizer of the package ``pytorch_optimizer`` resumes wrapped as it does unwrapped."""

from __future__ import annotations

import inspect
import random
import warnings
from typing import Any

import pytest
import torch
from framework_helpers import imported
from resume_helpers import assert_resumes_as_unwrapped, resumes
from torch import Tensor, nn

package = imported("pytorch_optimizer")
SGD = torch.optim.SGD

CLASSES = {
    name: cls
    for name, cls in sorted(vars(package).items())
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name == cls.__name__
}

#: Classes that cannot run here, and why.
LEFT_OUT = {
    "A2Grad": "has no lr to cycle",
    "AliG": "has no lr to cycle",
    "SafeFP16Optimizer": "has no param_groups",
    "DeMo": "needs the package einops and a process group",
    "DistributedMuon": "needs a process group",
    "LOMO": "steps in hooks of the backward pass, and has no step()",
    "AdaLOMO": "steps in hooks of the backward pass, and has no step()",
    "PCGrad": "has pc_backward in place of a closure or gradients",
    "GSAM": "needs another scheduler and set_closure",
}


class Tiny:
    """A model whose loss depends on the number of the step only."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def loss(self, k: int) -> Tensor:
        features = torch.randn(6, 4, generator=torch.Generator().manual_seed(k))
        loss: Tensor = (self.model(features) - features.flip(1)).square().mean()
        return loss


def groups(problem: Tiny, **keys: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Return a group of matrices and one of vectors, with first and second value of each key."""
    parts = [[p for p in problem.params() if p.dim() == d] for d in (2, 1)]
    return [
        {"params": part, **{key: values[i] for key, values in keys.items()}}
        for i, part in enumerate(parts)
    ]


def matrices(problem: Tiny) -> list[Tensor]:
    return [p for p in problem.params() if p.dim() == 2]


def muon(name: str) -> Any:
    return lambda problem: CLASSES[name](groups(problem, use_muon=(True, False)), lr=0.01)


def around(name: str, **options: Any) -> Any:
    """Return an optimizer of a class that takes another optimizer."""
    return lambda problem: CLASSES[name](SGD(problem.params(), lr=0.01, momentum=0.9), **options)


def sharpness_aware(name: str, **options: Any) -> Any:
    """Return an optimizer of a class that takes another optimizer's class."""
    return lambda problem: CLASSES[name](
        problem.params(), base_optimizer=SGD, lr=0.01, momentum=0.9, **options
    )


#: Arguments other than ``(params, lr=0.01)``.
MAKE = {
    **{name: muon(name) for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")},
    **{
        name: around(name)
        for name in (
            "Lookahead", "Magma", "OrthoGrad", "ScheduleFreeWrapper", "TRAC",
        )
    },
    **{name: sharpness_aware(name) for name in ("FriendlySAM", "LookSAM", "SAM")},
    "AdamMini": lambda problem: CLASSES["AdamMini"](problem.model, lr=0.01),
    "BSAM": lambda problem: CLASSES["BSAM"](
        problem.params(), num_data=6, lr=0.01, foreach=False  # with it the package's own step fails
    ),
    "LoRARite": lambda problem: CLASSES["LoRARite"](matrices(problem), lr=0.01),
    "Ranger21": lambda problem: CLASSES["Ranger21"](problem.params(), num_iterations=40, lr=0.01),
    "SpectralSphere": lambda problem: CLASSES["SpectralSphere"](matrices(problem), lr=0.01),
    "WSAM": lambda problem: CLASSES["WSAM"](
        problem.model, problem.params(), base_optimizer=SGD, lr=0.01
    ),
}  # fmt: skip

#: Classes whose step evaluates the model, and classes whose step differentiates the gradients.
WITH_CLOSURE = {"BSAM", "FriendlySAM", "LBFGS", "LookSAM", "SAM", "WSAM"}
SECOND_ORDER = {"AdaHessian", "SophiaH"}

#: Classes that do not resume to the bit even when plain.
NOT_EXACT: set[str] = set()


def make(name: str) -> Any:
    def default(problem: Tiny) -> torch.optim.Optimizer:
        cls = CLASSES[name]
        takes_lr = "lr" in inspect.signature(cls).parameters
        made: torch.optim.Optimizer = cls(problem.params(), **({"lr": 0.01} if takes_lr else {}))
        return made

    return MAKE.get(name, default)


def step(name: str) -> Any:
    def take(problem: Tiny, opt: Any, k: int) -> None:
        torch.manual_seed(k)  # some draw random numbers in their steps
        random.seed(k)

        def closure() -> Tensor:
            opt.zero_grad()
            loss = problem.loss(k)
            loss.backward(create_graph=name in SECOND_ORDER)
            return loss

        if k == 0 and "ScheduleFree" in name:
            opt.train()
        closure()
        if name in WITH_CLOSURE:
            opt.step(closure)
        else:
            opt.step()
        for p in problem.params():
            p.grad = None

    return take


@pytest.mark.parametrize("own", [False, True], ids=["", "own"])
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in LEFT_OUT])
def test_save_and_load(name, own):
    arguments = make(name), Tiny, step(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not own:
            assert resumes(*arguments, wrapped=False, own=False, tensors=Tiny.params) is (
                name not in NOT_EXACT
            )
        assert_resumes_as_unwrapped(*arguments, own=own, tensors=Tiny.params)


def test_no_class_is_left_out_without_a_reason():
    assert set(LEFT_OUT) | set(MAKE) | WITH_CLOSURE | SECOND_ORDER | NOT_EXACT <= set(CLASSES)
    assert len(CLASSES) > 100
