// Run every native kernel of a set on every format, without Python or torch: for valgrind, under which
// Python and torch take minutes to start, and for sanitizers, which need no preloading here. Commands:
// CONTRIBUTING.md. The first argument names the set of kernels.
//
// Each tensor is an allocation of exactly its size, so that an access beyond it is found. Lengths are
// around a vector, a unit of two 16-bit values, and a block. The driver checks that any number of
// threads gives the same bits, that rows without a gradient do not change, and that a first step does
// not depend on the memory of its momentum. (The kernel loads that memory without using it. valgrind
// would report this for memory that was never written.)
//
// With any other argument, the driver has a kernel reach beyond a tensor, which must be reported.

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../../kernels/native/multi_tensor.h"
#include "../../kernels/native/sets.h"
#include "../../kernels/native/storage.h"

using namespace clr;

namespace {

const int64_t LENGTHS[] = {0,  1,  2,   3,   5,   15,  16,   17,   31,  32, 33,
                           63, 64, 65, 127, 511, 512, 513, 1023, 4095, 40001};
constexpr int64_t TENSORS = sizeof LENGTHS / sizeof *LENGTHS;
constexpr int64_t GROUPS = 2, WIDTH = 8;
constexpr size_t SIZES[] = {4, 8, 2, 2};

void require(bool holds, const char* what, int64_t kernel, int64_t dtype) {
    if (holds) return;
    std::fprintf(stderr, "kernel %d, dtype %d: %s\n", int(kernel), int(dtype), what);
    std::exit(1);
}

// From malloc: valgrind and ASan know its exact end, but of a vector only the end of its capacity.
using Bytes = std::unique_ptr<unsigned char, decltype(&std::free)>;

Bytes values(int64_t dtype, int64_t count, unsigned seed, bool positive) {
    const size_t size = SIZES[dtype];
    Bytes bytes(static_cast<unsigned char*>(std::malloc(size * size_t(count))), std::free);
    for (int64_t i = 0; i < count; ++i) {
        seed = seed * 1664525u + 1013904223u;
        double x = double(seed >> 8) / (1 << 24) - (positive ? 0 : 0.5);
        const float f = float(x);
        const uint16_t half = Float16::store(f), brain = Bfloat16::store(f);
        const void* from = dtype == FLOAT32   ? static_cast<const void*>(&f)
                           : dtype == FLOAT64 ? static_cast<const void*>(&x)
                           : dtype == FLOAT16 ? static_cast<const void*>(&half)
                                              : static_cast<const void*>(&brain);
        std::memcpy(bytes.get() + size * size_t(i), from, size);
    }
    return bytes;
}

struct Run {
    std::vector<Bytes> memory;
    clr::Rows rows;
    // Averages of all rows; parameters, state and counters of the active ones.
    std::vector<unsigned char> result;

