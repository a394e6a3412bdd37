// Norms, rotary embedding and gated activations. Everything is computed in float32 and rounded once,
// where it is stored. Strides count numbers; the numbers of a row are neighbours.
#include "cache.h"

constexpr int64_t FEW = 8192;  // numbers for which waking a second thread costs more than it brings

inline int64_t threads_for(int64_t numbers, int64_t threads) { return numbers < FEW && !team ? 1 : threads; }

// Calls body(i, count) for every vector of a row; count is a compile-time constant but in the last, partial one.
using Whole = std::integral_constant<int64_t, LANES>;

template <typename Body>
inline void each_vector(int64_t width, Body body) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) body(i, Whole{});
    if (i < width) body(i, width - i);
}

template <typename T>
inline Vec load(const T* from, Whole) {
    return load(from);
}

// The lanes behind count are zero.
template <typename T>
inline Vec load(const T* from, int64_t count) {
    T part[LANES] = {};
    memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <typename T>
inline void store(T* to, Vec x, Whole) {
    store(to, x);
}

template <typename T>
inline void store(T* to, Vec x, int64_t count) {
    T part[LANES];
    store(part, x);
    memcpy(to, part, count * sizeof(T));
}

// The lanes behind count become zero.
inline Vec front(Vec x, Whole) { return x; }
inline Vec front(Vec x, int64_t count) {
    for (int64_t lane = count; lane < LANES; lane++) x[lane] = 0;
    return x;
}

// x as it is once stored as a T.
inline Vec rounded(const float*, Vec x) { return x; }
inline Vec rounded(const bf16*, Vec x) {
    bf16 part[LANES];
    store(part, x);
    return load(part);
}

template <typename T>
inline float sum_of_squares(const T* x, int64_t width) {
    Vec total{};
    each_vector(width, [&](int64_t i, auto count) {
        const Vec part = load(x + i, count);
        total += part * part;
    });
    return sum(total);
}

template <typename T>
inline void scale_row(const T* x, const T* weight, T* out, int64_t width, float eps, float offset, float squares) {
    const float factor = 1.0f / std::sqrt(squares / width + eps);
    each_vector(width, [&](int64_t i, auto count) {
        const Vec normed = load(x + i, count) * factor;
        store(out + i, weight ? normed * (load(weight + i, count) + offset) : normed, count);
    });
}

// Rows lie in two dims, [outer][inner].
template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t outer, int64_t inner, int64_t width, int64_t x_outer, int64_t x_inner,
              int64_t out_outer, int64_t out_inner, float eps, float offset, int64_t threads) {
    parallel(threads_for(outer * inner * width, threads), outer * inner, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T* from = x + row / inner * x_outer + row % inner * x_inner;
            T* to = out + row / inner * out_outer + row % inner * out_inner;
            scale_row(from, weight, to, width, eps, offset, sum_of_squares(from, width));
        }
    });
}

template <typename T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* total, T* normed, int64_t rows, int64_t width, float eps,
                  float offset, int64_t threads) {
    parallel(threads_for(rows * width, threads), rows, [&](int64_t first, int64_t last) {
        for (int64_t at = first * width; at < last * width; at += width) {
            Vec squares{};
            each_vector(width, [&](int64_t i, auto count) {
                const Vec added = rounded(x, load(x + at + i, count) + load(residual + at + i, count));
                store(total + at + i, added, count);
                squares += added * added;
            });
            scale_row(total + at, weight, normed + at, width, eps, offset, sum(squares));
        }
    });
}

template <typename T>
void layer_norm(const T* x, const T* weight, const T* bias, T* out, int64_t rows, int64_t width, float eps, int64_t threads) {
    parallel(threads_for(rows * width, threads), rows, [&](int64_t first, int64_t last) {
        for (int64_t at = first * width; at < last * width; at += width) {
            Vec total{};
            each_vector(width, [&](int64_t i, auto count) { total += load(x + at + i, count); });
            const float mean = sum(total) / width;
            Vec squares{};
            each_vector(width, [&](int64_t i, auto count) {
                const Vec centred = front(load(x + at + i, count) - mean, count);
                squares += centred * centred;
            });
            const float factor = 1.0f / std::sqrt(sum(squares) / width + eps);
            each_vector(width, [&](int64_t i, auto count) {
                Vec normed = (load(x + at + i, count) - mean) * factor;
                if (weight) normed *= load(weight + i, count);
                if (bias) normed += load(bias + i, count);
                store(out + at + i, normed, count);
            });
        }
    });
}

// Each pair of neighbours (a, b) as (-b, a).
inline Vec turned_pairs(Vec x) {
    Vec turned;
    for (int lane = 0; lane < LANES; lane += 2) turned[lane] = -x[lane + 1], turned[lane + 1] = x[lane];
    return turned;
}

