"""The arithmetic of the update rules on a GPU: two functions per rule, the counterparts of rules.h.

``<rule>_constants`` turns a group's float64 scalars into up to eight constants, once per program.
``<rule>`` updates a block with these constants in the arithmetic type. The order of operations is
that of torch's for-loop step, with a fused multiply-add wherever torch's operator has one. Triton
compiles these functions, so their arguments have no Python types:

- ``own`` points to the scalars of :attr:`clr_optim.rules.UpdateRule.scalars`.
- ``momentum`` is the schedule's momentum, used if ``cycles`` holds.
- ``step`` is the number of this step, counted from 1.
- ``first`` tells that the state is not filled yet.
- ``scalar`` is the scalar state before this step, if the rule has one.
- ``s0`` to ``s2`` are the state tensors, in the order of the slots in rules.py.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = ["advanced", "constants", "factor", "held", "update"]

# Triton would compute the logarithm of a number, other than that of a tensor, in float32.
_LOG2_096: tl.constexpr = tl.constexpr(math.log2(0.96))


@triton.jit
def _root(x):
    # Triton's plain float32 root and quotient are approximations.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _divide(a, b):
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _lerp(start, end, weight):
    # As torch.lerp, start from the end that is nearer to the result: both ends are then exact.
    near = tl.abs(weight) < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def held(x, A: tl.constexpr):
    """Return a float64 that the arithmetic type can hold; NaN stays NaN.

    A rate beyond the type's largest number would be infinite, and infinity times 0 is NaN.
    """
    if tl.float64 == A:
        largest = 1.7976931348623157e308
    else:
        largest = 3.4028234663852886e38
    return tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))


@triton.jit
def _power(base, exponent):
    # If the base is 0, its logarithm is minus infinity and the result 0, as it should be.
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def sgd_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    m = tl.where(cycles, momentum, tl.load(own))
    lr = held(-rate, A)
    return lr, held(m, A), 1.0 - tl.load(own + 1), tl.load(own + 2), lr, lr, lr, lr


@triton.jit
def sgd(p, g, s0, first, lr, momentum, keep, nesterov, MOMENTUM: tl.constexpr):
    if MOMENTUM:
        # The first gradient goes in whole, without dampening. Memory that nothing has written may
        # hold a signaling NaN, so the buffer is not read before it is filled.
        s0 = tl.where(first, 0.0, s0)
        s0 = tl.where(first, g, tl.fma(g, keep, s0 * momentum))
        g = tl.where(nesterov != 0, tl.fma(s0, momentum, g), s0)
    return tl.fma(lr, g, p), s0


@triton.jit
def adam_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    beta2 = tl.load(own + 1)
    correction2 = tl.sqrt(1.0 - _power(beta2, step))
    step_size = held(-(rate / (1.0 - _power(beta1, step))), A)
    return (
        held(1.0 - beta1, A),
        beta2,
        1.0 - beta2,
        correction2,
        tl.load(own + 2),
        step_size,
        step_size,
        step_size,
    )


@triton.jit
def adam(
    p,
    g,
    s0,
    s1,
    s2,
    weight,
    beta2,
    rest2,
    correction2,
    eps,
    step_size,
    AMSGRAD: tl.constexpr,
):
    s0 = _lerp(s0, g, weight)
    s1 = tl.fma(rest2 * g, g, s1 * beta2)
    second = s1
    if AMSGRAD:  # NaN wins, as in torch.maximum
        s2 = tl.where((s2 > s1) | (s2 != s2), s2, s1)
        second = s2
    spread = _divide(_root(second), correction2) + eps
    return p + _divide(step_size * s0, spread), s0, s1, s2


@triton.jit
def adagrad_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    lr = held(-(rate / (1.0 + (step - 1.0) * tl.load(own))), A)
    return lr, tl.load(own + 1), lr, lr, lr, lr, lr, lr


@triton.jit
def adagrad(p, g, s0, lr, eps):
    s0 = tl.fma(g, g, s0)
    return p + _divide(lr * g, _root(s0) + eps), s0


@triton.jit
def adadelta_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    rho = tl.load(own)
    lr = held(-rate, A)
    return lr, rho, 1.0 - rho, tl.load(own + 1), lr, lr, lr, lr


@triton.jit
def adadelta(p, g, s0, s1, lr, rho, rest, eps):
    s0 = tl.fma(rest * g, g, s0 * rho)
    delta = _divide(_root(s1 + eps), _root(s0 + eps)) * g
    s1 = tl.fma(rest * delta, delta, s1 * rho)
    return tl.fma(lr, delta, p), s0, s1


@triton.jit
def rmsprop_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    alpha = tl.load(own)
    m = tl.where(cycles, momentum, tl.load(own + 2))
    lr = held(-rate, A)
    return lr, alpha, 1.0 - alpha, tl.load(own + 1), held(m, A), lr, lr, lr


@triton.jit
def rmsprop(
    p,
    g,
    s0,
    s1,
    s2,
    lr,
    alpha,
    rest,
    eps,
    momentum,
    MOMENTUM: tl.constexpr,
    CENTERED: tl.constexpr,
):
    s0 = tl.fma(rest * g, g, s0 * alpha)
    spread = s0
    # Round once, as torch's addcmul does: a square that is rounded alone may overflow, and
    # inf - inf is NaN.
    if CENTERED:
        if MOMENTUM:
            s2 = _lerp(s2, g, rest)
            spread = tl.fma(-s2, s2, spread)
        else:
            s1 = _lerp(s1, g, rest)
            spread = tl.fma(-s1, s1, spread)
    spread = _root(spread) + eps
    if MOMENTUM:
        s1 = s1 * momentum + _divide(g, spread)
        p = tl.fma(lr, s1, p)
    else:
        p = p + _divide(lr * g, spread)
    return p, s0, s1, s2


@triton.jit
def adamax_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    lr = held(-(rate / (1.0 - _power(beta1, step))), A)
    return held(1.0 - beta1, A), tl.load(own + 1), tl.load(own + 2), lr, lr, lr, lr, lr


@triton.jit
def adamax(p, g, s0, s1, weight, beta2, eps, step_size):
    s0 = _lerp(s0, g, weight)
    before = s1 * beta2
    now = tl.abs(g) + eps
    s1 = tl.where((before > now) | (before != before), before, now)  # NaN wins
    return p + _divide(step_size * s0, s1), s0, s1


@triton.jit
def radam_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    beta2 = tl.load(own + 1)
    power = _power(beta2, step)
    longest = 2.0 / (1.0 - beta2) - 1.0
    rho = longest - 2.0 * step * power / (1.0 - power)
    square = (rho - 4.0) * (rho - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * rho)
    # Until enough steps have been averaged, 0 tells that the second moment does not serve.
    rectification = tl.where(rho > 5.0, tl.sqrt(tl.where(rho > 5.0, square, 1.0)), 0.0)
    return (
        held(1.0 - beta1, A),
        beta2,
        1.0 - beta2,
        1.0 - _power(beta1, step),
        held(rate, A),
        tl.sqrt(1.0 - power),
        tl.load(own + 2),
        rectification,
    )


@triton.jit
def radam(
    p,
    g,
    s0,
    s1,
    weight,
    beta2,
    rest2,
    correction1,
    lr,
    correction2,
    eps,
    rectification,
):
    s0 = _lerp(s0, g, weight)
    s1 = tl.fma(rest2 * g, g, s1 * beta2)
    change = _divide(s0, correction1) * lr
    rate = _divide(1.0, _root(s1) + eps) * correction2
    return p - tl.where(rectification > 0.0, change * rate * rectification, change), s0, s1


@triton.jit
def lion_constants(own, rate, step, momentum, cycles, A: tl.constexpr):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    beta2 = tl.load(own + 1)
    lr = held(-rate, A)
    return lr, held(beta1, A), held(1.0 - beta1, A), beta2, 1.0 - beta2, lr, lr, lr


@triton.jit
def lion(p, g, s0, lr, beta1, rest1, beta2, rest2):
    mean = tl.fma(g, rest1, s0 * beta1)
    s0 = tl.fma(g, rest2, s0 * beta2)
    # The sign of NaN is 0, as in torch.
    sign = tl.where(mean > 0.0, 1.0, tl.where(mean < 0.0, -1.0, 0.0)).to(p.dtype)
    return tl.fma(lr, sign, p), s0


@triton.jit
def nadam_factor(own, step, momentum, cycles):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    return beta1 * (1.0 - 0.5 * tl.exp2(step * tl.load(own + 3) * _LOG2_096))


@triton.jit
def nadam_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    beta2 = tl.load(own + 1)
    now = nadam_factor(own, step, momentum, cycles)
    after = nadam_factor(own, step + 1.0, momentum, cycles)
    product = advanced(scalar, now).to(tl.float64)
    return (
        held(1.0 - beta1, A),
        beta2,
        1.0 - beta2,
        1.0 - _power(beta2, step),
        tl.load(own + 2),
        held(-rate * (1.0 - now) / (1.0 - product), A),
        held(-rate * after / (1.0 - product * after), A),
        beta2,
    )


@triton.jit
def nadam(p, g, s0, s1, weight, beta2, rest2, correction2, eps, of_gradient, of_mean):
    s0 = _lerp(s0, g, weight)
    s1 = tl.fma(rest2 * g, g, s1 * beta2)
    spread = _root(_divide(s1, correction2)) + eps
    p = p + _divide(of_gradient * g, spread)
    return p + _divide(of_mean * s0, spread), s0, s1


@triton.jit
def advanced(scalar, factor):
    """Return the scalar state after a step, in the dtype of the state."""
    return scalar * factor.to(scalar.dtype)


@triton.jit
def factor(own, step, momentum, cycles, KERNEL: tl.constexpr):
    """Return by what a step of the kernel multiplies the scalar state, float64."""
    tl.static_assert(KERNEL == "nadam")
    return nadam_factor(own, step, momentum, cycles)


@triton.jit
def constants(
    own, rate, step, scalar, momentum, cycles, KERNEL: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """Return eight float64 constants of a kernel, by its name in :data:`clr_optim.rules.KERNELS`.

    Constants that depend on the rate lie within the range of the arithmetic type ``A``.
    """
    if KERNEL == "sgd" or KERNEL == "sgd_momentum":
        return sgd_constants(own, rate, step, momentum, cycles, A)
    elif KERNEL == "adam" or KERNEL == "adam_amsgrad":
        return adam_constants(own, rate, step, momentum, cycles, A)
    elif KERNEL == "adagrad":
        return adagrad_constants(own, rate, step, momentum, cycles, A)
    elif KERNEL == "adadelta":
        return adadelta_constants(own, rate, step, momentum, cycles, A)
    elif KERNEL == "adamax":
        return adamax_constants(own, rate, step, momentum, cycles, A)
    elif KERNEL == "radam":
        return radam_constants(own, rate, step, momentum, cycles, A)
    elif KERNEL == "lion":
        return lion_constants(own, rate, step, momentum, cycles, A)
    elif KERNEL == "nadam":
        return nadam_constants(own, rate, step, scalar, momentum, cycles, A)
    else:
        return rmsprop_constants(own, rate, step, momentum, cycles, A)


@triton.jit
def update(p, g, s0, s1, s2, first, c0, c1, c2, c3, c4, c5, c6, c7, KERNEL: tl.constexpr):
    """Return the new ``(p, s0, s1, s2)`` of a block."""
    if KERNEL == "sgd":
        p, s0 = sgd(p, g, s0, first, c0, c1, c2, c3, False)
    elif KERNEL == "sgd_momentum":
        p, s0 = sgd(p, g, s0, first, c0, c1, c2, c3, True)
    elif KERNEL == "adam":
        p, s0, s1, s2 = adam(p, g, s0, s1, s2, c0, c1, c2, c3, c4, c5, False)
    elif KERNEL == "adam_amsgrad":
        p, s0, s1, s2 = adam(p, g, s0, s1, s2, c0, c1, c2, c3, c4, c5, True)
    elif KERNEL == "adagrad":
        p, s0 = adagrad(p, g, s0, c0, c1)
    elif KERNEL == "adadelta":
        p, s0, s1 = adadelta(p, g, s0, s1, c0, c1, c2, c3)
    elif KERNEL == "adamax":
        p, s0, s1 = adamax(p, g, s0, s1, c0, c1, c2, c3)
    elif KERNEL == "radam":
        p, s0, s1 = radam(p, g, s0, s1, c0, c1, c2, c3, c4, c5, c6, c7)
    elif KERNEL == "lion":
        p, s0 = lion(p, g, s0, c0, c1, c2, c3, c4)
    elif KERNEL == "nadam":
        p, s0, s1 = nadam(p, g, s0, s1, c0, c1, c2, c3, c4, c5, c6)
    elif KERNEL == "rmsprop":
        p, s0, s1, s2 = rmsprop(p, g, s0, s1, s2, c0, c1, c2, c3, c4, False, False)
    elif KERNEL == "rmsprop_momentum":
        p, s0, s1, s2 = rmsprop(p, g, s0, s1, s2, c0, c1, c2, c3, c4, True, False)
    elif KERNEL == "rmsprop_centered":
        p, s0, s1, s2 = rmsprop(p, g, s0, s1, s2, c0, c1, c2, c3, c4, False, True)
    else:
        p, s0, s1, s2 = rmsprop(p, g, s0, s1, s2, c0, c1, c2, c3, c4, True, True)
    return p, s0, s1, s2
