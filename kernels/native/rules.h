// The arithmetic of the update rules in C++: one function object per rule updates one element.
//
// State is passed as up to three references s0, s1, s2, in the order of the slots in rules.py. A local
// array instead of references would keep compilers from vectorising the loop around the rule.
//
// A rule object is built for a step from the scalars of a group, which are double as in Python. Tensors
// with the same group, step number and state share the object.
//
// The rule computes in A, the type of arithmetic: double for double storage, else float. The order of
// operations is that of torch's for-loop step, with fused multiply-adds where torch's vectorised
// operator has one. So float32 differs by an ulp at most, and NaN and Inf appear where torch has them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace clr {
// Internal linkage: no code of one instruction set may serve another, see kernels.cpp.
namespace {

// a·b + c as torch's vec::fmadd: one rounding if the processor has the instruction. A library call
// instead of the instruction would cost hundreds of cycles.
inline float fmadd(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
inline double fmadd(double a, double b, double c) {
#ifdef __FP_FAST_FMA
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}
// Returns x in the type of arithmetic, limited to finite numbers; NaN stays NaN. An infinite rate
// times a gradient of 0 would be NaN.
template <class A> A held(double x) {
    const double largest = double(std::numeric_limits<A>::max());
    return A(x > largest ? largest : x < -largest ? -largest : x);
}
inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// on ? a : b for a condition that is constant in the loop, selected by bits. Compilers do not vectorise
// a ?: on such a condition if the loop is too large to be compiled for both cases.
template <class A> struct Switch {
    using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
    Bits mask;
    explicit Switch(bool on) : mask(on ? ~Bits(0) : Bits(0)) {}
    A operator()(A a, A b) const {
        Bits x, y;
        std::memcpy(&x, &a, sizeof a);
        std::memcpy(&y, &b, sizeof b);
        x = (x & mask) | (y & ~mask);
        std::memcpy(&a, &x, sizeof a);
        return a;
    }
};

// As torch.lerp: starts from the end nearer to the result, to be exact at both ends.
template <class A> struct Lerp {
    A coefficient;
    Switch<A> from_start;
    explicit Lerp(double weight)
        : coefficient(std::abs(A(weight)) < A(0.5) ? A(weight) : held<A>(weight) - A(1)),
          from_start(std::abs(A(weight)) < A(0.5)) {}
    A operator()(A start, A end) const {
        return fmadd(coefficient, end - start, from_start(start, end));
    }
};

// The scalars that every group begins with, as UpdateRule.row in rules.py writes them. The scalars of
// the rule follow.
enum Common { LR, WEIGHT_DECAY, SHRINKING, SIGN, OWN };

// Decoupled weight decay: a rule that has it multiplies the parameter by this factor first.
template <class A> A shrinkage(const double* s) { return held<A>(1 - s[LR] * s[SHRINKING]); }

// Every rule calls this first: it scales the gradient, negates it (maximize), adds the weight decay.
// Without weight decay nothing is added, since 0·p is NaN for an infinite p.
template <class A> struct Gradient {
    A scale, weight_decay;
    Switch<A> decays;
    Gradient(const double* s, double grad_scale)
        : scale(A(A(grad_scale) * A(s[SIGN]))), weight_decay(A(s[WEIGHT_DECAY])),
          decays(s[WEIGHT_DECAY] != 0) {}
    A operator()(A g, A p) const {
        g *= scale;
        return decays(fmadd(weight_decay, p, g), g);
    }
};

template <class A, bool MOMENTUM> struct Sgd {
    static constexpr const char* name = MOMENTUM ? "sgd_momentum" : "sgd";
    static constexpr int slots = MOMENTUM ? 1 : 0;
    Gradient<A> gradient;
    A lr, momentum, keep;
    Switch<A> nesterov, first;
    Sgd(const double* s, const Step& step)
        : gradient(s, step.grad_scale), lr(held<A>(-s[LR])), momentum(held<A>(s[OWN])),
          keep(A(1 - s[OWN + 1])),
          nesterov(s[OWN + 2] != 0), first(step.first) {}
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        if (MOMENTUM) {
            // The first gradient is taken without dampening; the buffer holds nothing yet.
            const A buffer = first(g, fmadd(g, keep, s0 * momentum));
            s0 = buffer;
            g = nesterov(fmadd(buffer, momentum, g), buffer);
        }
        p = fmadd(lr, g, p);
    }
};

template <class A, bool AMSGRAD> struct Adam {
    static constexpr const char* name = AMSGRAD ? "adam_amsgrad" : "adam";
    static constexpr int slots = AMSGRAD ? 3 : 2;
    Gradient<A> gradient;
    Lerp<A> lerp;
    A shrink, beta2, rest2, correction2, eps, step_size;
    Adam(const double* s, const Step& step)
        : gradient(s, step.grad_scale), lerp(1 - s[OWN]), shrink(shrinkage<A>(s)),
          beta2(A(s[OWN + 1])), rest2(A(1 - s[OWN + 1])),
          correction2(A(std::sqrt(1 - std::pow(s[OWN + 1], step.number)))), eps(A(s[OWN + 2])),
          step_size(held<A>(-(s[LR] / (1 - std::pow(s[OWN], step.number))))) {}
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        p *= shrink;
        const A m = lerp(s0, g);
        const A v = fmadd(rest2 * g, g, s1 * beta2);
        s0 = m;
        s1 = v;
        A second = v;
        if (AMSGRAD) {  // NaN wins, as in torch.maximum
            second = s2 > v || s2 != s2 ? s2 : v;
            s2 = second;
        }
        p += step_size * m / (root(second) / correction2 + eps);
    }
};

