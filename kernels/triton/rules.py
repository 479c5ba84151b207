"""The arithmetic of the update rules on a GPU: two functions per rule, as the classes of rules.h.

``<rule>_constants`` turns a group's float64 scalars into constants, once per tensor and step, for
one tensor or a vector of them. ``<rule>`` updates a block with these constants in the arithmetic
type. A rule with a scalar state has a third function, ``<rule>_factor``: by what a step multiplies
that state. ``KERNELS`` at the end names the functions of each kernel. The order of operations is
that of torch's for-loop step, with a fused multiply-add wherever torch's operator has one. Triton
compiles these functions, so their arguments have no Python types:

- ``own`` points to the scalars of :attr:`clr_optim.rules.UpdateRule.scalars`.
- ``momentum`` is the schedule's momentum, used if ``cycles`` holds.
- ``step`` is the number of this step, counted from 1; any number if the rule counts no steps.
- ``scalar`` is the scalar state before this step (in rules.h: after it); any number if the rule has
  none.
- ``A`` is the arithmetic type. Constants of rate or momentum go through :func:`held`.
- ``p`` and ``g`` are the parameter and its gradient. Weight decay is done, of either kind.
- ``s`` is a tuple of the state tensors, in the order of the slots in rules.py.
- ``first`` tells that the state is not filled yet.
- ``c`` is the tuple of constants.
- ``FLAGS`` are the flags of the kernel, a tuple of bool.
- ``EXACT`` rounds roots and quotients as IEEE does. Without it their relative error is at most
  2⁻²², which the rounding to a 16-bit dtype hides.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["KERNELS", "Kernel", "advanced", "held", "lerp"]

# Triton would compute the logarithm of a number, other than that of a tensor, in float32.
_LOG2_096: tl.constexpr = tl.constexpr(math.log2(0.96))


@triton.jit
def _root(x, EXACT: tl.constexpr):
    # Triton's plain float32 root and quotient are approximations.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    elif EXACT:
        return tl.sqrt_rn(x)
    else:
        # The approximation takes numbers below 2⁻¹²⁶ for 0.
        small = x < 7.888609052210118e-31
        root = tl.sqrt(tl.where(small, x * 1.8446744073709552e19, x))
        return tl.where(small, root * 2.3283064365386963e-10, root)


@triton.jit
def _divide(a, b, EXACT: tl.constexpr):
    if EXACT and b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def lerp(start, end, weight):
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
def sgd_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
    m = tl.where(cycles, momentum, tl.load(own))
    lr = held(-rate, A)
    return lr, held(m, A), 1.0 - tl.load(own + 1), tl.load(own + 2)


@triton.jit
def sgd(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    lr, momentum, keep, nesterov = c
    MOMENTUM: tl.constexpr = FLAGS[0]
    if MOMENTUM:
        # The first gradient goes in whole, without dampening. Memory that nothing has written may
        # hold a signaling NaN, so no arithmetic takes it.
        buffer = tl.where(first, 0.0, s[0])
        buffer = tl.where(first, g, tl.fma(g, keep, buffer * momentum))
        g = tl.where(nesterov != 0, tl.fma(buffer, momentum, g), buffer)
        s = (buffer,)
    return tl.fma(lr, g, p), s


@triton.jit
def adam_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
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
    )


@triton.jit
def adam(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    weight, beta2, rest2, correction2, eps, step_size = c
    AMSGRAD: tl.constexpr = FLAGS[0]
    m = lerp(s[0], g, weight)
    v = tl.fma(rest2 * g, g, s[1] * beta2)
    if AMSGRAD:  # NaN wins, as in torch.maximum
        second = tl.where((s[2] > v) | (s[2] != s[2]), s[2], v)
        s = (m, v, second)
    else:
        second = v
        s = (m, v)
    spread = _divide(_root(second, EXACT), correction2, EXACT) + eps
    return p + _divide(step_size * m, spread, EXACT), s


@triton.jit
def adagrad_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
    lr = held(-(rate / (1.0 + (step - 1.0) * tl.load(own))), A)
    return lr, tl.load(own + 1)


@triton.jit
def adagrad(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    lr, eps = c
    sum = tl.fma(g, g, s[0])
    return p + _divide(lr * g, _root(sum, EXACT) + eps, EXACT), (sum,)


@triton.jit
def adadelta_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
    rho = tl.load(own)
    lr = held(-rate, A)
    return lr, rho, 1.0 - rho, tl.load(own + 1)


@triton.jit
def adadelta(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    lr, rho, rest, eps = c
    square = tl.fma(rest * g, g, s[0] * rho)
    delta = _divide(_root(s[1] + eps, EXACT), _root(square + eps, EXACT), EXACT) * g
    deltas = tl.fma(rest * delta, delta, s[1] * rho)
    return tl.fma(lr, delta, p), (square, deltas)


@triton.jit
def rmsprop_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
    alpha = tl.load(own)
    m = tl.where(cycles, momentum, tl.load(own + 2))
    lr = held(-rate, A)
    return lr, alpha, 1.0 - alpha, tl.load(own + 1), held(m, A)


@triton.jit
def rmsprop(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    lr, alpha, rest, eps, momentum = c
    MOMENTUM: tl.constexpr = FLAGS[0]
    CENTERED: tl.constexpr = FLAGS[1]
    square = tl.fma(rest * g, g, s[0] * alpha)
    spread = square
    if CENTERED:
        mean = lerp(s[2] if MOMENTUM else s[1], g, rest)
        # Round once, as torch's addcmul does: a square that is rounded alone may overflow, and
        # inf - inf is NaN.
        spread = tl.fma(-mean, mean, spread)
    spread = _root(spread, EXACT) + eps
    if MOMENTUM:
        buffer = s[1] * momentum + _divide(g, spread, EXACT)
        p = tl.fma(lr, buffer, p)
        s = (square, buffer, mean) if CENTERED else (square, buffer)
    else:
        p = p + _divide(lr * g, spread, EXACT)
        s = (square, mean) if CENTERED else (square,)
    return p, s


@triton.jit
def adamax_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    lr = held(-(rate / (1.0 - _power(beta1, step))), A)
    return held(1.0 - beta1, A), tl.load(own + 1), tl.load(own + 2), lr


@triton.jit
def adamax(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    weight, beta2, eps, step_size = c
    m = lerp(s[0], g, weight)
    before = s[1] * beta2
    now = tl.abs(g) + eps
    norm = tl.where((before > now) | (before != before), before, now)  # NaN wins
    return p + _divide(step_size * m, norm, EXACT), (m, norm)


@triton.jit
def radam_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
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
def radam(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    weight, beta2, rest2, correction1, lr, correction2, eps, rectification = c
    m = lerp(s[0], g, weight)
    v = tl.fma(rest2 * g, g, s[1] * beta2)
    change = _divide(m, correction1, EXACT) * lr
    rate = _divide(1.0, _root(v, EXACT) + eps, EXACT) * correction2
    p = p - tl.where(rectification > 0.0, change * rate * rectification, change)
    return p, (m, v)


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
    )


@triton.jit
def nadam(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    weight, beta2, rest2, correction2, eps, of_gradient, of_mean = c
    m = lerp(s[0], g, weight)
    v = tl.fma(rest2 * g, g, s[1] * beta2)
    spread = _root(_divide(v, correction2, EXACT), EXACT) + eps
    p = p + _divide(of_gradient * g, spread, EXACT)
    return p + _divide(of_mean * m, spread, EXACT), (m, v)


@triton.jit
def lion_constants(own, rate, step, scalar, momentum, cycles, A: tl.constexpr):
    beta1 = tl.where(cycles, momentum, tl.load(own))
    beta2 = tl.load(own + 1)
    lr = held(-rate, A)
    return lr, held(beta1, A), held(1.0 - beta1, A), beta2, 1.0 - beta2


@triton.jit
def lion(p, g, s, first, c, FLAGS: tl.constexpr, EXACT: tl.constexpr):
    lr, beta1, rest1, beta2, rest2 = c
    mean = tl.fma(g, rest1, s[0] * beta1)
    average = tl.fma(g, rest2, s[0] * beta2)
    # The sign of NaN is 0, as in torch.
    sign = tl.where(mean > 0.0, 1.0, tl.where(mean < 0.0, -1.0, 0.0)).to(p.dtype)
    return tl.fma(lr, sign, p), (average,)


@triton.jit
def advanced(scalar, factor):
    """Return the scalar state after a step, in the dtype of the state."""
    return scalar * factor.to(scalar.dtype)


class Kernel(NamedTuple):
    """The functions of a kernel.

    Args:
        constants: returns the constants of a step, a tuple of float64.
        constant_count: the number of constants.
        update: returns the new parameter and the tuple of its new state.
        flags: the flags that ``update`` is compiled for.
        factor: returns by what a step multiplies the scalar state, float64, if the rule has one.
    """

    constants: Any
    constant_count: int
    update: Any
    flags: tuple[bool, ...] = ()
    factor: Any = None


#: The kernels, by their names in :data:`clr_optim.rules.KERNELS`.
KERNELS = {
    "sgd": Kernel(sgd_constants, 4, sgd, (False,)),
    "sgd_momentum": Kernel(sgd_constants, 4, sgd, (True,)),
    "adam": Kernel(adam_constants, 6, adam, (False,)),
    "adam_amsgrad": Kernel(adam_constants, 6, adam, (True,)),
    "adagrad": Kernel(adagrad_constants, 2, adagrad),
    "adadelta": Kernel(adadelta_constants, 4, adadelta),
    "rmsprop": Kernel(rmsprop_constants, 5, rmsprop, (False, False)),
    "rmsprop_momentum": Kernel(rmsprop_constants, 5, rmsprop, (True, False)),
    "rmsprop_centered": Kernel(rmsprop_constants, 5, rmsprop, (False, True)),
    "rmsprop_momentum_centered": Kernel(rmsprop_constants, 5, rmsprop, (True, True)),
    "adamax": Kernel(adamax_constants, 4, adamax),
    "radam": Kernel(radam_constants, 8, radam),
    "nadam": Kernel(nadam_constants, 7, nadam, factor=nadam_factor),
    "lion": Kernel(lion_constants, 5, lion),
}
