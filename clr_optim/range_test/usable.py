"""Refuse a curve from which no bounds can be read, and say what to change."""

from __future__ import annotations

from clr_optim.range_test.curve import MIN_POINTS, Curve, Measurements, make_curve

__all__ = ["usable_curve"]


def usable_curve(measured: Measurements) -> Curve:
    """Return the curve of some measurements.

    Raises:
        ValueError: if the curve is short, flat, or only gets worse.
    """
    if len(measured.values) < MIN_POINTS:
        raise ValueError(
            f"the curve has {len(measured.values)} points, and bounds need at least {MIN_POINTS}: "
            f"{_advice_for_few_points(measured)}"
        )
    curve = make_curve(measured)
    # Ask for 1 % of a loss or one point of accuracy, and for more than noise alone can do: the
    # lowest of many points lies deviations below the others, and the first point is twice as noisy.
    least = max(1.0 if curve.is_accuracy else 0.01 * abs(curve.start), 9.0 * curve.smooth_noise)
    if curve.drop > least:
        return curve
    summary = (
        f"{curve.metric} is {curve.format_value(curve.start)} at lr {curve.lrs[0]:.3g}, and "
        f"{curve.format_value(curve.start - curve.drop)} at best (noise ± {curve.noise:.2g} "
        "per value)"
    )
    if curve.diverged or float(curve.smooth[-1]) - curve.start > least:
        which = "start_lr" if _begins_above_0(curve) else "end_lr"
        raise ValueError(
            "the curve gets worse and has not improved before by more than its noise: "
            f"{summary}. Lower {which} by 10 or more, so that the test begins with rates that "
            "train, or take more steps"
        )
    if curve.interrupted:
        raise ValueError(
            f"the curve is flat: {summary}. The test was interrupted at lr {curve.lrs[-1]:.3g}: "
            "let the test run to its end"
        )
    if curve.drop > 0.5 * least and curve.smooth_noise > 0.0:
        raise ValueError(
            f"the curve is flat within its noise: {summary}. Reduce the noise (larger batches, or "
            "accumulate), take more steps, or widen the range (raise end_lr)"
        )
    raise ValueError(
        f"the curve is flat: {summary}. Widen the range (raise end_lr), or take more steps, so "
        "that a change exceeds the noise"
    )


def _advice_for_few_points(measured: Measurements) -> str:
    if measured.diverged:
        which = "start_lr and end_lr" if _begins_above_0(measured) else "end_lr"
        return f"the first rates are too large; divide {which} by 10 or more"
    if measured.interrupted:
        return "the test was interrupted; let the test run longer"
    if measured.metric.startswith("validation"):
        return "raise num_steps or epochs, or validate more often (validate_every)"
    return "raise num_steps or epochs"


def _begins_above_0(measured: Measurements) -> bool:
    return not len(measured.lrs) or measured.lrs[0] > 0.0