template <class A> struct Adagrad {
    static constexpr const char* name = "adagrad";
    static constexpr int slots = 1;
    Gradient<A> gradient;
    A rate, eps;
    Adagrad(const double* s, const Step& step)
        : gradient(s, step.grad_scale), rate(held<A>(-(s[LR] / (1 + (step.number - 1) * s[OWN])))),
          eps(A(s[OWN + 1])) {}
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        const A sum = fmadd(g, g, s0);
        s0 = sum;
        p += rate * g / (root(sum) + eps);
    }
};

template <class A> struct Adadelta {
    static constexpr const char* name = "adadelta";
    static constexpr int slots = 2;
    Gradient<A> gradient;
    A lr, rho, rest, eps;
    Adadelta(const double* s, const Step& step)
        : gradient(s, step.grad_scale), lr(held<A>(-s[LR])), rho(A(s[OWN])), rest(A(1 - s[OWN])),
          eps(A(s[OWN + 1])) {}
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        const A square = fmadd(rest * g, g, s0 * rho);
        const A delta = root(s1 + eps) / root(square + eps) * g;
        s0 = square;
        s1 = fmadd(rest * delta, delta, s1 * rho);
        p = fmadd(lr, delta, p);
    }
};

template <class A, bool MOMENTUM, bool CENTERED> struct RmsProp {
    static constexpr const char* name = MOMENTUM && CENTERED ? "rmsprop_momentum_centered"
                                        : MOMENTUM ? "rmsprop_momentum"
                                        : CENTERED ? "rmsprop_centered"
                                                   : "rmsprop";
    static constexpr int slots = 1 + MOMENTUM + CENTERED;
    Gradient<A> gradient;
    Lerp<A> lerp;
    A lr, alpha, rest, eps, momentum;
    RmsProp(const double* s, const Step& step)
        : gradient(s, step.grad_scale), lerp(1 - s[OWN]), lr(held<A>(-s[LR])), alpha(A(s[OWN])),
          rest(A(1 - s[OWN])), eps(A(s[OWN + 1])), momentum(held<A>(s[OWN + 2])) {}
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        const A square = fmadd(rest * g, g, s0 * alpha);
        s0 = square;
        A spread = square;
        if (CENTERED) {
            A& mean = MOMENTUM ? s2 : s1;
            mean = lerp(mean, g);
            // One rounding, as in torch's addcmul. The square of the mean, rounded alone, may overflow,
            // and inf - inf is NaN.
            spread = fmadd(-mean, mean, spread);
        }
        spread = root(spread) + eps;
        if (MOMENTUM) {
            const A buffer = s1 * momentum + g / spread;
            s1 = buffer;
            p = fmadd(lr, buffer, p);
        } else {
            p += lr * g / spread;
        }
    }
};

template <class A> struct Adamax {
    static constexpr const char* name = "adamax";
    static constexpr int slots = 2;
    Gradient<A> gradient;
    Lerp<A> lerp;
    A beta2, eps, step_size;
    Adamax(const double* s, const Step& step)
        : gradient(s, step.grad_scale), lerp(1 - s[OWN]), beta2(A(s[OWN + 1])), eps(A(s[OWN + 2])),
          step_size(held<A>(-(s[LR] / (1 - std::pow(s[OWN], step.number))))) {}
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        const A m = lerp(s0, g);
        const A before = s1 * beta2, now = std::abs(g) + eps;
        const A norm = before > now || before != before ? before : now;  // NaN wins
        s0 = m;
        s1 = norm;
        p += step_size * m / norm;
    }
};

