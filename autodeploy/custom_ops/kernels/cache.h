// What a cache keeps of a head of a token: its numbers as they are, or as bytes with two scales of float behind them, the key's and
// the value's.
#pragma once

#include "common.h"

// T: a number of the model; S: one of the cache.
template <typename T, typename S>
constexpr bool IS_SCALED = !std::is_same_v<T, S>;
template <typename T, typename S>
constexpr int64_t SCALE_BYTES = IS_SCALED<T, S> ? 2 * sizeof(float) : 0;

inline float scale_of(const int8_t* row, int64_t width, int which) {
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

// Numbers [count] as the nearest multiples of their largest over 127, which is returned; infinite ones make it not a number.
template <typename T>
inline float to_bytes(const T* from, int64_t count, int8_t* to) {
    Vec top = {}, zero = {};
    each_padded(from, count, [&](int64_t, Vec x) { top = larger(top, x < 0 ? -x : x), zero += x * 0.0f; });
    const float scale = largest(top) / 127 + sum(zero), divisor = scale > 0 ? scale : 1;
    each_padded(from, count, [&](int64_t i, Vec x) {
        constexpr float ROUNDS = 3 << 22;  // numbers as large as this have no fractions
        const ByteVec bytes = __builtin_convertvector(__builtin_convertvector((x / divisor + ROUNDS) - ROUNDS, IntVec), ByteVec);
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

// Calls run(T, S) with a number of the model, of that many bytes, and one of the cache; one byte is a multiple of a scale.
template <typename Run>
inline void by_sizes(int64_t bytes, int64_t cache_bytes, Run run) {
    if (cache_bytes == 1) bytes == 4 ? run(float{}, int8_t{}) : run(bf16{}, int8_t{});
    else bytes == 4 ? run(float{}, float{}) : run(bf16{}, bf16{});
}
