"""Average the runs of each row, and compare rows with each other and with the paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clr_optim.bench.paper.known import KNOWN
from clr_optim.bench.paper.resnet import DATASETS
from clr_optim.bench.paper.rows import FIXED, Row

__all__ = ["standard_error", "summarize", "verdict"]


#: the test images behind the paper's accuracies
_PUBLISHED_IMAGES = 10_000


def summarize(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds, for all rows of every table that has results.

    Results of CIFAR-10 or CIFAR-100 bring the rows of both parts of Table 4.

    Returns:
        Dictionaries with ``"row"``, ``"table"``, ``"published"`` and ``"published_iterations"``. If
        the row was run: also ``"accuracy"`` (mean, percent), ``"spread"`` (standard deviation of a
        sample, None for one seed), ``"iterations"``, ``"cycles"``, ``"seeds"``, ``"training_s"``
        (mean), ``"curve"`` (means), ``"test_images"``, ``"at_chance"`` (whether guesses would be
        as accurate), ``"comparisons"`` (with other rows) and ``"relation"`` (a sentence on the
        comparisons).
    """
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_row.setdefault(result["row"], []).append(result)
    tables = {KNOWN[name].table for name in by_row}
    if tables & DATASETS.keys():
        tables |= DATASETS.keys()
    rows: dict[str, dict[str, Any]] = {}
    for row in KNOWN.values():
        if row.table not in tables:
            continue
        rows[row.name] = {
            "row": row.name,
            "table": row.table,
            "published": row.published,
            "published_iterations": row.iterations,
        }
        if row.name in by_row:
            runs = by_row[row.name]
            finals = [run["accuracy"] for run in runs]
            curves = [dict(map(tuple, run["curve"])) for run in runs]
            rows[row.name].update(
                accuracy=statistics.fmean(finals),
                spread=statistics.stdev(finals) if len(finals) > 1 else None,
                iterations=runs[0]["iterations"],
                cycles=runs[0]["cycles"],
                seeds=len(runs),
                test_images=runs[0]["test_images"],
                training_s=statistics.fmean(run["training_s"] for run in runs),
                finite=all(run["finite"] for run in runs),
                # A resumed run may have points at other iterations: keep those that all runs have.
                curve=[
                    (iteration, statistics.fmean(curve[iteration] for curve in curves))
                    for iteration in curves[0]
                    if all(iteration in curve for curve in curves)
                ],
            )
            summary = rows[row.name]
            above_guesses = summary["accuracy"] - 100 / DATASETS.get(row.table, 10)
            summary["at_chance"] = above_guesses <= 2 * standard_error(summary)
    for name, summary in rows.items():
        if "accuracy" in summary:
            summary["comparisons"] = _comparisons(KNOWN[name], rows)
            summary["relation"] = _relation(KNOWN[name], rows)
    return list(rows.values())


