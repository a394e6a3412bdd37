// Linear layers whose weights are whole numbers in panels. In sums of whole numbers no order matters: a row's result does not depend on the
// rows beside it. Scales belong to rows of the weight (and to groups of their columns); x is quantized here, each row by itself.
#include "panels.h"

#if defined(__AVX512VNNI__)

// What `linear_bytes` has to add for 128 too much in each number that a row of the weight [N][K] is multiplied with.
static void kernel_corrections(const int8_t* weight, int32_t* corrections, int64_t N, int64_t K, int64_t threads) {
    parallel(threads, N, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < K; k++) sum += weight[n * K + k];
            corrections[n] = -128 * sum;
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

// Calls put(k, mask, numbers) with sixteen x / scale at a time, to nearest; returns their sum.
template <typename Put>
inline int32_t quantize(const bf16* x, int64_t count, float scale, Put put) {
    const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    __m512i total = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += LANES) {
        const __mmask16 mask = count - k >= LANES ? 0xffff : (1u << (count - k)) - 1;
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + k)), 16);
        const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(wide), inverse));
        total = _mm512_add_epi32(total, numbers);
        put(k, mask, numbers);
    }
    return _mm512_reduce_add_epi32(total);
}

// A row of x to BYTES rows of bytes without a sign, the higher ones first; returns what to multiply with.
template <int BYTES>
inline float quantize_row(const bf16* x, int64_t K, uint8_t* q) {
    const float scale = scale_of(x, K, BYTES == 1 ? 127 : 32767);
    quantize(x, K, scale, [&](int64_t k, __mmask16 mask, __m512i numbers) {
        const __m512i positive = _mm512_add_epi32(numbers, _mm512_set1_epi32(BYTES == 1 ? 128 : 32768));
        for (int byte = 0; byte < BYTES; byte++)
            _mm_mask_storeu_epi8(q + byte * K + k, mask, _mm512_cvtepi32_epi8(_mm512_srli_epi32(positive, 8 * (BYTES - 1 - byte))));
    });
    return scale;
}

// Weights of bytes, x of BYTES bytes to a number. The first of them is 128 too much: `corrections` [N], -128 times the sum of a row of the
// weight, make up for it. q [M][BYTES][K] and x_scales [M] are room to work in.
template <int BYTES>
inline void linear_bytes(const bf16* x, uint8_t* q, float* x_scales, const int8_t* packed, const float* scales, const int32_t* corrections,
                         const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K, int64_t threads) {
    in_team(threads, [&] {
        parallel(threads, M, [&](int64_t first, int64_t last) {
            for (int64_t m = first; m < last; m++) x_scales[m] = quantize_row<BYTES>(x + m * K, K, q + m * BYTES * K);
        });
        each_panel(threads, M, N, BLOCK / BYTES, [&](int64_t panel, int64_t top, int64_t rows, int64_t blocks) {
            alignas(64) int32_t sums[BLOCK][WIDTH];
            alignas(64) float results[BLOCK / BYTES][WIDTH];
            memset(sums, 0, rows * BYTES * WIDTH * 4);
            for (int64_t m = 0; m < rows; m++) memcpy(sums[m * BYTES], corrections + panel * WIDTH, WIDTH * 4);
            multiply_panel<ByteDot>((const char*)q + top * BYTES * K, K, (const char*)packed + panel * K * WIDTH, rows * BYTES, K / 4,
                                    depth_of(rows * BYTES, blocks, K / 4), sums[0]);
            for (int64_t m = 0; m < rows; m++)
                for (int64_t n = 0; n < WIDTH; n++) {
                    float total = float(sums[m * BYTES][n]);
                    if (BYTES == 2) total = total * 256 + float(sums[m * BYTES + 1][n]);
                    results[m][n] = total * (scales[panel * WIDTH + n] * x_scales[top + m]);
                }
            write_out(results[0], bias, out + top * N, rows, N, panel);
        });
    });
}

