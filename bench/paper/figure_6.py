"""The rows of the paper's Figure 6, as data: constant rates, a decaying rate and cycles.

The paper's figure compares a constant rate with cycles, and does not name their bounds. The bounds
here are 0.001, the rate of Caffe's solver, and ten times that rate, or come from a range test. The
constant rates cover the same range. The decaying rate is no row of the paper: it falls over the
whole run, and shows what the low end of a cycle gives by itself.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
Figure 6; Caffe's ``cifar10_full_sigmoid_solver_bn.prototxt``.
"""

from __future__ import annotations

from collections.abc import Callable

from clr_optim.bench.paper.networks import SIGMOID
from clr_optim.bench.paper.rows import Row, Scale
from clr_optim.schedule import Schedule, fixed, triangular

__all__ = ["CONSTANT", "CYCLED", "DECAYING", "FIGURE", "FIGURE_6", "PAPERS_CONSTANT"]

#: the table of all rows of this figure
FIGURE = "figure 6"
#: iterations of Caffe's solver
_LENGTH = 60_000
#: accuracies of the paper in percent, at the constant rate 0.001 and with cycles
_PUBLISHED_CONSTANT, _PUBLISHED_CYCLED = 60.8, 72.2
_RATES = (0.001, 0.0032, 0.005, 0.01)


def _row(
    name: str,
    bounds: tuple[float, float] | None,
    schedule: Callable[[Scale], Schedule],
    published: float | None = None,
    references: tuple[str, ...] = (),
) -> Row:
    return Row(
        FIGURE,
        name,
        "sgd",
        bounds,
        _LENGTH,
        schedule,
        published,
        references,
        SIGMOID,
        quarters=True,
        evaluations=24,
    )


def _triangles(count: int) -> Callable[[Scale], Schedule]:
    """Return a schedule of so many whole cycles in a run."""
    return lambda scale: triangular(scale.steps(_LENGTH // (2 * count)))


PAPERS_CONSTANT = "constant-0.001"
CONSTANT = tuple(f"constant-{rate:g}" for rate in _RATES)
DECAYING = "linear-decay"
#: The last row is one triangle over the whole run. It is not ``one_cycle``, which ends lower.
CYCLED = ("triangular", "triangular-found", "one-triangle")

FIGURE_6: dict[str, Row] = {
    row.name: row
    for row in [
        *(
            _row(
                name,
                (rate, rate),
                lambda scale: fixed(),
                _PUBLISHED_CONSTANT if name == PAPERS_CONSTANT else None,
            )
            for name, rate in zip(CONSTANT, _RATES, strict=True)
        ),
        _row(
            DECAYING,
            (0.0005, 0.01),
            lambda scale: triangular(step_size_up=0, step_size_down=scale.steps(_LENGTH)),
            None,
            CONSTANT,
        ),
        _row("triangular", (0.001, 0.01), _triangles(4), _PUBLISHED_CYCLED, CONSTANT),
        _row("triangular-found", None, _triangles(4), _PUBLISHED_CYCLED, CONSTANT),
        _row("one-triangle", (0.0005, 0.01), _triangles(1), _PUBLISHED_CYCLED, CONSTANT),
    ]
}
