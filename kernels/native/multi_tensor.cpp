// One call updates every tensor of a bucket: the driver around the rules of rules.h.
//
// No header of torch or Python is needed, so that compiling takes seconds and works anywhere.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "rules.h"
#include "scan.h"

namespace {

using clr::Row;

// A storage format: what lies in memory, what arithmetic is done in, and the way between the two.
// Kernels read and write memory in units of one or more values.
template <class T> struct Plain {
    using Raw = T;
    using A = T;
    using Unit = T;
    static constexpr int width = 1;
    static A load(Raw x) { return x; }
    static Raw store(A x) { return x; }
    static A first(Unit unit) { return unit; }
    static A second(Unit) { return 0; }
    static Unit pack(A first, A) { return first; }
};
using Float32 = Plain<float>;
using Float64 = Plain<double>;

// Two 16-bit values a time are a float's width: vectors then need no narrower or wider lanes, which
// to fill and empty would take longer than most rules do. Which of the two comes first in memory
// is all the same, since both are treated alike.
struct Bfloat16 {
    using Raw = uint16_t;
    using A = float;
    // Of any parity, and really an array of Raw.
    using Unit __attribute__((may_alias, aligned(2))) = uint32_t;
    static constexpr int width = 2;
    static A load(Raw bits) { return first(bits); }
    static Raw store(A x) { return Raw(rounded(x) >> 16); }
    static A first(uint32_t unit) { return from_bits(unit << 16); }
    static A second(uint32_t unit) { return from_bits(unit & 0xffff0000u); }
    static uint32_t pack(A first, A second) {
        return rounded(first) >> 16 | (rounded(second) & 0xffff0000u);
    }

private:
    static float from_bits(uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    // To nearest, ties to even; NaN stays NaN. In the upper half; the lower holds anything.
    static uint32_t rounded(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        const uint32_t bits = wide + 0x7fffu + ((wide >> 16) & 1u);
        return x != x ? 0x7fc00000u : bits;
    }
};

// One by integer arithmetic, since compilers disagree on the type's name.
struct Float16 {
    using Raw = uint16_t;
    using A = float;
    static A load(Raw bits) {
        const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
        const uint32_t magnitude = bits & 0x7fffu;
        // Subnormals count in units of 2^-24. Nothing here is a subnormal of float32, which the
        // processor may have been told to flush.
        float value = float(int32_t(magnitude)) * 0x1p-24f;
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        // Normal numbers: rebias. Inf and NaN keep an exponent of all ones.
        wide = magnitude < 0x400u ? wide : (magnitude << 13) + (112u << 23);
        wide = (magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : wide) | sign;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    static Raw store(A x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        const uint32_t sign = (wide >> 16) & 0x8000u;
        wide &= 0x7fffffffu;
        // Normal results: rebias and round to nearest, ties to even; a carry may reach infinity.
        const uint32_t normal = (wide + 0xc8000fffu + ((wide >> 13) & 1u)) >> 13;
        // Subnormal ones: adding 1/2 lines the last bit of a float16 up with that of a float32, and
        // the addition itself rounds.
        float magnitude;
        std::memcpy(&magnitude, &wide, 4);
        magnitude += 0.5f;
        uint32_t small;
        std::memcpy(&small, &magnitude, 4);
        small -= 0x3f000000u;
        uint32_t bits = wide < 0x38800000u ? small : normal;
        bits = wide >= 0x47800000u ? 0x7c00u : bits;
        bits = wide > 0x7f800000u ? 0x7e00u : bits;
        return Raw(bits | sign);
    }
    // A vector of them at a time, by the processor's own instruction where it has one.
#if defined(__AVX512F__)
    static constexpr int lanes = 16;
    static void load(const Raw* from, float* to) {
        const auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        _mm512_storeu_ps(to, _mm512_cvtph_ps(bits));
    }
    static void store(const float* from, Raw* to) {
        const auto bits = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
    }
#elif defined(__F16C__)
    static constexpr int lanes = 8;
    static void load(const Raw* from, float* to) {
        const auto bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        _mm256_storeu_ps(to, _mm256_cvtph_ps(bits));
    }
    static void store(const float* from, Raw* to) {
        const auto bits = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
    }
#else
    static constexpr int lanes = 16;
    static void load(const Raw* from, float* to) {
        for (int i = 0; i < lanes; ++i) to[i] = load(from[i]);
    }
    static void store(const float* from, Raw* to) {
        for (int i = 0; i < lanes; ++i) to[i] = store(from[i]);
    }
#endif
};

// A rule object of any class. Only what stands in update() is compiled once per rule and format.
struct alignas(8) AnyRule { unsigned char bytes[112]; };

template <class Rule>
void build(AnyRule& to, const double* scalars, double grad_scale, double step, bool first) {
    static_assert(sizeof(Rule) <= sizeof(AnyRule) && std::is_trivially_copyable<Rule>::value, "");
    const Rule rule(scalars, grad_scale, step, first);
    std::memcpy(&to, &rule, sizeof rule);
}

// Updates the one value at i.
template <class T, class Rule, class Raw>
void update_one(const Rule& r, Raw* p, const Raw* g, Raw* const* s, int64_t i) {
    constexpr int slots = Rule::slots;
    typename T::A param = T::load(p[i]), held[3] = {};
    for (int k = 0; k < slots; ++k) held[k] = T::load(s[k][i]);
    r(param, T::load(g[i]), held[0], held[1], held[2]);
    p[i] = T::store(param);
    for (int k = 0; k < slots; ++k) s[k][i] = T::store(held[k]);
}

// Updates values [begin, end) of a tensor.
template <class T, class Rule> struct Update {
    static void run(const AnyRule& rule, const Row& row, int64_t begin, int64_t end) {
        using A = typename T::A;
        using Raw = typename T::Raw;
        using Unit = typename T::Unit;
        constexpr int width = T::width, slots = Rule::slots;
        Raw* const p = static_cast<Raw*>(row.param) + begin;
        const Raw* const g = static_cast<const Raw*>(row.grad) + begin;
        Raw* s[3] = {};
        for (int k = 0; k < slots; ++k) s[k] = static_cast<Raw*>(row.state[k]) + begin;
        Unit* __restrict pu = reinterpret_cast<Unit*>(p);
        const Unit* __restrict gu = reinterpret_cast<const Unit*>(g);
        Unit* __restrict u0 = reinterpret_cast<Unit*>(s[0]);
        Unit* __restrict u1 = reinterpret_cast<Unit*>(s[1]);
        Unit* __restrict u2 = reinterpret_cast<Unit*>(s[2]);
        // A copy that no store can reach, so that its fields stay in registers.
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

// Vector by vector, for which there is an instruction that compilers do not find by themselves. The
// arrays are such vectors, and stay in registers.
template <class Rule> struct Update<Float16, Rule> {
    static void run(const AnyRule& rule, const Row& row, int64_t begin, int64_t end) {
        using Raw = Float16::Raw;
        constexpr int lanes = Float16::lanes, slots = Rule::slots;
        Raw* const p = static_cast<Raw*>(row.param);
        const Raw* const g = static_cast<const Raw*>(row.grad);
        Raw* s[3] = {};
        for (int k = 0; k < slots; ++k) s[k] = static_cast<Raw*>(row.state[k]);
        const Rule r = *reinterpret_cast<const Rule*>(&rule);
        int64_t i = begin;
        for (; i + lanes <= end; i += lanes) {
            alignas(64) float param[lanes], grad[lanes], s0[lanes], s1[lanes], s2[lanes];
            Float16::load(p + i, param);
            Float16::load(g + i, grad);
            if (slots > 0) Float16::load(s[0] + i, s0);
            if (slots > 1) Float16::load(s[1] + i, s1);
            if (slots > 2) Float16::load(s[2] + i, s2);
#pragma omp simd
            for (int j = 0; j < lanes; ++j) r(param[j], grad[j], s0[j], s1[j], s2[j]);
            Float16::store(param, p + i);
            if (slots > 0) Float16::store(s0, s[0] + i);
            if (slots > 1) Float16::store(s1, s[1] + i);
            if (slots > 2) Float16::store(s2, s[2] + i);
        }
        for (; i < end; ++i) update_one<Float16>(r, p, g, s, i);
    }
};

// No piece is smaller, but the last; with less than one for each thread, one does it all.
constexpr int64_t GRAIN = 1 << 12;
// So many elements are worth any number of threads; torch's own grain.
constexpr int64_t PARALLEL = 1 << 15;
// Pieces are a multiple of this, so that two threads never write one cache line.
constexpr int64_t ALIGN = 64;
// Pieces per thread: enough to even out a thread that the system took away for a while.
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
        // Rounded up, so that a cut through the sum is a cut at a line of some tensor.
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

double counted(const Row& row, bool wide) {
    if (!row.step) return 0;
    return wide ? (*static_cast<double*>(row.step) += 1)
                : double(*static_cast<float*>(row.step) += 1);
}

struct Kernel {
    void (*build)(AnyRule&, const double* scalars, double grad_scale, double step, bool first);
    void (*update)(const AnyRule&, const Row&, int64_t begin, int64_t end);
};

// In step with KERNELS in rules.py.
template <class T> Kernel pick(int64_t kernel) {
    using namespace clr;
    using A = typename T::A;
#define RULE(...) {build<__VA_ARGS__>, Update<T, __VA_ARGS__>::run}
    switch (kernel) {
        case 0: return RULE(Sgd<A, false>);
        case 1: return RULE(Sgd<A, true>);
        case 2: return RULE(Adam<A, false>);
        case 3: return RULE(Adam<A, true>);
        case 4: return RULE(Adagrad<A>);
        case 5: return RULE(Adadelta<A>);
        case 6: return RULE(RmsProp<A, false, false>);
        case 7: return RULE(RmsProp<A, true, false>);
        case 8: return RULE(RmsProp<A, false, true>);
        case 9: return RULE(RmsProp<A, true, true>);
        default: return {nullptr, nullptr};
    }
#undef RULE
}

void step(const Kernel& kernel, Row* rows, int64_t count, const double* scalars, int64_t width,
          double grad_scale, bool wide_counter, int threads) {
    // One rule object per tensor; parameters mostly share group and step, and two powers are dear.
    std::vector<int64_t> which(static_cast<size_t>(count));
    std::vector<AnyRule> rules;
    int64_t group = -1, first = -1;
    double step = -1;
    for (int64_t i = 0; i < count; ++i) {
        if (!rows[i].active) continue;
        const double now = counted(rows[i], wide_counter);
        if (rows[i].group != group || now != step || rows[i].first != first) {
            group = rows[i].group, step = now, first = rows[i].first;
            rules.emplace_back();
            kernel.build(rules.back(), scalars + group * width, grad_scale, step, first != 0);
        }
        which[size_t(i)] = int64_t(rules.size()) - 1;
    }
    for_pieces(rows, count, threads, [&](int64_t i, int64_t begin, int64_t end) {
        kernel.update(rules[size_t(which[size_t(i)])], rows[i], begin, end);
    });
}

// Sums run over blocks of this many elements, each in LANES partial sums, always in one order: the
// result does not depend on the number of threads, or clipped runs would not resume bit for bit.
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

enum Dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// Whether a step takes longer than it costs to give the GIL away and get it back.
bool is_long(const clr::View& view) {
    int64_t total = 0;
    for (int64_t b = 0; b < view.count; ++b)
        for (int64_t i = 0; i < view.buckets[b].count; ++i)
            total += view.buckets[b].rows[i].active ? view.buckets[b].rows[i].numel : 0;
    return total >= PARALLEL;
}

}  // namespace

extern "C" {

// Raised whenever a signature or a layout changes; build.py refuses any other.
int clr_abi_version() { return 9; }

// Updates all active rows of all buckets, and their counters, and lets go of the gradients. Returns
// 0; or, before anything has changed, 1 if a kernel or dtype is unknown, 2 if the rows must be scanned
// first: no scan has found them right, or another thread uses them. `counts` is 1 if this is a step
// of the schedule, else 0. Needs the GIL.
int clr_step(clr::View* view, const double* scalars, int64_t width, double grad_scale,
             int64_t threads, int64_t counts) {
    const auto kernel = [](const clr::Bucket& b) {
        return b.dtype == FLOAT32    ? pick<Float32>(b.kernel)
               : b.dtype == FLOAT64  ? pick<Float64>(b.kernel)
               : b.dtype == BFLOAT16 ? pick<Bfloat16>(b.kernel)
               : b.dtype == FLOAT16  ? pick<Float16>(b.kernel)
                                     : Kernel{nullptr, nullptr};
    };
    for (int64_t i = 0; i < view->count; ++i)
        if (!kernel(view->buckets[i]).update) return 1;
    const clr::Hold hold(*view);
    if (!hold || !view->ready) return 2;
    {
        const clr::Aside aside(is_long(*view));
        for (int64_t i = 0; i < view->count; ++i) {
            const clr::Bucket& b = view->buckets[i];
            if (b.active)
                step(kernel(b), b.rows, b.count, scalars, width, grad_scale, b.wide_counter != 0,
                     int(threads));
        }
    }
    view->ready = 0;
    view->tally[0] += 1;
    view->tally[1] += counts;
    for (int64_t i = 0; i < view->count; ++i) clr::release(view->buckets[i]);
    return 0;
}

// Of each bucket the sum of squares of its active rows' gradients, in double and in a fixed order.
// Returns 0, or 2 as clr_step does. Needs the GIL.
int clr_sums_of_squares(clr::View* view, double* sums, int64_t threads) {
    const clr::Hold hold(*view);
    if (!hold || !view->ready) return 2;
    const clr::Aside aside(is_long(*view));
    for (int64_t i = 0; i < view->count; ++i) {
        const clr::Bucket& b = view->buckets[i];
        const auto over = b.dtype == FLOAT32    ? sum_of_squares<Float32>
                          : b.dtype == FLOAT64  ? sum_of_squares<Float64>
                          : b.dtype == BFLOAT16 ? sum_of_squares<Bfloat16>
                                                : sum_of_squares<Float16>;
        sums[i] = over(b.rows, b.count, int(threads));
    }
    return 0;
}

// 1 if torch's exchange API is one we can read. Needs the GIL.
int clr_can_scan(PyObject* capsule) {
    const bool can = clr::exchange_api(capsule) != nullptr;
    PyErr_Clear();
    return can;
}

// What a scan finds. In step with the answers in plan.py.
enum Answer {
    ALL_ACTIVE = 0,
    SETTINGS_CHANGED = 1,
    SOME_IDLE = 2,  // as it was, but some rows have no gradient
    CHANGED = -1,  // a row: see View::bucket and View::row
    BUSY = -2,  // another thread uses the rows
    GROUPS_CHANGED = -3,
    STATE_CHANGED = -4,
    WOKEN = -5,  // a parameter that was idle has a gradient
    NESTED = -6,  // this very thread uses the rows, and has called itself by way of a finalizer
};

static Answer scan(clr::View& view) {
    // What may run Python code, or give the GIL away, comes before all else.
    for (int64_t b = 0; b < view.count; ++b) clr::release(view.buckets[b]);
    if (!clr::still_idle(view)) return WOKEN;
    const bool every = clr::has_mode(view);
    const auto stops = [&view](int64_t bucket, ptrdiff_t row) {
        view.bucket = bucket, view.row = row;
        return row >= 0;
    };
    for (int64_t b = 0; b < view.count; ++b)
        if (stops(b, clr::ask(view.buckets[b], every))) return CHANGED;
    const clr::NoCollection no_collection;
    if (!clr::same_groups(view)) return GROUPS_CHANGED;
    if (!clr::same_settings(view)) return SETTINGS_CHANGED;
    if (!clr::same_state(view)) return STATE_CHANGED;
    bool all = true;
    for (int64_t b = 0; b < view.count; ++b) {
        clr::Bucket& bucket = view.buckets[b];
        if (stops(b, clr::other_row(bucket, every))) return CHANGED;
        all = all && bucket.active == bucket.count;
    }
    return all ? ALL_ACTIVE : SOME_IDLE;
}

// Whether all that the plan was built from is as it was. If so the rows' gradient pointers and
// `active` are up to date, and a step may follow. An exception on the way (a sparse gradient has no
// strides) means that something changed. Needs the GIL.
int clr_current(clr::View* view) {
    const clr::Hold hold(*view);
    if (!hold) return hold.is_nested() ? NESTED : BUSY;
    view->ready = 0;
    const Answer answer = scan(*view);
    view->ready = answer == ALL_ACTIVE || answer == SOME_IDLE;
    if (!view->ready) PyErr_Clear();
    return answer;
}

// Rounds count floats to 16 bits and back, for the tests.
void clr_round(int64_t dtype, const float* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = dtype == BFLOAT16 ? Bfloat16::load(Bfloat16::store(from[i]))
                                  : Float16::load(Float16::store(from[i]));
}

}  // extern "C"
