// What every kernel shares: numbers of 16 bits, and vectors of floats in whatever width the CPU has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "team.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// One argument of a kernel.
union Word {
    void* p;
    int64_t l;
    float f;

    template <typename T>
    T as() const {
        if constexpr (std::is_pointer_v<T>) return static_cast<T>(p);
        else if constexpr (std::is_same_v<T, float>) return f;
        else return l;
    }
};

template <typename... Args, size_t... i>
inline void call(void (*function)(Args...), const Word* words, std::index_sequence<i...>) {
    function(words[i].as<Args>()...);
}

template <typename... Args>
inline void call(void (*function)(Args...), const Word* words) {
    call(function, words, std::index_sequence_for<Args...>{});
}

// kernel_name() as others see it: all its arguments are in memory, so that one pointer is enough, and a call can be made again.
#define KERNEL(name) \
    EXPORT void autodeploy_##name(const Word* words) { call(kernel_##name, words); }

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// GCC's vector extension: one source for every instruction set.
using Vec = float __attribute__((vector_size(LANES * 4)));
using IntVec = int32_t __attribute__((vector_size(LANES * 4)));
using WordVec = uint32_t __attribute__((vector_size(LANES * 4)));
using HalfVec = uint16_t __attribute__((vector_size(LANES * 2)));
using ByteVec = int8_t __attribute__((vector_size(LANES)));
using CodeVec = uint8_t __attribute__((vector_size(LANES)));

// Whole numbers as ones of another size. GCC 12 takes vectors apart for that, those of bytes into single ones; CPUs need one instruction.
template <typename To, typename From>
inline To resized(From x) {
    constexpr bool FROM_BYTES = sizeof x == LANES, TO_BYTES = sizeof(To) == LANES, HAS_SIGN = std::is_same_v<From, ByteVec>;
#if defined(__AVX512F__)
    if constexpr (HAS_SIGN) return (To)_mm512_cvtepi8_epi32((__m128i)x);
    else if constexpr (FROM_BYTES) return (To)_mm512_cvtepu8_epi32((__m128i)x);
    else if constexpr (sizeof x < sizeof(To)) return (To)_mm512_cvtepu16_epi32((__m256i)x);
    else if constexpr (TO_BYTES) return (To)_mm512_cvtepi32_epi8((__m512i)x);
    else return (To)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    if constexpr (HAS_SIGN) return (To)_mm256_cvtepi8_epi32(_mm_set_epi64x(0, (int64_t)x));
    else if constexpr (FROM_BYTES) return (To)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (int64_t)x));
    else if constexpr (sizeof x < sizeof(To)) return (To)_mm256_cvtepu16_epi32((__m128i)x);
    else return __builtin_convertvector(x, To);
#else
    return __builtin_convertvector(x, To);
#endif
}

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

inline Vec all(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline Vec load(const bf16* from) {
    HalfVec x;
    memcpy(&x, from, sizeof x);
    return __builtin_bit_cast(Vec, resized<WordVec>(x) << 16);
}

inline Vec load(const int8_t* from) {
    ByteVec x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(resized<IntVec>(x), Vec);
}

inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

// Past the caches, to an address that is a multiple of a vector: for whole lines that nobody reads soon. `streamed` must follow, before
// another thread is told of them.
inline void stream(float* to, Vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)x);
#else
    store(to, x);
#endif
}

inline void streamed() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Lanes of a whose number has the bit STEP change places with those of b that are STEP before them.
template <int STEP, int... lane>
inline std::pair<Vec, Vec> exchange(Vec a, Vec b, std::integer_sequence<int, lane...>) {
    return {__builtin_shufflevector(a, b, (lane & STEP ? LANES + lane - STEP : lane)...),
            __builtin_shufflevector(a, b, (lane & STEP ? LANES + lane : lane + STEP)...)};
}

template <int STEP>
inline std::pair<Vec, Vec> exchange(Vec a, Vec b) {
    return exchange<STEP>(a, b, std::make_integer_sequence<int, LANES>{});
}

// Lane i of x[j] becomes lane j of x[i].
template <int STEP = 1>
inline void transpose(Vec* x) {
    if constexpr (STEP < LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & STEP)) std::tie(x[i], x[i + STEP]) = exchange<STEP>(x[i], x[i + STEP]);
        transpose<2 * STEP>(x);
    }
}

// To nearest, ties to even, as torch does; not a number stays one.
inline void store(bf16* to, Vec x) {
    const WordVec bits = __builtin_bit_cast(WordVec, x);
    const WordVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const WordVec quiet = bits | 0x400000;
    const HalfVec half = resized<HalfVec>((x == x ? rounded : quiet) >> 16);
    memcpy(to, &half, sizeof half);
}

template <typename T>
inline void store_one(T* to, float x) {
    if constexpr (sizeof(T) == 4) {
        memcpy(to, &x, 4);
    } else {
        const uint32_t bits = __builtin_bit_cast(uint32_t, x);
        const uint32_t rounded = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
        *to = T{uint16_t(rounded >> 16)};
    }
}

inline float sum(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float largest(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#else
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = std::max(found, x[i]);
    return found;
#endif
}

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float ROUNDS = 3 << 22;  // numbers as large as this have no fractions

// exp of what is at most 88.7, to a relative error of 2e-7: 2^n * 2^f with f in [-1/2, 1/2] by a polynomial; below -87.3 it is 0.
inline Vec exp_of_small(Vec x) {
    const Vec rounded = x * LOG2_E + ROUNDS, n = rounded - ROUNDS;
    const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f}) p = p * f + c;
    const Vec power = __builtin_bit_cast(Vec, (__builtin_bit_cast(WordVec, rounded) + 127) << 23);  // n is in the lowest bits
    return x < -87.3f ? Vec{} : p * power;
}

// 2^x of what is below 128, to a relative error of 2e-7: 2^n * 2^f with f in [-1/2, 1/2] by a polynomial; below -126 it is 0.
inline Vec exp2_of_small(Vec x) {
    const Vec rounded = x + ROUNDS, f = x - (rounded - ROUNDS);
    Vec p = all(1.32647273e-3f);
    for (const float c : {9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f}) p = p * f + c;
    const Vec power = __builtin_bit_cast(Vec, (__builtin_bit_cast(WordVec, rounded) + 127) << 23);  // n is in the lowest bits
    return x < -126.0f ? Vec{} : p * power;
}

inline Vec exp(Vec x) { return x > 88.7f ? all(std::numeric_limits<float>::infinity()) : exp_of_small(x); }
