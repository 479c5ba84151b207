// The driver: one call updates every tensor of every bucket, in pieces that threads share.
//
// This file runs on any CPU; it calls the kernels of the chosen instruction set through a table.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "multi_tensor.h"
#include "scan.h"

namespace clr {

#define CLR_POINT_TO(name) &sets::name,
const KernelSet* const kernel_sets[] = {CLR_KERNEL_SETS(CLR_POINT_TO) nullptr};
#undef CLR_POINT_TO

namespace {

const KernelSet* chosen = kernel_sets[0];

// The least size of a piece, but for the last one. With less than one piece for each thread, one
// thread does all.
constexpr int64_t GRAIN = 1 << 12;
// So many elements are worth any number of threads; torch's grain.
constexpr int64_t PARALLEL = 1 << 15;
// Pieces are a multiple of this size, so that two threads never write one cache line.
constexpr int64_t ALIGN = 64;
// Pieces per thread: enough to even out a thread that the system has paused for a while.
constexpr int64_t PIECES = 8;

// The number of values that a step updates.
int64_t size(const Bucket& b) {
    int64_t total = 0;
    for (int64_t i = 0; i < b.count; ++i) total += b.gradients[i] ? b.rows[i].numel : 0;
    return total;
}

// Runs body(row, begin, end) over all rows with a gradient, cut into pieces of equal size whatever
// the sizes of the tensors, so that a thousand small ones and a single huge one are both balanced.
template <class Body>
void for_pieces(const Bucket& b, int threads, const Body& body) {
    const Row* const rows = b.rows;
    const int64_t count = b.count, total = size(b);
    if (threads <= 1 || total < std::min(threads * GRAIN, PARALLEL)) {
        for (int64_t i = 0; i < count; ++i)
            if (b.gradients[i]) body(i, int64_t(0), rows[i].numel);
        return;
    }
    std::vector<int64_t> ends(static_cast<size_t>(count));
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        // Rounded up, so that every cut is at the beginning of a cache line's worth of a tensor.
        sum += b.gradients[i] ? (rows[i].numel + ALIGN - 1) / ALIGN * ALIGN : 0;
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
            if (b.gradients[i]) {
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
        if (!b.gradients[i]) continue;
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
    for_pieces(b, threads, [&](int64_t i, int64_t begin, int64_t end) {
        kernel.update(rules[size_t(which[size_t(i)])], rows[i], b.gradients[i], begin, end);
    });
}

// A sum runs over blocks of this many elements, always in one order. So the result does not depend
// on the number of threads, and clipped runs resume bit for bit.
constexpr int64_t BLOCK = 1 << 14;

double sum_of_squares(const Bucket& b, int threads) {
    struct Block { int64_t row, begin; };
    std::vector<Block> blocks;
    for (int64_t i = 0; i < b.count; ++i)
        if (b.gradients[i])
            for (int64_t begin = 0; begin < b.rows[i].numel; begin += BLOCK)
                blocks.push_back({i, begin});
    std::vector<double> sums(blocks.size());
    const int64_t many = int64_t(blocks.size());
    threads = many > 4 ? threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t k = 0; k < many; ++k) {
        const auto [i, begin] = blocks[size_t(k)];
        const int64_t end = std::min(b.rows[i].numel, begin + BLOCK);
        sums[size_t(k)] = chosen->sum_of_squares(b.dtype, b.gradients[i], begin, end);
    }
    double sum = 0;
    for (const double s : sums) sum += s;
    return sum;
}

// Whether a step takes longer than giving the GIL away and getting it back.
bool is_long(const View& view) {
    int64_t total = 0;
    for (int64_t b = 0; b < view.count; ++b) total += size(view.buckets[b]);
    return total >= PARALLEL;
}

}  // namespace

const KernelSet& kernel_set() { return *chosen; }

bool use(const char* name) {
    for (const KernelSet* const* set = kernel_sets; *set; ++set)
        if (!std::strcmp((*set)->name, name)) {
            chosen = *set;
            return true;
        }
    return false;
}

}  // namespace clr

#define CLR_EXPORT __attribute__((visibility("default")))

extern "C" {

// Returns 1 if the scan can read torch's exchange API. Needs the GIL.
CLR_EXPORT int clr_can_scan(PyObject* capsule) {
    const bool can = clr::exchange_api(capsule) != nullptr;
    PyErr_Clear();
    return can;
}

// Returns an Answer: has anything changed that the plan was built from? If not, the gradients'
// addresses are up to date, and a step may follow. An exception during the
// scan (a sparse gradient has no strides) counts as a change. Needs the GIL.
CLR_EXPORT int clr_current(clr::View* view) {
    const clr::Hold hold(*view);
    if (!hold) return hold.is_nested() ? clr::NESTED : clr::BUSY;
    view->ready = 0;
    const clr::Answer answer = clr::scan(*view);
    view->ready = answer == clr::ALL_ACTIVE || answer == clr::SOME_IDLE;
    if (!view->ready) PyErr_Clear();
    return answer;
}

// Updates all rows with a gradient of all buckets, counts their steps, and lets go of the gradients.
// `counts` is 1 for a step of the schedule, else 0. Needs the GIL. Returns 0; or, before anything
// has changed, 1 for an unknown kernel or dtype, 2 if the rows must be scanned first: no scan has
// found them right, or another thread uses them.
CLR_EXPORT int clr_step(clr::View* view, const double* scalars, int64_t width, double grad_scale,
                        int64_t threads, int64_t counts) {
    for (int64_t i = 0; i < view->count; ++i)
        if (!clr::chosen->kernel(view->buckets[i].kernel, view->buckets[i].dtype).update) return 1;
    const clr::Hold hold(*view);
    if (!hold || !view->ready) return 2;
    {
        const clr::WithoutGil without_gil(clr::is_long(*view));
        for (int64_t i = 0; i < view->count; ++i) {
            const clr::Bucket& b = view->buckets[i];
            if (b.active)
                clr::step(clr::chosen->kernel(b.kernel, b.dtype), b, scalars, width,
                          grad_scale, int(threads));
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
CLR_EXPORT int clr_sums_of_squares(clr::View* view, double* sums, int64_t threads) {
    const clr::Hold hold(*view);
    if (!hold || !view->ready) return 2;
    const clr::WithoutGil without_gil(clr::is_long(*view));
    for (int64_t i = 0; i < view->count; ++i)
        sums[i] = clr::sum_of_squares(view->buckets[i], int(threads));
    return 0;
}

}  // extern "C"
