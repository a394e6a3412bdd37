// Linear layers of bfloat16, and tables, with weights in panels. Every output is one chain of sums over k in ascending order, whatever the
// number of rows: a row's result does not depend on the rows beside it.
#include "float_panels.h"

constexpr int LINE_ROWS = 16;  // of a weight: their words fill 64 bytes of a panel

// Words [LINE_ROWS][LANES] of a weight to [LANES][LINE_ROWS] of a panel. They are moved as floats, but never computed with.
static void turn(const uint32_t* from, int64_t stride, uint32_t* to) {
    Vec squares[LINE_ROWS];
    EACH(int n = 0; n < LINE_ROWS; n++) squares[n] = load((const float*)(from + n * stride));
    EACH(int first = 0; first < LINE_ROWS; first += LANES) transpose(squares + first);
    EACH(int word = 0; word < LANES; word++)
    EACH(int first = 0; first < LINE_ROWS; first += LANES) stream((float*)(to + word * WIDTH + first), squares[first + word]);
}

// The same for fewer rows and words.
static void turn_some(const uint32_t* from, int64_t stride, int64_t rows, int64_t words, uint32_t* to) {
    for (int64_t word = 0; word < words; word++)
        for (int64_t n = 0; n < rows; n++) to[word * WIDTH + n] = from[n * stride + word];
}

// weight [N][words] to panels, which begin at a multiple of 64 bytes; zeros where the last one is not full.
static void kernel_pack_panels(const uint32_t* weight, uint32_t* packed, int64_t N, int64_t words, int64_t threads) {
    parallel(threads, (N + WIDTH - 1) / WIDTH, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) {
            uint32_t* to = packed + panel * words * WIDTH;
            const int64_t num_rows = std::min<int64_t>(WIDTH, N - panel * WIDTH);
            if (num_rows < WIDTH) memset(to, 0, words * WIDTH * 4);
            for (int64_t top = 0; top < num_rows; top += LINE_ROWS) {
                const uint32_t* from = weight + (panel * WIDTH + top) * words;
                const int64_t rows = std::min<int64_t>(LINE_ROWS, num_rows - top), whole = rows == LINE_ROWS ? words / LANES * LANES : 0;
                for (int64_t start = 0; start < whole; start += LANES) turn(from + start, words, to + start * WIDTH + top);
                turn_some(from + whole, words, rows, words - whole, to + whole * WIDTH + top);
            }
        }
        streamed();
    });
}
KERNEL(pack_panels)

inline void widen_part(const bf16* x, int64_t count, float* wide) {
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) store(wide + k, load(x + k));
    for (; k < count; k++) wide[k] = widen(x[k]);
}

// Rows `ids` of a table of N rows of words.
static void kernel_panel_rows(const int64_t* ids, const uint32_t* packed, uint32_t* out, int64_t T, int64_t words, int64_t threads) {
    parallel(T < 8 ? 1 : threads, T, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            const uint32_t* from = packed + ids[t] / WIDTH * words * WIDTH + ids[t] % WIDTH;
            for (int64_t word = 0; word < words; word++) out[t * words + word] = from[word * WIDTH];
        }
    });
}
KERNEL(panel_rows)

#if !defined(__AVX512BF16__)

// x [K] times a weight in panels, plus bias [N] -> out [N].
static void by_streams(int64_t threads, const float* x, const bf16* packed, const bf16* bias, bf16* out, int64_t N, int64_t K) {
    each_stream(threads, N, [&](int64_t first, int64_t last) {
        alignas(64) float sums[STREAMS * WIDTH] = {};
        multiply_row(x, (const char*)(packed + first * K * WIDTH), last - first, K / 2, sums);
        for (int64_t panel = first; panel < last; panel++) write_out(sums + (panel - first) * WIDTH, bias, out, 1, N, panel);
    });
}

#endif

// x [M][K] times a weight in panels, plus bias [N] -> out [M][N]. wide is room for x as floats, with K rounded up to whole parts, where the
// CPU multiplies nothing else.
static void kernel_linear(const bf16* x, int64_t stride, float* wide, const bf16* packed, const bf16* bias, bf16* out, int64_t M,
                          int64_t N, int64_t K, int64_t threads) {
    in_team(threads, [&] {
#if !defined(__AVX512BF16__)
        const FloatRows floats = float_rows(wide, M, K);
        parallel(threads, M, [&](int64_t first, int64_t last) {
            for (int64_t m = first; m < last; m++)
                for (int64_t k = 0; k < K; k += FLOAT_PART)
                    widen_part(x + m * stride + k, std::min<int64_t>(FLOAT_PART, K - k), wide + floats.place(m, k));
        });
        if (M == 1 && STREAMS > 1) return by_streams(threads, wide, packed, bias, out, N, K);
#endif
        each_panel(threads, M, N, BLOCK, [&](int64_t panel, int64_t top, int64_t rows, int64_t blocks) {
            alignas(64) float sums[BLOCK * WIDTH];
            for (int64_t i = 0; i < rows * WIDTH; i++) sums[i] = 0;
            const char* words = (const char*)(packed + panel * K * WIDTH);
#if defined(__AVX512BF16__)
            multiply_panel<BfloatDot>((const char*)(x + top * stride), 2 * stride, words, rows, K / 2, depth_of(M, blocks, K / 2), sums);
#else
            multiply_float_panel(floats, top, words, rows, K / 2, sums);
#endif
            write_out(sums, bias, out + top * N, rows, N, panel);
        });
    });
}
KERNEL(linear)
