// Linear layers whose weights are whole numbers in panels. In sums of whole numbers no order matters: a row's result does not depend on the
// rows beside it. Scales belong to rows of the weight (and to groups of their columns); x is quantized here, each row by itself.
#include "byte_panels.h"

#if defined(MULTIPLIES_BYTES)

// What `linear_bytes` has to add for what is too much in each code that a row of the weight [N][K] is multiplied with.
static void kernel_corrections(const int8_t* weight, int32_t* corrections, int64_t N, int64_t K, int64_t threads) {
    parallel(threads, N, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < K; k++) sum += weight[n * K + k];
            corrections[n] = -TOO_MUCH * sum;
        }
    });
}
KERNEL(corrections)

// The rows of a table of bytes, as numbers.
static void kernel_byte_rows(const int64_t* ids, const int8_t* packed, const float* scales, bf16* out, int64_t T, int64_t K,
                             int64_t threads) {
    parallel(T < 8 ? 1 : threads, T, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            const int8_t* from = packed + ids[t] / WIDTH * K * WIDTH + ids[t] % WIDTH * 4;
            for (int64_t k = 0; k < K; k++) store_one(out + t * K + k, float(from[k / 4 * LINE + k % 4]) * scales[ids[t]]);
        }
    });
}
KERNEL(byte_rows)

// What x [count] is divided by to lie in [-limit, limit]; 0 where all of it is next to nothing, not a number where one of it is none.
inline float scale_of(const bf16* x, int64_t count, float limit) {
    Vec most{}, bad{};
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        const Vec v = load(x + k);
        most = larger(most, larger(v, -v));
        bad += v * 0.0f;
    }
    float found = largest(most), worse = sum(bad);
    for (; k < count; k++) {
        found = std::max(found, std::abs(widen(x[k])));
        worse += widen(x[k]) * 0.0f;
    }
    return (found > 1e-30f ? found / limit : 0) + worse;
}

// Calls put(k, count, numbers) with some x / scale, to nearest, LANES at a time; returns their sum.
template <typename Put>
inline int32_t quantize(const bf16* x, int64_t count, float scale, Put put) {
    const Vec inverse = all(scale > 0 ? 1 / scale : 0);
    WordVec total{};  // of a row that holds no number they may be the least there is
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        const IntVec numbers = rounded(load(x + k) * inverse);
        total += (WordVec)numbers;
        put(k, LANES, numbers);
    }
    if (k < count) {
        bf16 rest[LANES] = {};
        memcpy(rest, x + k, (count - k) * sizeof *x);
        const IntVec numbers = rounded(load(rest) * inverse);
        total += (WordVec)numbers;
        put(k, count - k, numbers);
    }
    uint32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += total[lane];
    return int32_t(sum);
}

// A row of x, as numbers of BYTES bytes, to its codes, those of higher bytes first; returns what to multiply with. Lower bytes have no sign:
// where codes are bytes, 128 is what is too much in the higher ones alone.
template <int BYTES>
inline float quantize_row(const bf16* x, int64_t K, Code* q) {
    const float scale = scale_of(x, K, BYTES == 1 ? 127 : 32767);
    quantize(x, K, scale, [&](int64_t k, int64_t count, IntVec numbers) {
        put_codes(q + k, codes_of(BYTES) == 1 ? numbers : numbers >> 8, count);
        if (codes_of(BYTES) == 2) put_codes(q + K + k, (numbers & 255) - TOO_MUCH, count);
    });
    return scale;
}

// results [rows][64] of a panel += sums [rows][CODES][64], and at last times their scales.
template <int CODES>
inline void add_sums(const int32_t* sums, int64_t rows, float* results) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < WIDTH; n++) {
            float total = float(sums[m * CODES * WIDTH + n]);
            if (CODES == 2) total = total * 256 + float(sums[(m * CODES + 1) * WIDTH + n]);
            results[m * WIDTH + n] += total;
        }
}

inline void scale_results(float* results, int64_t rows, const float* scales, const float* x_scales) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < WIDTH; n++) results[m * WIDTH + n] *= scales[n] * x_scales[m];
}

