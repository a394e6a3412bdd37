// The write to a cache.
#include <vector>

#include "cache.h"

// Numbers [count] of a row that may be strided, which then are copied.
template <typename T>
inline const T* dense(const T* from, int64_t stride, int64_t count, std::vector<T>& copy) {
    if (stride == 1) return from;
    copy.resize(count);
    for (int64_t d = 0; d < count; d++) copy[d] = from[d * stride];
    return copy.data();
}

// k [Hkv, T, Dk] and v [Hkv, T, Dv] (or null), strided, to slots [T] of cache [slots, Hkv, width].
template <typename T, typename S>
void append(const T* k, const T* v, S* cache, const int64_t* slots, int64_t tokens, int64_t heads, int64_t head_dim_k,
            int64_t head_dim_v, const int64_t (&k_strides)[3], const int64_t (&v_strides)[3], int64_t threads) {
    const int64_t width = head_dim_k + head_dim_v + SCALE_BYTES<T, S>;
    parallel(tokens * heads * width < (1 << 16) ? 1 : threads, tokens, [&](int64_t first, int64_t last) {
        std::vector<T> copies[2];
        for (int64_t t = first; t < last; t++)
            for (int64_t h = 0; h < heads; h++) {
                const T* key = dense(k + h * k_strides[0] + t * k_strides[1], k_strides[2], head_dim_k, copies[0]);
                const T* value = v ? dense(v + h * v_strides[0] + t * v_strides[1], v_strides[2], head_dim_v, copies[1]) : nullptr;
                keep(key, head_dim_k, value, head_dim_v, cache + (slots[t] * heads + h) * width);
            }
    });
}

static void kernel_kv_append(const void* k, const void* v, void* cache, const int64_t* slots, int64_t bytes,
                             int64_t cache_bytes, int64_t tokens, int64_t heads, int64_t head_dim_k, int64_t head_dim_v,
                             int64_t k_head_stride, int64_t k_token_stride, int64_t k_dim_stride, int64_t v_head_stride,
                             int64_t v_token_stride, int64_t v_dim_stride, int64_t threads) {
    by_sizes(bytes, cache_bytes, [&]<typename T, typename S>(T, S) {
        append(static_cast<const T*>(k), static_cast<const T*>(v), static_cast<S*>(cache), slots, tokens, heads, head_dim_k,
               head_dim_v, {k_head_stride, k_token_stride, k_dim_stride}, {v_head_stride, v_token_stride, v_dim_stride}, threads);
    });
}
KERNEL(kv_append)