template <typename T>
inline void rope_by_pairs(const T* x, const T* cos, const T* sin, T* out, int64_t width) {
    each_vector(width, [&](int64_t i, auto count) {
        const Vec part = load(x + i, count);
        store(out + i, part * load(cos + i, count) + turned_pairs(part) * load(sin + i, count), count);
    });
}

template <typename T>
inline void rope_by_halves(const T* x, const T* cos, const T* sin, T* out, int64_t width) {
    const int64_t half = width / 2;
    each_vector(half, [&](int64_t i, auto count) {
        const int64_t j = i + half;
        const Vec first = load(x + i, count), second = load(x + j, count);
        store(out + i, first * load(cos + i, count) - second * load(sin + i, count), count);
        store(out + j, second * load(cos + j, count) + first * load(sin + j, count), count);
    });
}

template <typename T>
void rope(const T* x, const T* cos, const T* sin, T* out, int64_t heads, int64_t tokens, int64_t width, int64_t x_head,
          int64_t x_token, int64_t out_head, int64_t out_token, int64_t interleaved, int64_t threads) {
    const auto turn = interleaved ? rope_by_pairs<T> : rope_by_halves<T>;
    parallel(threads_for(heads * tokens * width, threads), tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++)
            for (int64_t h = 0; h < heads; h++)
                turn(x + h * x_head + t * x_token, cos + t * width, sin + t * width, out + h * out_head + t * out_token, width);
    });
}

// Heads of queries, keys and values of tokens, strided: [head][token][number], the numbers of a head neighbours.
template <typename T>
struct Heads {
    const T* numbers;
    int64_t count, head_stride, token_stride;

    const T* row(int64_t head, int64_t token) const { return numbers + head * head_stride + token * token_stride; }
};

// How a head of queries or keys is normed (eps below 0: not at all) and turned.
template <typename T>
struct Turn {
    const T *cos, *sin;
    int64_t width, interleaved;
    float eps, offset;

    void operator()(const T* x, const T* weight, int64_t token, T* out) const {
        T normed[MOST];
        if (eps >= 0) {
            scale_row(x, weight, normed, width, eps, offset, sum_of_squares(x, width));
            x = normed;
        }
        (interleaved ? rope_by_pairs<T> : rope_by_halves<T>)(x, cos + token * width, sin + token * width, out, width);
    }

    static constexpr int64_t MOST = 1024;  // numbers of a head
};

// cache [slots][heads of k][width + width_v, scales]
template <typename T, typename S>
void rope_append(Heads<T> q, Heads<T> k, Heads<T> v, S* cache, const int64_t* slots, const T* q_weight, const T* k_weight, T* out,
                 int64_t out_head, int64_t out_token, int64_t tokens, int64_t width_v, const Turn<T>& turn, int64_t threads) {
    const int64_t rows = q.count + k.count, width = turn.width + width_v + SCALE_BYTES<T, S>;
    parallel(threads_for(tokens * rows * turn.width, threads), tokens * rows, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t t = i / rows, head = i % rows, kv_head = head - q.count;
            if (kv_head < 0) {
                turn(q.row(head, t), q_weight, t, out + head * out_head + t * out_token);
            } else {
                T turned[Turn<T>::MOST];
                turn(k.row(kv_head, t), k_weight, t, turned);
                keep(turned, turn.width, v.row(kv_head, t), width_v, cache + (slots[t] * k.count + kv_head) * width);
            }
        }
    });
}

// The share of a normal distribution below x, to a relative error of 1e-6 on either side: erfc(z) / 2 at z = |x| / sqrt(2), as
// t * exp(-z^2 + polynomial of t) with t = 1 / (1 + z / 2).
inline Vec normal_below(Vec x) {
    const Vec z = (x < 0 ? -x : x) * 0.70710678118654752f;
    const Vec t = 1.0f / (z * 0.5f + 1.0f);
    Vec p = all(0.145856019f);
    for (const float c : {-0.685645418f, 1.16744058f, -0.709498153f, -0.0703099408f, -0.00341415928f, 0.0359522574f, 0.386415951f,
                          0.998651425f, -1.26544852f})
        p = p * t + c;
    const Vec above = t * exp(p - z * z) * 0.5f;
    return x > 0 ? 1.0f - above : above;
}

// In the order of ACTIVATIONS in pointwise.py.
struct Silu {
    static Vec of(Vec x) { return x / (exp(-x) + 1.0f); }
};
struct Gelu {
    static Vec of(Vec x) { return x * normal_below(x); }
};
struct GeluTanh {  // (1 + tanh(u)) / 2 is sigmoid(2 u)
    static Vec of(Vec x) { return x / (exp(x * (x * x * 0.044715f + 1.0f) * -1.5957691216057308f) + 1.0f); }
};
struct Relu {
    static Vec of(Vec x) { return x < 0 ? Vec{} : x; }
};
struct Sigmoid {
    static Vec of(Vec x) { return 1.0f / (exp(-x) + 1.0f); }
};