// Weights of bytes, x of BYTES bytes to a number. The first of its codes are TOO_MUCH: `corrections` [N], that often less the sum of a row of
// the weight, make up for it. q [M][codes_of(BYTES)][K] and x_scales [M] are room to work in.
template <int BYTES>
inline void linear_bytes(const bf16* x, Code* q, float* x_scales, const int8_t* packed, const float* scales, const int32_t* corrections,
                         const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K, int64_t threads) {
    constexpr int CODES = codes_of(BYTES);
    in_team(threads, [&] {
        parallel(threads, M, [&](int64_t first, int64_t last) {
            for (int64_t m = first; m < last; m++) x_scales[m] = quantize_row<BYTES>(x + m * K, K, q + m * CODES * K);
        });
#if !defined(__AVX512VNNI__)
        if (M == 1 && STREAMS > 1)
            return each_stream(threads, N, [&](int64_t first, int64_t last) {
                alignas(64) float results[STREAMS * WIDTH] = {};
                for (int64_t k = 0; k < K; k += span_of(BYTES)) {
                    alignas(64) int32_t sums[STREAMS * WIDTH] = {};
                    multiply_byte_row(q + k, (const char*)packed + first * K * WIDTH + k * WIDTH, K * WIDTH, last - first,
                                      std::min(K - k, span_of(BYTES)) / 4, sums);
                    add_sums<CODES>(sums, last - first, results);
                }
                for (int64_t panel = first; panel < last; panel++) {
                    float* of_panel = results + (panel - first) * WIDTH;
                    scale_results(of_panel, 1, scales + panel * WIDTH, x_scales);
                    write_out(of_panel, bias, out, 1, N, panel);
                }
            });
#endif
        each_panel(threads, M, N, BLOCK / CODES, [&](int64_t panel, int64_t top, int64_t rows, int64_t blocks) {
            alignas(64) int32_t sums[BLOCK * WIDTH];
            alignas(64) float results[BLOCK / CODES * WIDTH];
            memset(results, 0, rows * WIDTH * 4);
            for (int64_t k = 0; k < K; k += span_of(BYTES)) {
                memset(sums, 0, rows * CODES * WIDTH * 4);
                if (TOO_MUCH)
                    for (int64_t m = 0; m < rows; m++) memcpy(sums + m * CODES * WIDTH, corrections + panel * WIDTH, WIDTH * 4);
                multiply_byte_panel(q + top * CODES * K + k, K, (const char*)packed + (panel * K + k) * WIDTH, rows * CODES,
                                    std::min(K - k, span_of(BYTES)) / 4, depth_of(rows * CODES, blocks, K / 4), sums);
                add_sums<CODES>(sums, rows, results);
            }
            scale_results(results, rows, scales + panel * WIDTH, x_scales + top);
            write_out(results, bias, out + top * N, rows, N, panel);
        });
    });
}

static void kernel_linear_w8a8(const bf16* x, Code* q, float* x_scales, const int8_t* packed, const float* scales,
                               const int32_t* corrections, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K,
                               int64_t threads) {
    linear_bytes<1>(x, q, x_scales, packed, scales, corrections, bias, out, M, N, K, threads);
}
KERNEL(linear_w8a8)

static void kernel_linear_w8a16(const bf16* x, Code* q, float* x_scales, const int8_t* packed, const float* scales,
                                const int32_t* corrections, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K,
                                int64_t threads) {
    linear_bytes<2>(x, q, x_scales, packed, scales, corrections, bias, out, M, N, K, threads);
}
KERNEL(linear_w8a16)

// What a matrix of four bits and the rows of x that it meets are made of. A word of a panel has eight columns: four in the lower halves
// of its bytes, then four in the upper ones.
struct Groups {
    const uint8_t* q;       // [M][K], with a sign
    const float* x_scales;  // [M][groups]
    const int32_t* x_sums;  // [M][groups]
    const char* packed;
    const void* scales;   // [panels][groups][64]
    const void* offsets;  // the same of what a number is too large by, times its scale; null: by 8
    int64_t K, groups;

    int64_t words() const { return K / groups / 8; }
};

