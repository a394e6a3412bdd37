// Linear layers of bfloat16, and tables, with weights in panels. Every output is one chain of sums over k in ascending order, whatever the
// number of rows: a row's result does not depend on the rows beside it.
#include "float_panels.h"

constexpr int SQUARE = 16;  // words in 64 bytes of a row of the weight

// Words [rows][count] of a weight to [count][rows] of a panel, by way of a small square: neither side is read or written in pieces.
static void transpose(const uint32_t* from, int64_t stride, int64_t rows, int64_t count, uint32_t* to) {
    uint32_t in[SQUARE][SQUARE] = {}, out[SQUARE][SQUARE];
    for (int64_t n = 0; n < rows; n++) memcpy(in[n], from + n * stride, count * 4);
    for (int64_t word = 0; word < SQUARE; word++)
        for (int64_t n = 0; n < SQUARE; n++) out[word][n] = in[n][word];
    for (int64_t word = 0; word < count; word++) memcpy(to + word * WIDTH, out[word], rows * 4);
}

// weight [N][words] to panels; zeros where the last one is not full.
static void kernel_pack_panels(const uint32_t* weight, uint32_t* packed, int64_t N, int64_t words, int64_t threads) {
    parallel(threads, (N + WIDTH - 1) / WIDTH, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) {
            uint32_t* to = packed + panel * words * WIDTH;
            const int64_t rows = std::min<int64_t>(WIDTH, N - panel * WIDTH);
            if (rows < WIDTH) memset(to, 0, words * WIDTH * 4);
            for (int64_t top = 0; top < rows; top += SQUARE)
                for (int64_t start = 0; start < words; start += SQUARE)
                    transpose(weight + (panel * WIDTH + top) * words + start, words, std::min<int64_t>(SQUARE, rows - top),
                              std::min<int64_t>(SQUARE, words - start), to + start * WIDTH + top);
        }
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
