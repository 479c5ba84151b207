// All kernels, for the instruction set that the compiler's flags name.
//
// CMakeLists.txt compiles this file once per set, with CLR_KERNEL_SET as the set's name. Everything
// here but the one constant has internal linkage. The linker merges equal functions of external
// linkage and keeps any one of them: an old CPU would then run code of a newer instruction set. So
// no function template and no inline function of the standard library may be called here, unless the
// compiler always expands it. A test looks at the symbols.

#include <cstdint>

#include "kernels.h"
#include "storage.h"
#include "update.h"

namespace clr {
namespace {

// The number of partial sums. The order of the additions does not depend on the instruction set.
constexpr int LANES = 16;

template <class T> double squares(const void* grad, int64_t begin, int64_t end) {
    const auto* g = static_cast<const typename T::Raw*>(grad);
    double lanes[LANES] = {};
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            const double x = T::load(g[i + j]);
            lanes[j] += x * x;
        }
    for (int j = 0; i < end; ++i, ++j) {
        const double x = T::load(g[i]);
        lanes[j] += x * x;
    }
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

double sum_of_squares(int64_t dtype, const void* grad, int64_t begin, int64_t end) {
    switch (dtype) {
        case FLOAT32: return squares<Float32>(grad, begin, end);
        case FLOAT64: return squares<Float64>(grad, begin, end);
        case BFLOAT16: return squares<Bfloat16>(grad, begin, end);
        default: return squares<Float16>(grad, begin, end);
    }
}

void round(int64_t dtype, const float* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = dtype == BFLOAT16  ? Bfloat16::load(Bfloat16::store(from[i]))
                : dtype == FLOAT16 ? Float16::load(Float16::store(from[i]))
                                   : from[i];
}

// Values whose copies in the type of arithmetic stay in the nearest cache.
constexpr int64_t AT_ONCE = 256;

template <class T> void load(const typename T::Raw* from, typename T::A* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = T::load(from[i]);
}
template <class T> void store(const typename T::A* from, typename T::Raw* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = T::store(from[i]);
}
template <> void load<Float16>(const Float16::Raw* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + Float16::lanes <= count; i += Float16::lanes) Float16::load(from + i, to + i);
    for (; i < count; ++i) to[i] = Float16::load(from[i]);
}
template <> void store<Float16>(const float* from, Float16::Raw* to, int64_t count) {
    int64_t i = 0;
    for (; i + Float16::lanes <= count; i += Float16::lanes) Float16::store(from + i, to + i);
    for (; i < count; ++i) to[i] = Float16::store(from[i]);
}

template <class T>
void load_params(const typename T::Raw* params, const void*, int64_t at, typename T::A* to,
                 int64_t count) {
    load<T>(params + at, to, count);
}
template <>
void load_params<Masters>(const Masters::Raw* params, const void* rests, int64_t at, float* to,
                          int64_t count) {
    const auto* const rest = static_cast<const Masters::Raw*>(rests);
    for (int64_t i = 0; i < count; ++i) to[i] = Masters::join(params[at + i], rest[at + i]);
}

// T is the format of the parameter, S that of the average. Both have one type of arithmetic.
template <class T, class S>
void average(const void* param, const void* rest, void* average, int64_t begin, int64_t end,
             double weight) {
    using A = typename T::A;
    const auto* const p = static_cast<const typename T::Raw*>(param);
    auto* const to = static_cast<typename S::Raw*>(average);
    const Lerp<A> lerp(weight);
    for (int64_t i = begin; i < end; i += AT_ONCE) {
        alignas(64) A now[AT_ONCE], mean[AT_ONCE];
        const int64_t count = end - i < AT_ONCE ? end - i : AT_ONCE;
        load_params<T>(p, rest, i, now, count);
        // The first average is a copy, also of values that are infinite.
        if (weight != 1) {
            load<S>(to + i, mean, count);
            for (int64_t k = 0; k < count; ++k) now[k] = lerp(mean[k], now[k]);
        }
        store<S>(now, to + i, count);
    }
}

void average(int64_t format, int64_t average_dtype, const void* param, const void* rest,
             void* average, int64_t begin, int64_t end, double weight) {
    const bool same = format == average_dtype;
    const auto run = format == FLOAT32    ? clr::average<Float32, Float32>
                     : format == FLOAT64  ? clr::average<Float64, Float64>
                     : format == MASTERS  ? clr::average<Masters, Float32>
                     : format == BFLOAT16 ? (same ? clr::average<Bfloat16, Bfloat16>
                                                 : clr::average<Bfloat16, Float32>)
                     : same              ? clr::average<Float16, Float16>
                                         : clr::average<Float16, Float32>;
    run(param, rest, average, begin, end, weight);
}

#define CLR_TEXT_OF(name) #name
#define CLR_TEXT(name) CLR_TEXT_OF(name)
constexpr KernelSet kernel_set = {CLR_TEXT(CLR_KERNEL_SET), pick, sum_of_squares, average,
                                  round};

}  // namespace

const KernelSet sets::CLR_KERNEL_SET = kernel_set;

}  // namespace clr
