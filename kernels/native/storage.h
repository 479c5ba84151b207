// How values are stored: float32, float64, bfloat16 and float16, and their conversions.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace clr {
// Internal linkage: no code of one instruction set may serve another, see kernels.cpp.
namespace {

// A storage format has the type in memory (Raw), the type of arithmetic (A) and the conversions.
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

// Two 16-bit values at a time have a float's width, so that all lanes of a vector have one width.
// Filling and emptying lanes of two widths would take longer than most rules. The order of the two
// in memory does not matter, since both are treated alike.
struct Bfloat16 {
    using Raw = uint16_t;
    using A = float;
    // Points into an array of Raw, at any multiple of 2 bytes.
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
    // Rounds to nearest, ties to even; NaN stays NaN. The result is the upper half; the lower half
    // holds anything.
    static uint32_t rounded(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        const uint32_t bits = wide + 0x7fffu + ((wide >> 16) & 1u);
        return x != x ? 0x7fc00000u : bits;
    }
};

// Single values are converted by hand, since compilers disagree on the type's name.
struct Float16 {
    using Raw = uint16_t;
    using A = float;
    static A load(Raw bits) {
        const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
        const uint32_t magnitude = bits & 0x7fffu;
        // Subnormals count in units of 2^-24. No value here is a subnormal of float32, which the
        // processor may flush.
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
        // Subnormal results: adding 1/2 aligns the last bit of a float16 with the last bit of a
        // float32, and the addition itself rounds.
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
    // A vector at a time, by the processor's instruction if it has one.
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

// A float32 master in two halves: the master rounded to bfloat16, to nearest and ties away from zero,
// and the lower 16 bits, signed. masters.py has the same formulas.
struct Masters {
    using Raw = uint16_t;
    using A = float;
    static float join(Raw param, Raw rest) {
        const uint32_t magnitude = param & 0x7fffu;
        const int32_t below = int16_t(rest);
        // No master has these pairs: other code has written the parameter.
        const bool is_foreign =
            (magnitude == 0 && below < 0) || (magnitude == 0x7f80u && below > 0);
        const uint32_t bits = (uint32_t(param) << 16) + uint32_t(is_foreign ? 0 : below);
        float master;
        std::memcpy(&master, &bits, 4);
        return master;
    }
    static uint32_t bits_of(float master) {
        uint32_t bits;
        std::memcpy(&bits, &master, 4);
        return master != master ? 0x7fc00000u : bits;
    }
    static Raw param_of(uint32_t bits) { return Raw((bits + 0x8000u) >> 16); }
    static Raw rest_of(uint32_t bits) { return Raw(bits); }
};

}  // namespace
}  // namespace clr