def _comparisons(row: Row, rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare a row with each of its references, here and in the paper.

    Returns:
        Dictionaries with ``"with"`` (the reference's name), ``"difference"`` (points of accuracy),
        ``"same"`` (accuracies count as the same up to so many points: two standard errors of the
        difference, see :func:`standard_error`) and ``"found"`` (the verdict). If the paper has both
        rows, and the reference is above chance here, also ``"expected"`` (the paper's verdict),
        ``"published_difference"`` and ``"holds"``: True, False, ``"in direction"`` if the
        difference has the paper's sign and another size, or ``"and more"`` if the paper has the
        same accuracy in fewer iterations, and the accuracy here is higher. A gain here is one in
        the paper's direction even if the paper's gain is within the error of its test images: the
        paper claims gains. A loss is none even if the paper has a small loss, within that error.
    """
    here = rows[row.name]
    comparisons = []
    for name in row.references:
        there, other = rows.get(name, {}), KNOWN[name]
        if "accuracy" not in there:
            continue
        same = 2 * math.hypot(standard_error(here), standard_error(there))
        difference = here["accuracy"] - there["accuracy"]
        comparison = {
            "with": name,
            "difference": difference,
            "same": same,
            "found": verdict(difference, same),
        }
        # The paper has one "fixed" row, so it says nothing about our two fixed rows.
        if (
            row.name not in FIXED
            and row.published is not None
            and other.published is not None
            and not there["at_chance"]
        ):
            published = round(row.published - other.published, 1)
            expected = verdict(published, 2 * math.hypot(*map(_published_error, (row, other))))
            is_gain = published > 0 and difference > same
            holds: bool | str = expected == comparison["found"] or is_gain
            if holds and abs(difference) > same < abs(difference - published):
                holds = "in direction"
            promised = expected == _AS_ACCURATE and here["iterations"] < there["iterations"]
            if promised and difference > same:
                holds = "and more"
            comparison.update(expected=expected, published_difference=published, holds=holds)
        comparisons.append(comparison)
    return comparisons


def _relation(row: Row, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence: does the paper's relation between a row and its references hold here?"""
    here = rows[row.name]
    text = f"`{row.name}`: {here['accuracy']:.2f} % after {here['iterations']:,} iterations"
    if here["cycles"] % 1:
        text += f", in the middle of cycle {math.ceil(here['cycles'])}"
    if not here["finite"]:
        text += ", its weights no longer finite"
    if here["at_chance"]:
        text += ", no better than chance"
    if not row.references:
        return text + "; the others are compared with it."
    clauses = []
    for comparison in here["comparisons"]:
        name, found = comparison["with"], comparison["found"]
        there, other = rows[name], KNOWN[name]
        clause = (
            f"{found} `{name}` ({there['accuracy']:.2f} %, {comparison['difference']:+.2f}, "
            f"within {comparison['same']:.2f} being the same)"
        )
        if here["iterations"] != there["iterations"]:
            clause += f" in {here['iterations'] / there['iterations']:.0%} of its iterations"
        if "holds" in comparison:
            figures = f"({row.published} against {other.published} %)"
            if not comparison["holds"]:
                clause += f", which in the paper is {comparison['expected']} it {figures}: its "
                clause += "relation does not hold here"
            elif comparison["holds"] is True:
                clause += f", as in the paper {figures}: its relation holds here"
            elif comparison["holds"] == "and more":
                clause += f", which in the paper is {comparison['expected']} it {figures}: its "
                clause += "relation holds here, and more"
            else:
                clause += f", as in the paper {figures}, but by another amount: its relation holds "
                clause += "here in direction only"
        elif there["at_chance"]:
            clause += ", which is no better than chance: nothing to compare with"
        elif name.startswith("window"):
            equivalent = found == _AS_ACCURATE
            clause += f": the windows are {'' if equivalent else 'not '}equivalent here"
        clauses.append(clause)
    if not clauses:
        clauses = [
            f"{' or '.join(f'`{name}`' for name in row.references)} to compare it with: not run"
        ]
    return f"{text}; {'; '.join(clauses)}."


def standard_error(summary: Mapping[str, Any]) -> float:
    """Return the standard error of an accuracy in points: of its test images and its seeds."""
    by_images = _error_of_images(summary["accuracy"], summary["test_images"])
    return math.hypot(by_images, (summary["spread"] or 0.0) / math.sqrt(summary["seeds"]))


def _published_error(row: Row) -> float:
    """Return the standard error of a published accuracy: of its test images."""
    return _error_of_images(row.published or 0.0, _PUBLISHED_IMAGES)


def _error_of_images(accuracy: float, images: int) -> float:
    share = accuracy / 100
    return 100 * math.sqrt(share * (1 - share) / images)


_AS_ACCURATE = "as accurate as"


def verdict(difference: float, same: float) -> str:
    """Put a difference of two accuracies into words."""
    if abs(difference) <= same:
        return _AS_ACCURATE
    return "more accurate than" if difference > 0 else "less accurate than"