    void keep(const void* from, size_t size) {
        const auto* bytes = static_cast<const unsigned char*>(from);
        if (size) result.insert(result.end(), bytes, bytes + size);
    }
};

bool overrun = false;

int slots_of(int64_t kernel) { return clr::kernels->kernel(kernel, FLOAT32).slots; }

int64_t count_kernels() {
    int64_t count = 0;
    while (clr::kernels->kernel(count, FLOAT32).name) ++count;
    return count;
}

// Here float16 and masters have averages in float32. Each other format has averages in its dtype.
int64_t average_of(int64_t format) {
    return format == FLOAT16 || format == MASTERS ? int64_t(FLOAT32) : format;
}

void* averages(int64_t i, int64_t format, std::vector<Bytes>& memory) {
    memory.push_back(values(average_of(format), LENGTHS[i], 7 + unsigned(i), false));
    return memory.back().get();
}

Run run(int64_t kernel, int64_t format, int64_t threads, bool wide) {
    Run run;
    const bool masters = format == MASTERS;
    const int64_t dtype = masters ? int64_t(BFLOAT16) : format;
    const int64_t of_rule = masters ? int64_t(FLOAT32) : dtype, extras = slots_of(kernel) + masters;
    const bool counts = kernel >= 2, has_scalar = clr::kernels->kernel(kernel, FLOAT32).factor;
    for (int64_t i = 0; i < TENSORS; ++i) {
        const auto tensor = [&](unsigned seed, int64_t of, bool positive = false) -> void* {
            run.memory.push_back(values(of, LENGTHS[i], seed + unsigned(i), positive));
            return run.memory.back().get();
        };
        clr::Row row = {};
        row.param = tensor(1, dtype);
        if (masters) row.state[slots_of(kernel)] = tensor(9, dtype);
        row.state[extras] = averages(i, format, run.memory);
        row.numel = LENGTHS[i] + (overrun && i == TENSORS - 1);
        row.group = i % GROUPS;
        const bool active = i % 5 != 4;
        run.rows.gradients.push_back(!active ? nullptr : LENGTHS[i] ? tensor(2, dtype) : NO_DATA);
        // A first step may find any bytes in its momentum, and must not use them.
        row.first = kernel == 1 && i % 3 == 0;
        for (int k = 0; k < slots_of(kernel); ++k) row.state[k] = tensor(3 + unsigned(k), of_rule, true);
        if (row.first) {
            run.memory.emplace_back(
                static_cast<unsigned char*>(std::malloc(SIZES[of_rule] * size_t(LENGTHS[i]))),
                std::free);
            row.state[0] = run.memory.back().get();
            // Different bytes for each number of threads; all ones are NaN.
            const size_t size = SIZES[of_rule] * size_t(LENGTHS[i]);
            if (size) std::memset(row.state[0], threads == 1 ? 255 : 1, size);
        }
        for (void** number : {&row.counter, &row.scalar}) {
            if (!(number == &row.counter ? counts : has_scalar)) continue;
            run.memory.emplace_back(static_cast<unsigned char*>(std::calloc(1, wide ? 8 : 4)),
                                    std::free);
            *number = run.memory.back().get();
        }
        run.rows.rows.push_back(row);
    }
    const std::vector<unsigned char> idle = [&] {
        Run copy;
        for (int64_t i = 4; i < TENSORS; i += 5)
            copy.keep(run.rows.rows[size_t(i)].param, SIZES[dtype] * size_t(LENGTHS[i]));
        return copy.result;
    }();

    // Rate, weight decay, shrinking, sign; then the scalars of the rule, in (0, 1) for every rule.
    double scalars[GROUPS * WIDTH];
    for (int64_t g = 0; g < GROUPS; ++g) {
        const double own[WIDTH] = {0.01, g ? 0.1 : 0.0, g ? 0.0 : 0.1, g ? -1.0 : 1.0, 0.9, 0.99, 1e-8, 0};
        std::memcpy(scalars + g * WIDTH, own, sizeof own);
    }
    run.rows.kernel = kernel, run.rows.dtype = dtype;
    run.rows.counter_bits = run.rows.scalar_bits = wide ? 64 : 32;
    run.rows.slot_dtypes.assign(size_t(slots_of(kernel)), of_rule);
    if (masters) run.rows.slot_dtypes.push_back(dtype);
    run.rows.slot_dtypes.push_back(average_of(format));
    run.rows.masters = masters, run.rows.average_slot = extras;
    for (int step = 0; step < 3; ++step) {
        require(sum_of_squares(*clr::kernels, run.rows, int(threads)) > 0, "sums of nothing", kernel,
                dtype);
        // The averages of the first group move in each step; the second group's are copies, once.
        const std::vector<double> weights = {0.25, step == 1 ? 1.0 : 0.0};
        update(*clr::kernels, run.rows, scalars, WIDTH, 0.5, weights, int(threads));
        for (clr::Row& row : run.rows.rows) row.first = 0;
    }

    Run still;
    for (int64_t i = 0; i < TENSORS; ++i) {
        const clr::Row& row = run.rows.rows[size_t(i)];
        const size_t size = SIZES[dtype] * size_t(row.numel);
        run.keep(row.state[extras], SIZES[average_of(format)] * size_t(row.numel));
        if (!run.rows.gradients[size_t(i)]) {
            still.keep(row.param, size);
            continue;
        }
        run.keep(row.param, size);
        for (int k = 0; k < int(extras); ++k)
            run.keep(row.state[k], SIZES[run.rows.slot_dtypes[size_t(k)]] * size_t(row.numel));
        if (counts) run.keep(row.counter, wide ? 8 : 4);
        if (has_scalar) run.keep(row.scalar, wide ? 8 : 4);
    }
    require(still.result == idle, "a row without a gradient moved", kernel, dtype);
    return run;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2 || !use(argv[1])) {
        std::fprintf(stderr, "name a set of kernels\n");
        return 2;
    }
    overrun = argc > 2;
    int runs = 0;
    for (int64_t kernel = 0; kernel < count_kernels(); ++kernel)
        for (int64_t dtype = 0; dtype <= MASTERS; ++dtype)
            for (int wide = 0; wide < (kernel < 2 ? 1 : 2); ++wide) {
                const Run one = run(kernel, dtype, 1, wide), more = run(kernel, dtype, 3, wide);
                require(!one.result.empty(), "nothing done", kernel, dtype);
                require(one.result == more.result, "other bits on threads", kernel, dtype);
                runs += 2;
            }
    for (const int64_t kernel : {int64_t(-1), count_kernels()})
        require(!clr::kernels->kernel(kernel, FLOAT32).update, "an unknown kernel", kernel, FLOAT32);
    require(!clr::kernels->kernel(0, MASTERS + 1).update, "an unknown format", 0, MASTERS + 1);
    std::printf("%d runs\n", runs);
}
