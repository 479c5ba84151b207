// Updates every tensor of every bucket, and sums the squares of their gradients, on torch's threads.
//
// Nothing here needs the GIL or touches a Python object.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace clr {

// The gradient of a tensor without elements, whose data may be null. No kernel reads the address,
// which is a multiple of 16 like those of aligned gradients.
const void* const NO_DATA = reinterpret_cast<const void*>(16);

// The bytes of a value.
inline int64_t size_of(int64_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

// What all rows of a bucket have in common.
struct Kind {
    int64_t kernel = 0, dtype = 0;              // by number
    int64_t counter_bits = 0, scalar_bits = 0;  // the widths of the states of one element, or 0
    std::vector<int64_t> slot_dtypes;           // by number, in the order of Row::state
    int64_t average_slot = -1;                  // the last slot; -1 for rows without an average
    bool masters = false;                       // whether the slot after the rule's is a rest

    int64_t format() const { return masters ? MASTERS : dtype; }
    bool averages() const { return average_slot >= 0; }
    int64_t average_dtype() const { return slot_dtypes[size_t(average_slot)]; }
};

// Tensors that one kernel updates, a row for each.
struct Rows : Kind {
    std::vector<Row> rows;
    std::vector<const void*> gradients;  // addresses; null for a row without a gradient
    // Whether a backward pass has updated the row, so that its average stays; empty: none.
    std::vector<bool> done;

    int64_t count() const { return int64_t(rows.size()); }
    bool is_done(int64_t i) const { return !done.empty() && done[size_t(i)]; }

    // Takes over one row of others.
    void take(const Rows& from, int64_t i) {
        static_cast<Kind&>(*this) = from;
        rows.assign(1, from.rows[size_t(i)]), gradients.assign(1, from.gradients[size_t(i)]);
    }
};

// The least size of a piece, but for the last one.
constexpr int64_t GRAIN = 1 << 12;
// Several threads work from GRAIN elements for each of them on, and always from this number on, which
// is torch's grain. From it on the GIL is given away, too.
constexpr int64_t PARALLEL = 1 << 15;
// Pieces are a multiple of this size, so that two threads rarely share a cache line.
constexpr int64_t ALIGN = 64;
// Values that are updated and then averaged. While the update runs, the averages come into the caches.
constexpr int64_t TILE = 1 << 10;
// Pieces per thread: enough to even out a thread that the system has paused for a while.
constexpr int64_t PIECES = 8;

// Runs body(row, begin, end) over all rows for which takes(row) holds, cut into pieces of equal size
// whatever the sizes of the tensors, so that a thousand small ones and a single huge one are both
// balanced.
template <class Takes, class Body>
void for_pieces(const Rows& b, int threads, const Takes& takes, const Body& body) {
    const Row* const rows = b.rows.data();
    const int64_t count = b.count();
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += takes(i) ? rows[i].numel : 0;
    if (threads <= 1 || total < std::min(threads * GRAIN, PARALLEL)) {
        for (int64_t i = 0; i < count; ++i)
            if (takes(i)) body(i, int64_t(0), rows[i].numel);
        return;
    }
    std::vector<int64_t> ends(static_cast<size_t>(count));
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        // Rounded up, so that every cut is at the beginning of a cache line's worth of a tensor.
        sum += takes(i) ? (rows[i].numel + ALIGN - 1) / ALIGN * ALIGN : 0;
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
            if (takes(i)) {
                const int64_t end = std::min(rows[i].numel, stop - start);
                if (at - start < end) body(i, at - start, end);
            }
            at = ends[size_t(i++)];
        }
    }
}

// Counts a step of the parameter and returns its number; 0 if the rule counts no steps.
inline double count_step(const Row& row, bool wide) {
    if (!row.counter) return 0;
    return wide ? (*static_cast<double*>(row.counter) += 1)
                : double(*static_cast<float*>(row.counter) += 1);
}

// Multiplies the scalar state of the parameter and returns it; 0 if the rule has none.
inline double advance_scalar(const Row& row, bool wide, const Kernel& kernel, const double* scalars,
                             double number) {
    if (!kernel.factor) return 0;
    const double by = kernel.factor(scalars, number);
    return wide ? (*static_cast<double*>(row.scalar) *= by)
                : double(*static_cast<float*>(row.scalar) *= float(by));
}

// Fetches bytes [begin, end) into the caches, to be written: a hint, on which no result depends.
inline void fetch(void* memory, int64_t begin, int64_t end) {
    constexpr int64_t line = 64;
    char* const bytes = static_cast<char*>(memory);
    for (int64_t at = begin; at < end; at += line) __builtin_prefetch(bytes + at, 1, 2);
}

