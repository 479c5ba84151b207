// The kernels as the driver sees them: plain structures, and one table of functions per instruction
// set.
#pragma once

#include <cstdint>

namespace clr {

// The storage formats by number. DTYPES in clr_optim/plan/eligible.py has the same order; a test
// compares.
enum Dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// A storage format that is no dtype: float32 masters, each in a bfloat16 parameter and a rest of 16
// bits. Gradients are bfloat16, and the slots of the rule float32.
constexpr int64_t MASTERS = FLOAT16 + 1;

// A tensor of a bucket. A scan writes no row: what changes from step to step is the address of the
// gradient, which lies in a table beside the rows.
struct Row {
    void* param;
    void* state[5];  // those of the rule, then the rest of the master, then the average
    void* counter;   // torch's step counter of this parameter, or null
    void* scalar;    // the scalar state of this parameter, or null
    int64_t numel;
    int64_t group;   // the number of the group that has its scalars
    int64_t first;   // 1 if its state holds nothing yet
};
static_assert(sizeof(Row) == 11 * 8, "a field of Row has other than 8 bytes");

// What a rule reads of a step beside the scalars of the group.
struct Step {
    double grad_scale;  // the factor of the gradients, for clipping and a GradScaler
    double number;  // counted from 1; 0 if the rule counts no steps
    bool first;     // whether the state holds nothing yet
    double scalar;  // the scalar state after this step, for a rule with one
};

// A rule object of any class, as bytes. The functions of its Kernel know the class.
struct alignas(8) AnyRule { unsigned char bytes[112]; };

// The factor by which a step multiplies the scalar state.
using Factor = double (*)(const double* scalars, double number);

// One rule for one storage format.
struct Kernel {
    const char* name;
    int slots;
    Factor factor;
    void (*build)(AnyRule&, const double* scalars, const Step&);
    void (*update)(const AnyRule&, const Row&, const void* grad, int64_t begin, int64_t end);
};

// All kernels, compiled for one instruction set.
struct KernelSet {
    const char* name;
    // Returns a kernel without functions if the number of the kernel or of the format is unknown.
    Kernel (*kernel)(int64_t kernel, int64_t format);
    // Returns the sum of the squares of values [begin, end), in double and in a fixed order.
    double (*sum_of_squares)(int64_t dtype, const void* grad, int64_t begin, int64_t end);
    // Moves values [begin, end) of an average toward those of a parameter, by a weight: 1 copies.
    // `rest` is null unless the format is MASTERS.
    void (*average)(int64_t format, int64_t average_dtype, const void* param, const void* rest,
                    void* average, int64_t begin, int64_t end, double weight);
    // Rounds floats to a storage format and back, for the tests.
    void (*round)(int64_t dtype, const float* from, float* to, int64_t count);
};

// The sets of this platform. CMakeLists.txt compiles kernels.cpp once for each.
#if defined(__x86_64__)
#define CLR_KERNEL_SETS(SET) SET(x86_64_v3) SET(x86_64_v4)
#else
#define CLR_KERNEL_SETS(SET) SET(baseline)
#endif

namespace sets {
#define CLR_DECLARE(name) extern const KernelSet name;
CLR_KERNEL_SETS(CLR_DECLARE)
#undef CLR_DECLARE
}  // namespace sets

}  // namespace clr
