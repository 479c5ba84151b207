// One kernel: a rule applied to all values of a tensor, for every rule and storage format.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "kernels.h"
#include "rules.h"
#include "storage.h"

namespace clr {
namespace {

template <class Rule> void build(AnyRule& to, const double* scalars, const Step& step) {
    static_assert(sizeof(Rule) <= sizeof(AnyRule) && std::is_trivially_copyable<Rule>::value, "");
    static_assert(Rule::slots <= 3, "two in Row are the rest and the average");
    const Rule rule(scalars, step);
    std::memcpy(&to, &rule, sizeof rule);
}

// The function that advances the scalar state, or null for a rule without one.
template <class Rule, class = void> constexpr Factor factor = nullptr;
template <class Rule>
constexpr Factor factor<Rule, std::void_t<decltype(&Rule::factor)>> = &Rule::factor;

// Updates the one value at i.
template <class T, class Rule, class Raw>
void update_one(const Rule& r, Raw* p, const Raw* g, Raw* const* s, int64_t i) {
    constexpr int slots = Rule::slots;
    typename T::A param = T::load(p[i]), state[3] = {};
    for (int k = 0; k < slots; ++k) state[k] = T::load(s[k][i]);
    r(param, T::load(g[i]), state[0], state[1], state[2]);
    p[i] = T::store(param);
    for (int k = 0; k < slots; ++k) s[k][i] = T::store(state[k]);
}

// Updates values [begin, end) of a tensor.
template <class T, class Rule> struct Update {
    static void run(const AnyRule& rule, const Row& row, const void* grad, int64_t begin,
                    int64_t end) {
        using A = typename T::A;
        using Raw = typename T::Raw;
        using Unit = typename T::Unit;
        constexpr int width = T::width, slots = Rule::slots;
        Raw* const p = static_cast<Raw*>(row.param) + begin;
        const Raw* const g = static_cast<const Raw*>(grad) + begin;
        Raw* s[3] = {};
        for (int k = 0; k < slots; ++k) s[k] = static_cast<Raw*>(row.state[k]) + begin;
        Unit* __restrict pu = reinterpret_cast<Unit*>(p);
        const Unit* __restrict gu = reinterpret_cast<const Unit*>(g);
        Unit* __restrict u0 = reinterpret_cast<Unit*>(s[0]);
        Unit* __restrict u1 = reinterpret_cast<Unit*>(s[1]);
        Unit* __restrict u2 = reinterpret_cast<Unit*>(s[2]);
        // A copy that no store can change, so that its fields stay in registers.
        const Rule r = *reinterpret_cast<const Rule*>(&rule);
        const int64_t units = (end - begin) / width;
#pragma omp simd
        for (int64_t i = 0; i < units; ++i) {
            const Unit pi = pu[i], gi = gu[i];
            const Unit i0 = slots > 0 ? u0[i] : Unit(), i1 = slots > 1 ? u1[i] : Unit(),
                       i2 = slots > 2 ? u2[i] : Unit();
            A pa = T::first(pi), a0 = T::first(i0), a1 = T::first(i1), a2 = T::first(i2);
            A pb = T::second(pi), b0 = T::second(i0), b1 = T::second(i1), b2 = T::second(i2);
            r(pa, T::first(gi), a0, a1, a2);
            if (width > 1) r(pb, T::second(gi), b0, b1, b2);
            pu[i] = T::pack(pa, pb);
            if (slots > 0) u0[i] = T::pack(a0, b0);
            if (slots > 1) u1[i] = T::pack(a1, b1);
            if (slots > 2) u2[i] = T::pack(a2, b2);
        }
        if (width > 1 && units * width < end - begin) update_one<T>(r, p, g, s, units * width);
    }
};

// Converts vector by vector, with an instruction that compilers do not find by themselves. The
// arrays are vectors, and stay in registers.
template <class Rule> struct Update<Float16, Rule> {
    static void run(const AnyRule& rule, const Row& row, const void* grad, int64_t begin,
                    int64_t end) {
        using Raw = Float16::Raw;
        constexpr int lanes = Float16::lanes, slots = Rule::slots;
        Raw* const p = static_cast<Raw*>(row.param);
        const Raw* const g = static_cast<const Raw*>(grad);
        Raw* s[3] = {};
        for (int k = 0; k < slots; ++k) s[k] = static_cast<Raw*>(row.state[k]);
        const Rule r = *reinterpret_cast<const Rule*>(&rule);
        int64_t i = begin;
        for (; i + lanes <= end; i += lanes) {
            alignas(64) float param[lanes], gradient[lanes], s0[lanes], s1[lanes], s2[lanes];
            Float16::load(p + i, param);
            Float16::load(g + i, gradient);
            if (slots > 0) Float16::load(s[0] + i, s0);
            if (slots > 1) Float16::load(s[1] + i, s1);
            if (slots > 2) Float16::load(s[2] + i, s2);
#pragma omp simd
            for (int j = 0; j < lanes; ++j) r(param[j], gradient[j], s0[j], s1[j], s2[j]);
            Float16::store(param, p + i);
            if (slots > 0) Float16::store(s0, s[0] + i);
            if (slots > 1) Float16::store(s1, s[1] + i);
            if (slots > 2) Float16::store(s2, s[2] + i);
        }
        for (; i < end; ++i) update_one<Float16>(r, p, g, s, i);
    }
};

// Converts some values at a time: halves of 16 bits, and slots of 32, fit no common unit.
template <class Rule> struct Update<Masters, Rule> {
    using Raw = Masters::Raw;
    static constexpr int lanes = 32, slots = Rule::slots;

    static void run(const AnyRule& rule, const Row& row, const void* grad, int64_t begin,
                    int64_t end) {
        Raw* const p = static_cast<Raw*>(row.param);
        Raw* const rest = static_cast<Raw*>(row.state[slots]);
        const Raw* const g = static_cast<const Raw*>(grad);
        float* s[3] = {};
        for (int k = 0; k < slots; ++k) s[k] = static_cast<float*>(row.state[k]);
        const Rule r = *reinterpret_cast<const Rule*>(&rule);
        int64_t i = begin;
        for (; i + lanes <= end; i += lanes) update<lanes>(r, p + i, rest + i, g + i, s, i);
        for (; i < end; ++i) update<1>(r, p + i, rest + i, g + i, s, i);
    }

private:
    template <int count>
    static void update(const Rule& r, Raw* __restrict p, Raw* __restrict rest,
                       const Raw* __restrict g, float* const* s, int64_t at) {
        float* __restrict s0 = slots > 0 ? s[0] + at : nullptr;
        float* __restrict s1 = slots > 1 ? s[1] + at : nullptr;
        float* __restrict s2 = slots > 2 ? s[2] + at : nullptr;
        alignas(64) float master[count], gradient[count];
#pragma omp simd
        for (int j = 0; j < count; ++j) master[j] = Masters::join(p[j], rest[j]);
#pragma omp simd
        for (int j = 0; j < count; ++j) gradient[j] = Bfloat16::load(g[j]);
#pragma omp simd
        for (int j = 0; j < count; ++j) {
            float a0 = slots > 0 ? s0[j] : 0, a1 = slots > 1 ? s1[j] : 0, a2 = slots > 2 ? s2[j] : 0;
            r(master[j], gradient[j], a0, a1, a2);
            if (slots > 0) s0[j] = a0;
            if (slots > 1) s1[j] = a1;
            if (slots > 2) s2[j] = a2;
        }
        alignas(64) uint32_t bits[count];
#pragma omp simd
        for (int j = 0; j < count; ++j) bits[j] = Masters::bits_of(master[j]);
#pragma omp simd
        for (int j = 0; j < count; ++j) p[j] = Masters::param_of(bits[j]);
#pragma omp simd
        for (int j = 0; j < count; ++j) rest[j] = Masters::rest_of(bits[j]);
    }
};

// The kernel of a rule by its number in Rules; one without functions for an unknown number.
template <class T, class... Rule>
Kernel pick(int64_t kernel, const std::tuple<Rule...>*) {
    static constexpr Kernel kernels[] = {
        {Rule::name, Rule::slots, factor<Rule>, build<Rule>, Update<T, Rule>::run}...};
    return 0 <= kernel && kernel < int64_t(sizeof...(Rule)) ? kernels[kernel] : Kernel{};
}
template <class T> Kernel pick(int64_t kernel) {
    return pick<T>(kernel, static_cast<const Rules<typename T::A>*>(nullptr));
}

// A kernel without functions if the number of the kernel or of the format is unknown.
Kernel pick(int64_t kernel, int64_t format) {
    switch (format) {
        case FLOAT32: return pick<Float32>(kernel);
        case FLOAT64: return pick<Float64>(kernel);
        case BFLOAT16: return pick<Bfloat16>(kernel);
        case FLOAT16: return pick<Float16>(kernel);
        case MASTERS: return pick<Masters>(kernel);
        default: return {};
    }
}

}  // namespace
}  // namespace clr
