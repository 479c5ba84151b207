// All kernels, for the instruction set that the compiler's flags name.
//
// CMakeLists.txt compiles this file once per set, with CLR_KERNEL_SET as the set's name. Everything
// here but the one constant has internal linkage. The linker merges equal functions of external
// linkage and keeps any one of them: an old CPU would then run code of a newer instruction set. So
// no function template of the standard library may be called here. A test looks at the symbols.

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

#define CLR_TEXT_OF(name) #name
#define CLR_TEXT(name) CLR_TEXT_OF(name)
constexpr KernelSet kernel_set = {CLR_TEXT(CLR_KERNEL_SET), pick, sum_of_squares, round};

}  // namespace

const KernelSet sets::CLR_KERNEL_SET = kernel_set;

}  // namespace clr
