// What a cache keeps of a head of a token: its numbers as they are, or as bytes with two scales of float behind them, the key's and
// the value's.
#pragma once

#include "common.h"

// T: a number of the model; S: one of the cache.
template <typename T, typename S>
constexpr bool IS_SCALED = !std::is_same_v<T, S>;
template <typename T, typename S>
constexpr int64_t SCALE_BYTES = IS_SCALED<T, S> ? 2 * sizeof(float) : 0;

// A float of 8 bits: sign, 4 of the exponent and 3 of the mantissa; below 2^-6 multiples of 2^-9.
struct e4m3 {
    uint8_t bits;
};

inline float widen(e4m3 x) {
    const uint32_t size = x.bits & 0x7f, sign = uint32_t(x.bits >> 7) << 31;
    const float wide = size < 8 ? size * 0x1p-9f : __builtin_bit_cast(float, (size << 20) + (120u << 23));
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, wide) | sign);
}

inline Vec load(const e4m3* from) {
    CodeVec codes;
    memcpy(&codes, from, sizeof codes);
    const WordVec wide = resized<WordVec>(codes), size = wide & 0x7f;
    const Vec small = __builtin_convertvector(size, Vec) * 0x1p-9f;
    const WordVec bits = size < 8 ? __builtin_bit_cast(WordVec, small) : (size << 20) + (120u << 23);
    return __builtin_bit_cast(Vec, bits | (wide >> 7) << 31);
}

template <typename S>
inline float scale_of(const S* row, int64_t width, int which) {
    static_assert(sizeof(S) == 1);
    float scale;
    memcpy(&scale, row + width - (2 - which) * sizeof scale, sizeof scale);
    return scale;
}

// Calls body(i, x) with the numbers i.. [LANES] of a row, zeros behind the last one.
template <typename T, typename Body>
inline void each_padded(const T* from, int64_t count, Body body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(i, load(from + i));
    if (i == count) return;
    T some[LANES] = {};
    memcpy(some, from + i, (count - i) * sizeof(T));
    body(i, load(some));
}

// The numbers of a cache of bytes that are nearest, ties to the even one.
inline ByteVec nearest(Vec x, int8_t) {
    return resized<ByteVec>(__builtin_convertvector((x + ROUNDS) - ROUNDS, IntVec));
}

inline CodeVec nearest(Vec x, e4m3) {
    const WordVec bits = __builtin_bit_cast(WordVec, x), size = bits & 0x7fffffff;
    const WordVec few = __builtin_bit_cast(WordVec, __builtin_bit_cast(Vec, size) * 0x1p9f + ROUNDS) & 0xf;
    const WordVec rounded = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
    const WordVec codes = size < (121u << 23) ? few : rounded < 0x7f ? rounded : WordVec{} + 0x7f;
    return resized<CodeVec>(codes | (bits >> 31) << 7);
}

constexpr float largest_of(int8_t) { return 127; }
constexpr float largest_of(e4m3) { return 448; }

// Numbers [count] as the nearest multiples of a scale, which is returned: their largest over that of a cache. Infinite ones make
// it not a number.
template <typename T, typename S>
inline float to_bytes(const T* from, int64_t count, S* to) {
    Vec top = {}, zero = {};
    each_padded(from, count, [&](int64_t, Vec x) { top = larger(top, x < 0 ? -x : x), zero += x * 0.0f; });
    const float scale = largest(top) / largest_of(S{}) + sum(zero), divisor = scale > 0 ? scale : 1;
    each_padded(from, count, [&](int64_t i, Vec x) {
        const auto bytes = nearest(x / divisor, S{});
        memcpy(to + i, &bytes, std::min<int64_t>(LANES, count - i));
    });
    return scale;
}

// Key [head_dim_k] and value [head_dim_v] (or null: the key is both) of a head to its row of the cache.
template <typename T, typename S>
inline void keep(const T* key, int64_t head_dim_k, const T* value, int64_t head_dim_v, S* row) {
    if constexpr (IS_SCALED<T, S>) {
        float scales[2];
        scales[0] = scales[1] = to_bytes(key, head_dim_k, row);
        if (value) scales[1] = to_bytes(value, head_dim_v, row + head_dim_k);
        memcpy(row + head_dim_k + head_dim_v, scales, sizeof scales);
    } else {
        if (row != key) memcpy(row, key, head_dim_k * sizeof(T));
        if (value) memcpy(row + head_dim_k, value, head_dim_v * sizeof(T));
    }
}

// Calls run(T, S) with a number of the model, of that many bytes, and one of the cache: one byte is a multiple of a scale, and so
// is a float of one byte, for which cache_bytes is 0.
template <typename Run>
inline void by_sizes(int64_t bytes, int64_t cache_bytes, Run run) {
    if (cache_bytes == 0) bytes == 4 ? run(float{}, e4m3{}) : run(bf16{}, e4m3{});
    else if (cache_bytes == 1) bytes == 4 ? run(float{}, int8_t{}) : run(bf16{}, int8_t{});
    else bytes == 4 ? run(float{}, float{}) : run(bf16{}, bf16{});
}
