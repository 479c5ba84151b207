// The entry points that Python calls: one call updates every tensor of every bucket.
//
// No header of torch or Python is needed, so that compiling takes seconds and works anywhere.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "scan.h"
#include "update.h"

namespace clr {
namespace {

// The least size of a piece, but for the last one. With less than one piece for each thread, one
// thread does all.
constexpr int64_t GRAIN = 1 << 12;
// So many elements are worth any number of threads; torch's grain.
constexpr int64_t PARALLEL = 1 << 15;
// Pieces are a multiple of this size, so that two threads never write one cache line.
constexpr int64_t ALIGN = 64;
// Pieces per thread: enough to even out a thread that the system has paused for a while.
constexpr int64_t PIECES = 8;

// Runs body(row, begin, end) over all active rows, cut into pieces of equal size whatever the sizes
// of the tensors, so that a thousand small ones and a single huge one are both balanced.
template <class Body>
void for_pieces(const Row* rows, int64_t count, int threads, const Body& body) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += rows[i].active ? rows[i].numel : 0;
    if (threads <= 1 || total < std::min(threads * GRAIN, PARALLEL)) {
        for (int64_t i = 0; i < count; ++i)
            if (rows[i].active) body(i, int64_t(0), rows[i].numel);
        return;
    }
    std::vector<int64_t> ends(static_cast<size_t>(count));
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        // Rounded up, so that every cut is at the beginning of a cache line's worth of a tensor.
        sum += rows[i].active ? (rows[i].numel + ALIGN - 1) / ALIGN * ALIGN : 0;
        ends[size_t(i)] = sum;
    }
    int64_t piece = (sum + threads * PIECES - 1) / (threads * PIECES);
    piece = std::max<int64_t>((piece + ALIGN - 1) / ALIGN * ALIGN, GRAIN);
    const int64_t pieces = (sum + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t k = 0; k < pieces; ++k) {
        int64_t at = k * piece;
        const int64_t stop = std::min(sum, at + piece);
        int64_t i = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
        while (at < stop) {
            const int64_t start = i ? ends[size_t(i - 1)] : 0;
            if (rows[i].active) {
                const int64_t end = std::min(rows[i].numel, stop - start);
                if (at - start < end) body(i, at - start, end);
            }
            at = ends[size_t(i++)];
        }
    }
}

// Counts a step of the parameter and returns its number; 0 if the rule counts no steps.
double count_step(const Row& row, bool wide) {
    if (!row.counter) return 0;
    return wide ? (*static_cast<double*>(row.counter) += 1)
                : double(*static_cast<float*>(row.counter) += 1);
}

// Multiplies the scalar state of the parameter and returns it; 0 if the rule has none.
double advance_scalar(const Row& row, bool wide, Factor factor, const double* scalars,
                      double number) {
    if (!factor) return 0;
    const double by = factor(scalars, number);
    return wide ? (*static_cast<double*>(row.scalar) *= by)
                : double(*static_cast<float*>(row.scalar) *= float(by));
}

void step(const Kernel& kernel, const Bucket& b, const double* scalars, int64_t width,
          double grad_scale, int threads) {
    const Row* const rows = b.rows;
    const int64_t count = b.count;
    // One rule object per group and step, which most tensors share: a rule may compute two powers.
    std::vector<int64_t> which(static_cast<size_t>(count));
    std::vector<AnyRule> rules;
    int64_t group = -1;
    Step last = {grad_scale, -1, false, 0};
    for (int64_t i = 0; i < count; ++i) {
        if (!rows[i].active) continue;
        const double* const own = scalars + rows[i].group * width;
        const double number = count_step(rows[i], b.wide_counter);
        const double scalar = advance_scalar(rows[i], b.wide_scalar, kernel.factor, own, number);
        const Step now = {grad_scale, number, rows[i].first != 0, scalar};
        if (rows[i].group != group || now.number != last.number || now.first != last.first ||
            now.scalar != last.scalar) {
            group = rows[i].group, last = now;
            rules.emplace_back();
            kernel.build(rules.back(), own, now);
        }
        which[size_t(i)] = int64_t(rules.size()) - 1;
    }
    for_pieces(rows, count, threads, [&](int64_t i, int64_t begin, int64_t end) {
        kernel.update(rules[size_t(which[size_t(i)])], rows[i], begin, end);
    });
}

// Sums run over blocks of this many elements, each in LANES partial sums, always in one order. So
// the result does not depend on the number of threads, and clipped runs resume bit for bit.
constexpr int64_t BLOCK = 1 << 14;
constexpr int LANES = 16;