static void kernel_linear_w8a8(const bf16* x, uint8_t* q, float* x_scales, const int8_t* packed, const float* scales,
                               const int32_t* corrections, const bf16* bias, bf16* out, int64_t M, int64_t N, int64_t K,
                               int64_t threads) {
    linear_bytes<1>(x, q, x_scales, packed, scales, corrections, bias, out, M, N, K, threads);
}
KERNEL(linear_w8a8)

static void kernel_linear_w8a16(const bf16* x, uint8_t* q, float* x_scales, const int8_t* packed, const float* scales,
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

inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load16(const bf16* from) { return (__m512)load(from); }

// sums [M][64] += groups [first, last) of rows top.. of x times those of a panel.
template <typename T, int M>
inline void multiply_groups(const Groups& g, int64_t top, int64_t panel, int64_t first, int64_t last, float* sums) {
    const int64_t words = g.words();
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t group = first; group < last; group++) {
        __m512i total[M][4];
        EACH(int m = 0; m < M; m++)
        EACH(int c = 0; c < 4; c++)  // of a row that holds no number the sum may be the least there is
        total[m][c] = _mm512_set1_epi32(g.offsets ? 0 : int32_t(0u - 8u * uint32_t(g.x_sums[(top + m) * g.groups + group])));
        const char* line = g.packed + panel * g.K * (WIDTH / 2) + group * words * LINE;
        const char* x = (const char*)g.q + top * g.K + group * words * 8;
        for (int64_t word = 0; word < words; word++, line += LINE, x += 8) {
            EACH(int c = 0; c < 4; c++) _mm_prefetch(line + 64 * c + AHEAD, _MM_HINT_T1);
            EACH(int half = 0; half < 2; half++) {
                __m512i w[4];
                EACH(int c = 0; c < 4; c++) w[c] = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(line + 64 * c), 4 * half), low);
                EACH(int m = 0; m < M; m++) {
                    const __m512i one = spread_word(x + m * g.K + 4 * half);
                    EACH(int c = 0; c < 4; c++) total[m][c] = _mm512_dpbusd_epi32(total[m][c], w[c], one);
                }
            }
        }
        const int64_t at = (panel * g.groups + group) * WIDTH;
        EACH(int m = 0; m < M; m++) {
            const int64_t here = (top + m) * g.groups + group;
            const __m512 x_scale = _mm512_set1_ps(g.x_scales[here]), x_sum = _mm512_set1_ps(float(g.x_sums[here]));
            EACH(int c = 0; c < 4; c++) {
                __m512 product = _mm512_mul_ps(load16((const T*)g.scales + at + 16 * c), _mm512_cvtepi32_ps(total[m][c]));
                if (g.offsets) product = _mm512_fnmadd_ps(load16((const T*)g.offsets + at + 16 * c), x_sum, product);
                float* to = sums + m * WIDTH + 16 * c;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(product, x_scale, _mm512_loadu_ps(to)));
            }
        }
    }
}

template <typename T, int M = ROWS>
inline void multiply_groups(int64_t rows, const Groups& g, int64_t top, int64_t panel, int64_t first, int64_t last, float* sums) {
    if (rows == M) return multiply_groups<T, M>(g, top, panel, first, last, sums);
    if constexpr (M > 1) multiply_groups<T, M - 1>(rows, g, top, panel, first, last, sums);
}

template <typename T>
inline void multiply_panel(const Groups& g, int64_t top, int64_t rows, int64_t panel, float* sums) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS, depth = tiles == 1 ? g.groups : std::max<int64_t>(1, 512 * g.groups / g.K);
    for (int64_t first = 0; first < g.groups; first += depth)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles, last = std::min(first + depth, g.groups);
            multiply_groups<T>(end - begin, g, top + begin, panel, first, last, sums + begin * WIDTH);
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
                x_sums[i] = quantize(from, size, x_scales[i], [&](int64_t k, __mmask16 mask, __m512i numbers) {
                    _mm_mask_storeu_epi8(q + i * size + k, mask, _mm512_cvtepi32_epi8(numbers));
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