// Adam's second moment serves once enough steps have been averaged: if rho, the length of the
// average, is above 5.
template <class A> struct RAdam {
    static constexpr const char* name = "radam";
    static constexpr int slots = 2;
    Gradient<A> gradient;
    Lerp<A> lerp;
    Switch<A> rectifies;
    A shrink, beta2, rest2, correction1, lr, correction2, eps, rectification;
    RAdam(const double* s, const Step& step)
        : gradient(s, step.grad_scale), lerp(1 - s[OWN]), rectifies(false), shrink(shrinkage<A>(s)),
          beta2(A(s[OWN + 1])), rest2(A(1 - s[OWN + 1])),
          correction1(A(1 - std::pow(s[OWN], step.number))), lr(held<A>(s[LR])), correction2(1),
          eps(A(s[OWN + 2])), rectification(1) {
        const double power = std::pow(s[OWN + 1], step.number), rest = 1 - power;
        const double longest = 2 / (1 - s[OWN + 1]) - 1;
        const double rho = longest - 2 * step.number * power / rest;
        correction2 = A(std::sqrt(rest));
        if (rho > 5) {
            rectifies = Switch<A>(true);
            rectification = A(std::sqrt((rho - 4) * (rho - 2) * longest /
                                        ((longest - 4) * (longest - 2) * rho)));
        }
    }
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        p *= shrink;
        const A m = lerp(s0, g);
        const A v = fmadd(rest2 * g, g, s1 * beta2);
        s0 = m;
        s1 = v;
        const A change = m / correction1 * lr;
        const A rate = A(1) / (root(v) + eps) * correction2;
        p -= rectifies(change * rate * rectification, change);
    }
};

// Its scalar state is the product of the momenta of all steps: each step multiplies it by `factor`.
template <class A> struct NAdam {
    static constexpr const char* name = "nadam";
    static constexpr int slots = 2;
    Gradient<A> gradient;
    Lerp<A> lerp;
    A shrink, beta2, rest2, correction2, eps, of_gradient, of_mean;
    static double factor(const double* s, double number) {
        return s[OWN] * (1.0 - 0.5 * std::pow(0.96, number * s[OWN + 3]));
    }
    NAdam(const double* s, const Step& step)
        : gradient(s, step.grad_scale), lerp(1 - s[OWN]), shrink(shrinkage<A>(s)),
          beta2(A(s[OWN + 1])), rest2(A(1 - s[OWN + 1])),
          correction2(A(1 - std::pow(s[OWN + 1], step.number))), eps(A(s[OWN + 2])),
          of_gradient(held<A>(-s[LR] * (1.0 - factor(s, step.number)) / (1.0 - step.scalar))) {
        const double next = factor(s, step.number + 1);
        of_mean = held<A>(-s[LR] * next / (1.0 - step.scalar * next));
    }
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        p *= shrink;
        const A m = lerp(s0, g);
        const A v = fmadd(rest2 * g, g, s1 * beta2);
        s0 = m;
        s1 = v;
        const A spread = root(v / correction2) + eps;
        p += of_gradient * g / spread;
        p += of_mean * m / spread;
    }
};

template <class A> struct Lion {
    static constexpr const char* name = "lion";
    static constexpr int slots = 1;
    Gradient<A> gradient;
    A shrink, lr, beta1, rest1, beta2, rest2;
    Lion(const double* s, const Step& step)
        : gradient(s, step.grad_scale), shrink(shrinkage<A>(s)), lr(held<A>(-s[LR])),
          beta1(held<A>(s[OWN])), rest1(held<A>(1 - s[OWN])), beta2(A(s[OWN + 1])),
          rest2(A(1 - s[OWN + 1])) {}
    void operator()(A& p, A g, [[maybe_unused]] A& s0, [[maybe_unused]] A& s1,
                    [[maybe_unused]] A& s2) const {
        g = gradient(g, p);
        p *= shrink;
        const A mean = fmadd(g, rest1, s0 * beta1);
        s0 = fmadd(g, rest2, s0 * beta2);
        p = fmadd(lr, A(mean > 0) - A(mean < 0), p);  // the sign of NaN is 0, as in torch
    }
};

// The rules of all kernels, in the order of KERNELS in clr_optim/rules.py. A test compares the names.
template <class A>
using Rules = std::tuple<Sgd<A, false>, Sgd<A, true>, Adam<A, false>, Adam<A, true>, Adagrad<A>,
                         Adadelta<A>, RmsProp<A, false, false>, RmsProp<A, true, false>,
                         RmsProp<A, false, true>, RmsProp<A, true, true>, Adamax<A>, RAdam<A>,
                         NAdam<A>, Lion<A>>;

}  // namespace
}  // namespace clr