template <class T> double squares(const Row& row, int64_t begin, int64_t end) {
    const auto* g = static_cast<const typename T::Raw*>(row.grad);
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

template <class T> double sum_of_squares(const Row* rows, int64_t count, int threads) {
    struct Block { int64_t row, begin; };
    std::vector<Block> blocks;
    for (int64_t i = 0; i < count; ++i)
        if (rows[i].active)
            for (int64_t begin = 0; begin < rows[i].numel; begin += BLOCK)
                blocks.push_back({i, begin});
    std::vector<double> sums(blocks.size());
    const int64_t many = int64_t(blocks.size());
    threads = many > 4 ? threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t k = 0; k < many; ++k) {
        const Row& row = rows[blocks[size_t(k)].row];
        const int64_t begin = blocks[size_t(k)].begin;
        sums[size_t(k)] = squares<T>(row, begin, std::min(row.numel, begin + BLOCK));
    }
    double sum = 0;
    for (const double s : sums) sum += s;
    return sum;
}

double sum_of_squares(const Bucket& b, int threads) {
    switch (b.dtype) {
        case FLOAT32: return sum_of_squares<Float32>(b.rows, b.count, threads);
        case FLOAT64: return sum_of_squares<Float64>(b.rows, b.count, threads);
        case BFLOAT16: return sum_of_squares<Bfloat16>(b.rows, b.count, threads);
        default: return sum_of_squares<Float16>(b.rows, b.count, threads);
    }
}

// Whether a step takes longer than giving the GIL away and getting it back.
bool is_long(const View& view) {
    int64_t total = 0;
    for (int64_t b = 0; b < view.count; ++b)
        for (int64_t i = 0; i < view.buckets[b].count; ++i)
            total += view.buckets[b].rows[i].active ? view.buckets[b].rows[i].numel : 0;
    return total >= PARALLEL;
}

}  // namespace
}  // namespace clr

extern "C" {

// Raise it whenever a signature or a layout changes. build.py refuses any other version.
int clr_abi_version() { return 10; }

// The name of a kernel and of a dtype, or null for an unknown number.
const char* clr_kernel_name(int64_t kernel) { return clr::pick(kernel, clr::FLOAT32).name; }
const char* clr_dtype_name(int64_t dtype) {
    switch (dtype) {
        case clr::FLOAT32: return "float32";
        case clr::FLOAT64: return "float64";
        case clr::BFLOAT16: return "bfloat16";
        case clr::FLOAT16: return "float16";
        default: return nullptr;
    }
}

// Returns 1 if the scan can read torch's exchange API. Needs the GIL.
int clr_can_scan(PyObject* capsule) {
    const bool can = clr::exchange_api(capsule) != nullptr;
    PyErr_Clear();
    return can;
}

// Returns an Answer: has anything changed that the plan was built from? If not, the gradients'
// addresses and `active` of the rows are up to date, and a step may follow. An exception during the
// scan (a sparse gradient has no strides) counts as a change. Needs the GIL.
int clr_current(clr::View* view) {
    const clr::Hold hold(*view);
    if (!hold) return hold.is_nested() ? clr::NESTED : clr::BUSY;
    view->ready = 0;
    const clr::Answer answer = clr::scan(*view);
    view->ready = answer == clr::ALL_ACTIVE || answer == clr::SOME_IDLE;
    if (!view->ready) PyErr_Clear();
    return answer;
}

// Updates all active rows of all buckets and their step counters, and lets go of the gradients.
// `counts` is 1 for a step of the schedule, else 0. Needs the GIL. Returns 0; or, before anything
// has changed, 1 for an unknown kernel or dtype, 2 if the rows must be scanned first: no scan has
// found them right, or another thread uses them.
int clr_step(clr::View* view, const double* scalars, int64_t width, double grad_scale,
             int64_t threads, int64_t counts) {
    for (int64_t i = 0; i < view->count; ++i)
        if (!clr::pick(view->buckets[i].kernel, view->buckets[i].dtype).update) return 1;
    const clr::Hold hold(*view);
    if (!hold || !view->ready) return 2;
    {
        const clr::WithoutGil without_gil(clr::is_long(*view));
        for (int64_t i = 0; i < view->count; ++i) {
            const clr::Bucket& b = view->buckets[i];
            if (b.active)
                clr::step(clr::pick(b.kernel, b.dtype), b, scalars, width, grad_scale,
                          int(threads));
        }
    }
    view->ready = 0;
    view->tally[0] += 1;
    view->tally[1] += counts;
    for (int64_t i = 0; i < view->count; ++i) clr::release(view->buckets[i]);
    return 0;
}

// Writes the sum of squares of each bucket's gradients, in double and in a fixed order. Needs the
// GIL. Returns 0, or 2 as clr_step does.
int clr_sums_of_squares(clr::View* view, double* sums, int64_t threads) {
    const clr::Hold hold(*view);
    if (!hold || !view->ready) return 2;
    const clr::WithoutGil without_gil(clr::is_long(*view));
    for (int64_t i = 0; i < view->count; ++i)
        sums[i] = clr::sum_of_squares(view->buckets[i], int(threads));
    return 0;
}

// Rounds floats to 16 bits and back, for the tests.
void clr_round(int64_t dtype, const float* from, float* to, int64_t count) {
    using namespace clr;
    for (int64_t i = 0; i < count; ++i)
        to[i] = dtype == BFLOAT16 ? Bfloat16::load(Bfloat16::store(from[i]))
                                  : Float16::load(Float16::store(from[i]));
}

}  // extern "C"
