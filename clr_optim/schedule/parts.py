"""Parts that several policies share."""

from __future__ import annotations

from typing import Any

from clr_optim.checks import check_choice, check_int, check_number
from clr_optim.schedule.phase import TOP, Phase
from clr_optim.schedule.schedule import Schedule

#: The shapes of a decay, and the windows that draw them.
SHAPES = {"linear": "triangle", "cosine": "hann", "sqrt": "sqrt", "exp": "triangle"}


def check_gamma(gamma: object) -> float:
    """Return a factor per step, in (0, 1]."""
    return check_number("gamma", gamma, open_minimum=True, maximum=1.0)


def both_bounds(name: str, lr: float | None) -> dict[str, Any]:
    """Return both bounds of a phase of one rate; None leaves them to the groups."""
    lr = None if lr is None else check_number(name, lr)
    return {"base_lr": lr, "max_lr": lr}


def stable_decay(
    stable: int, decay: int, shape: str, end: float, max_lr: float | None, **settings: Any
) -> Phase:
    """Return a phase that stays at ``max_lr`` and falls to ``end · max_lr``.

    Args:
        stable, decay: the steps of the two parts.
        shape: a key of :data:`SHAPES`.
        end: the last rate divided by ``max_lr``.
        max_lr: the peak; ``None`` is each group's ``max_lr``.
        **settings: further settings of the phase.
    """
    check_choice("shape", shape, tuple(SHAPES))
    is_exponential = shape == "exp"
    end = check_number("end", end, maximum=1.0)
    if is_exponential and end == 0.0:
        raise ValueError(
            "end=0.0 with shape='exp': an exponential fall never reaches 0; give an end above 0, "
            "for example end=0.01"
        )
    return Phase(
        step_size_up=0,
        step_size_top=check_int("stable", stable, minimum=0),
        step_size_down=check_int("decay", decay, minimum=1),
        window=SHAPES[shape],
        lower=TOP if is_exponential else (0.0, end),
        base_drop=end if is_exponential else 1.0,
        **both_bounds("max_lr", max_lr),
        **settings,
    )


def warmed_up(schedule: Schedule, warmup: int) -> Schedule:
    """Return a schedule after a warm-up of so many steps, which may be 0."""
    warmup = check_int("warmup", warmup, minimum=0)
    return schedule.with_warmup(warmup) if warmup else schedule