// sums [M][64] += groups [first, last) of rows top.. of x times those of a panel.
template <typename T, int M>
inline void multiply_groups(const Groups& g, int64_t top, int64_t panel, int64_t first, int64_t last, float* sums) {
    constexpr int C = vectors_at_once(M);
    const int64_t words = g.words();
    for (int64_t group = first; group < last; group++)
        for (int start = 0; start < LINE_VECTORS; start += C) {
            IntVec total[M][C];
            EACH(int m = 0; m < M; m++)
            EACH(int c = 0; c < C; c++)  // of a row that holds no number the sum may be the least there is
            total[m][c] = (g.offsets ? 0 : int32_t(0u - 8u * uint32_t(g.x_sums[(top + m) * g.groups + group]))) - IntVec{};
            const char* line = g.packed + panel * g.K * (WIDTH / 2) + group * words * LINE + start * LANES * 4;
            const char* x = (const char*)g.q + top * g.K + group * words * 8;
            for (int64_t word = 0; word < words; word++, line += LINE, x += 8) {
                EACH(int at = 0; at < C * LANES * 4; at += 64) __builtin_prefetch(line + at + AHEAD, 0, 2);
                EACH(int c = 0; c < C; c++) {
                    const IntVec w = load_words(line + c * LANES * 4);
                    EACH(int m = 0; m < M; m++)
                    total[m][c] = add_products(total[m][c], w, spread_word(x + m * g.K), spread_word(x + m * g.K + 4));
                }
            }
            const int64_t at = (panel * g.groups + group) * WIDTH + start * LANES;
            EACH(int m = 0; m < M; m++) {
                const int64_t here = (top + m) * g.groups + group;
                EACH(int c = 0; c < C; c++) {
                    Vec product = load((const T*)g.scales + at + c * LANES) * __builtin_convertvector(total[m][c], Vec);
                    if (g.offsets) product = fused(load((const T*)g.offsets + at + c * LANES), all(-float(g.x_sums[here])), product);
                    float* to = sums + m * WIDTH + (start + c) * LANES;
                    store(to, fused(product, all(g.x_scales[here]), load(to)));
                }
            }
        }
}

template <typename T>
inline void multiply_panel(const Groups& g, int64_t top, int64_t rows, int64_t panel, float* sums) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS, depth = tiles == 1 ? g.groups : std::max<int64_t>(1, 512 * g.groups / g.K);
    for (int64_t first = 0; first < g.groups; first += depth)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles, last = std::min(first + depth, g.groups);
            with_rows(end - begin, [&]<int M>() { multiply_groups<T, M>(g, top + begin, panel, first, last, sums + begin * WIDTH); });
        }
}

// Weights of four bits with a scale (float or, where `is_short`, bfloat16) to each group of a row's columns; x of bytes, each group of a
// row with a scale of its own. Where there is an order [K], the columns of the weight are those of x in that order. sorted [M][K], q [M][K],
// x_scales [M][groups] and x_sums [M][groups] are room to work in.
static void kernel_linear_w4a8(const bf16* x, const int32_t* order, bf16* sorted, uint8_t* q, float* x_scales, int32_t* x_sums, const char* packed, const void* scales,
                               const void* offsets, int64_t is_short, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K,
                               int64_t groups, int64_t threads) {
    const Groups g{q, x_scales, x_sums, packed, scales, offsets, K, groups};
    const int64_t size = K / groups;
    in_team(threads, [&] {
        parallel(threads, M * groups, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                const bf16* from = (order ? sorted : x) + i * size;
                if (order) {
                    const bf16* row = x + i / groups * K;
                    for (int64_t k = 0; k < size; k++) sorted[i * size + k] = row[order[i % groups * size + k]];
                }
                x_scales[i] = scale_of(from, size, 127);
                x_sums[i] = quantize(from, size, x_scales[i], [&](int64_t k, int64_t count, IntVec numbers) {
                    const auto bytes = resized<CodeVec>((WordVec)numbers);
                    memcpy(q + i * size + k, &bytes, count);
                });
            }
        });
        each_panel(threads, M, N, BLOCK, [&](int64_t panel, int64_t top, int64_t rows, int64_t) {
            alignas(64) float sums[BLOCK * WIDTH];
            for (int64_t i = 0; i < rows * WIDTH; i++) sums[i] = 0;
            if (is_short)
                multiply_panel<bf16>(g, top, rows, panel, sums);
            else
                multiply_panel<float>(g, top, rows, panel, sums);
            write_out(sums, bias, out + top * N, rows, N, panel);
        });
    });
}
KERNEL(linear_w4a8)

#endif