// Updates all rows with a gradient, and counts their steps. Then moves the averages of all rows, with
// the parameter still in a cache.
//
// `weights` has the weight of the average for each group; 0 for a group whose average stays. It is empty
// if all averages stay.
inline void update(const KernelSet& kernels, const Rows& b, const double* scalars, int64_t width,
                   double grad_scale, const std::vector<double>& weights, int threads) {
    const Kernel kernel = kernels.kernel(b.kernel, b.format());
    const int64_t count = b.count();
    // One rule object per group and step, which most tensors share: a rule may compute two powers.
    std::vector<size_t> which(static_cast<size_t>(count));
    std::vector<AnyRule> rules;
    int64_t group = -1;
    Step last = {grad_scale, -1, false, 0};
    for (size_t i = 0; i < size_t(count); ++i) {
        const Row& row = b.rows[i];
        if (!b.gradients[i]) continue;
        const double* const own = scalars + row.group * width;
        const double number = count_step(row, b.counter_bits == 64);
        const double scalar = advance_scalar(row, b.scalar_bits == 64, kernel, own, number);
        const Step now = {grad_scale, number, row.first != 0, scalar};
        if (row.group != group || now.number != last.number || now.first != last.first ||
            now.scalar != last.scalar) {
            group = row.group, last = now;
            rules.emplace_back();
            kernel.build(rules.back(), own, now);
        }
        which[i] = rules.size() - 1;
    }
    const auto update_values = [&](int64_t i, int64_t begin, int64_t end) {
        kernel.update(rules[which[size_t(i)]], b.rows[size_t(i)], b.gradients[size_t(i)], begin,
                      end);
    };
    const auto is_active = [&](int64_t i) { return b.gradients[size_t(i)] != nullptr; };
    if (!b.averages() || weights.empty()) {
        for_pieces(b, threads, is_active, update_values);
        return;
    }
    const int64_t size = size_of(b.average_dtype());
    const auto weight_of = [&](int64_t i) {
        return b.is_done(i) ? 0 : weights[size_t(b.rows[size_t(i)].group)];
    };
    const auto is_due = [&](int64_t i) { return is_active(i) || weight_of(i) != 0; };
    for_pieces(b, threads, is_due, [&](int64_t i, int64_t begin, int64_t end) {
        const Row& row = b.rows[size_t(i)];
        for (int64_t at = begin; at < end; at += TILE) {
            const int64_t stop = std::min(end, at + TILE);
            const double weight = weight_of(i);
            if (is_active(i)) {
                if (weight) fetch(row.state[b.average_slot], at * size, stop * size);
                update_values(i, at, stop);
            }
            if (weight)
                kernels.average(b.format(), b.average_dtype(), row.param,
                                b.masters ? row.state[kernel.slots] : nullptr,
                                row.state[b.average_slot], at, stop, weight);
        }
    });
}

// A sum that carries the rounding errors of its additions along (Neumaier's), so that the order of the
// terms does not show: a resumed run may have its rows in another order than the run before it.
class Sum {
public:
    void add(double term) {
        const double next = sum_ + term;
        rest_ += std::fabs(sum_) >= std::fabs(term) ? (sum_ - next) + term : (term - next) + sum_;
        sum_ = next;
    }
    // The rest of an infinite sum is NaN.
    double value() const { return std::isfinite(sum_) ? sum_ + rest_ : sum_; }

private:
    double sum_ = 0, rest_ = 0;
};

// Sums run over blocks of this many elements. So the result does not depend on the number of threads,
// and clipped runs resume bit for bit.
constexpr int64_t BLOCK = 1 << 14;
// With more blocks than these, several threads sum.
constexpr int64_t FEW_BLOCKS = 4;

inline double sum_of_squares(const KernelSet& kernels, const Rows& b, int threads) {
    struct Block { size_t row; int64_t begin; };
    std::vector<Block> blocks;
    for (size_t i = 0; i < b.rows.size(); ++i)
        if (b.gradients[i])
            for (int64_t begin = 0; begin < b.rows[i].numel; begin += BLOCK)
                blocks.push_back({i, begin});
    std::vector<double> sums(blocks.size());
    const int64_t many = int64_t(blocks.size());
    threads = many > FEW_BLOCKS ? threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t k = 0; k < many; ++k) {
        const auto [i, begin] = blocks[size_t(k)];
        const int64_t end = std::min(b.rows[i].numel, begin + BLOCK);
        sums[size_t(k)] = kernels.sum_of_squares(b.dtype, b.gradients[i], begin, end);
    }
    Sum sum;
    for (const double each : sums) sum.add(each);
    return sum.value();
}

}  // namespace clr