template <typename T, typename Activation>
void gated(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride,
           int64_t threads) {
    parallel(threads_for(rows * width, threads), rows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            each_vector(width, [&](int64_t i, auto count) {
                const Vec activated = Activation::of(load(gate + row * gate_stride + i, count));
                store(out + row * width + i, activated * load(up + row * up_stride + i, count), count);
            });
    });
}

// What Python calls; bytes is the size of a number: 2 for bfloat16, 4 for float32.

template <typename Function>
inline void by_size(int64_t bytes, Function function) {
    if (bytes == 2) function(bf16{});
    else function(float{});
}

template <typename T>
inline T* as(void* numbers, T) {
    return static_cast<T*>(numbers);
}

static void kernel_rms_norm(void* x, void* weight, void* out, int64_t outer, int64_t inner, int64_t width, int64_t x_outer,
                            int64_t x_inner, int64_t out_outer, int64_t out_inner, float eps, float offset, int64_t bytes,
                            int64_t threads) {
    by_size(bytes, [&](auto kind) {
        rms_norm(as(x, kind), as(weight, kind), as(out, kind), outer, inner, width, x_outer, x_inner, out_outer, out_inner, eps,
                 offset, threads);
    });
}
KERNEL(rms_norm)

static void kernel_add_rms_norm(void* x, void* residual, void* weight, void* total, void* normed, int64_t rows, int64_t width,
                                float eps, float offset, int64_t bytes, int64_t threads) {
    by_size(bytes, [&](auto kind) {
        add_rms_norm(as(x, kind), as(residual, kind), as(weight, kind), as(total, kind), as(normed, kind), rows, width, eps, offset,
                     threads);
    });
}
KERNEL(add_rms_norm)

static void kernel_layer_norm(void* x, void* weight, void* bias, void* out, int64_t rows, int64_t width, float eps,
                              int64_t bytes, int64_t threads) {
    by_size(bytes, [&](auto kind) {
        layer_norm(as(x, kind), as(weight, kind), as(bias, kind), as(out, kind), rows, width, eps, threads);
    });
}
KERNEL(layer_norm)

static void kernel_rope(void* x, void* cos, void* sin, void* out, int64_t heads, int64_t tokens, int64_t width, int64_t x_head,
                        int64_t x_token, int64_t out_head, int64_t out_token, int64_t interleaved, int64_t bytes,
                        int64_t threads) {
    by_size(bytes, [&](auto kind) {
        rope(as(x, kind), as(cos, kind), as(sin, kind), as(out, kind), heads, tokens, width, x_head, x_token, out_head, out_token,
             interleaved, threads);
    });
}
KERNEL(rope)

static void kernel_gated_activation(void* gate, void* up, void* out, int64_t rows, int64_t width, int64_t gate_stride,
                                    int64_t up_stride, int64_t activation, int64_t bytes, int64_t threads) {
    by_size(bytes, [&](auto kind) {
        using T = decltype(kind);
        constexpr decltype(&gated<T, Silu>) functions[] = {gated<T, Silu>, gated<T, Gelu>, gated<T, GeluTanh>, gated<T, Relu>,
                                                           gated<T, Sigmoid>};
        functions[activation](as(gate, kind), as(up, kind), as(out, kind), rows, width, gate_stride, up_stride, threads);
    });
}
KERNEL(gated_activation)

static void kernel_rope_append(void* q, void* k, void* v, void* cache, const int64_t* slots, void* cos, void* sin,
                               void* q_weight, void* k_weight, void* out, int64_t heads, int64_t kv_heads, int64_t tokens,
                               int64_t width, int64_t width_v, int64_t q_head, int64_t q_token, int64_t k_head,
                               int64_t k_token, int64_t v_head, int64_t v_token, int64_t out_head, int64_t out_token,
                               int64_t interleaved, float eps, float offset, int64_t bytes, int64_t cache_bytes,
                               int64_t threads) {
    by_sizes(bytes, cache_bytes, [&]<typename T, typename S>(T kind, S) {
        rope_append<T, S>({as(q, kind), heads, q_head, q_token}, {as(k, kind), kv_heads, k_head, k_token},
                          {as(v, kind), kv_heads, v_head, v_token}, static_cast<S*>(cache), slots, as(q_weight, kind),
                          as(k_weight, kind), as(out, kind), out_head, out_token, tokens, width_v,
                          {as(cos, kind), as(sin, kind), width, interleaved, eps, offset}, threads);
    });
}
KERNEL(rope_append)

// Rows `ids` of x, each of so many bytes.
static void kernel_take_rows(const char* x, const int64_t* ids, char* out, int64_t count, int64_t bytes, int64_t threads) {
    parallel(threads_for(count * bytes, threads), count, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) memcpy(out + i * bytes, x + ids[i] * bytes, bytes);
    });
}
KERNEL(take_rows)
