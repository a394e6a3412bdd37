// Linear layers of bfloat16 with weights in panels of 64 rows: [N / 64][K / 2][64][2], so that a whole panel is one stream of memory
// and each 64 bytes of it are one operand of the CPU's dot product of pairs. Every output is one chain of sums over k in ascending
// order, whatever the number of rows: a row's result does not depend on the rows beside it.
#include "common.h"

constexpr int WIDTH = 64;        // outputs of a panel
constexpr int ROWS = 6;          // rows of x whose sums (6 x 4 vectors) stay in registers
constexpr int BLOCK = 192;       // rows of x to a task
constexpr int NEAR = 64;         // pairs of k after which the next rows get their turn: 16 KB of a panel
constexpr int FAR = 512;         // the same where there are several blocks: 128 KB
constexpr int AHEAD = 8192;      // values from what is read to what is fetched into the second cache
constexpr int LINE = 16;         // pairs in 64 bytes of a row of the weight

// Pairs [rows][pairs] of a weight to [pairs][rows] of a panel, by way of a small square: neither side is read or written in pieces.
static void transpose(const bf16* from, int64_t stride, int64_t rows, int64_t pairs, bf16* to) {
    uint32_t in[LINE][LINE] = {}, out[LINE][LINE];
    for (int64_t n = 0; n < rows; n++) memcpy(in[n], from + n * stride, pairs * 4);
    for (int64_t pair = 0; pair < LINE; pair++)
        for (int64_t n = 0; n < LINE; n++) out[pair][n] = in[n][pair];
    for (int64_t pair = 0; pair < pairs; pair++) memcpy(to + pair * WIDTH * 2, out[pair], rows * 4);
}

EXPORT void autodeploy_pack_linear(const bf16* weight, bf16* packed, int64_t N, int64_t K, int64_t threads) {
    const int64_t pairs = K / 2;
    parallel(threads, (N + WIDTH - 1) / WIDTH, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) {
            bf16* to = packed + panel * pairs * WIDTH * 2;
            const int64_t rows = std::min<int64_t>(WIDTH, N - panel * WIDTH);
            if (rows < WIDTH) memset(to, 0, pairs * WIDTH * 2 * sizeof(bf16));
            for (int64_t top = 0; top < rows; top += LINE)
                for (int64_t start = 0; start < pairs; start += LINE)
                    transpose(weight + (panel * WIDTH + top) * K + 2 * start, K, std::min<int64_t>(LINE, rows - top),
                              std::min<int64_t>(LINE, pairs - start), to + (start * WIDTH + top) * 2);
        }
    });
}

EXPORT void autodeploy_embedding(const int64_t* ids, const bf16* packed, bf16* out, int64_t T, int64_t K, int64_t threads) {
    const int64_t pairs = K / 2;
    parallel(T < 8 ? 1 : threads, T, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            const int64_t id = ids[t];
            const bf16* from = packed + (id / WIDTH * pairs * WIDTH + id % WIDTH) * 2;
            for (int64_t pair = 0; pair < pairs; pair++) memcpy(out + t * K + 2 * pair, from + pair * WIDTH * 2, 2 * sizeof(bf16));
        }
    });
}

RECORDABLE(autodeploy_embedding)

#if defined(__AVX512BF16__)

// sums [M][64] += x [M][2 * pairs] times a panel's part. Two lines of `next` are fetched for each four that are read.
template <int M>
inline void multiply(const bf16* x, int64_t stride, const bf16* panel, int64_t pairs, float* sums, const bf16* next) {
    __m512 total[M][4];
    for (int m = 0; m < M; m++)
        for (int c = 0; c < 4; c++) total[m][c] = _mm512_loadu_ps(sums + m * WIDTH + c * 16);
    for (int64_t pair = 0; pair < pairs; pair++, panel += 2 * WIDTH, next += WIDTH) {
        __m512bh w[4];
        for (int c = 0; c < 4; c++) w[c] = (__m512bh)_mm512_loadu_si512(panel + c * 32);
        for (int c = 0; c < 2; c++) _mm_prefetch((const char*)(next + c * 32), _MM_HINT_T1);
        for (int m = 0; m < M; m++) {
            int32_t two;
            memcpy(&two, x + m * stride + 2 * pair, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            for (int c = 0; c < 4; c++) total[m][c] = _mm512_dpbf16_ps(total[m][c], both, w[c]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(sums + m * WIDTH + c * 16, total[m][c]);
}

inline void multiply(int64_t M, const bf16* x, int64_t stride, const bf16* panel, int64_t pairs, float* sums, const bf16* next) {
    switch (M) {
        case 1: return multiply<1>(x, stride, panel, pairs, sums, next);
        case 2: return multiply<2>(x, stride, panel, pairs, sums, next);
        case 3: return multiply<3>(x, stride, panel, pairs, sums, next);
        case 4: return multiply<4>(x, stride, panel, pairs, sums, next);
        case 5: return multiply<5>(x, stride, panel, pairs, sums, next);
        default: return multiply<6>(x, stride, panel, pairs, sums, next);
    }
}

// sums [rows][64] = x [rows][K] times a panel. The rows are taken in groups of equal size; every other group fetches the other half.
inline void multiply_panel(const bf16* x, int64_t K, int64_t stride, const bf16* panel, int64_t rows, int64_t depth, float* sums) {
    const int64_t pairs = K / 2, groups = (rows + ROWS - 1) / ROWS;
    for (int64_t i = 0; i < rows * WIDTH; i++) sums[i] = 0;
    for (int64_t pair = 0; pair < pairs; pair += depth) {
        const int64_t part = std::min(depth, pairs - pair);
        const bf16* from = panel + pair * 2 * WIDTH;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t top = rows * group / groups, bottom = rows * (group + 1) / groups;
            const bf16* next = from + AHEAD + group % 2 * part * WIDTH;
            multiply(bottom - top, x + top * stride + 2 * pair, stride, from, part, sums + top * WIDTH, next);
        }
    }
}

EXPORT void autodeploy_linear(const bf16* x, int64_t stride, const bf16* packed, const bf16* bias, bf16* out, int64_t M, int64_t N,
                              int64_t K, int64_t threads) {
    const int64_t panels = (N + WIDTH - 1) / WIDTH, blocks = (M + BLOCK - 1) / BLOCK;
    const int64_t depth = M <= ROWS ? K / 2 : blocks == 1 ? NEAR : FAR;
    share_out(threads, panels * blocks, [&](int64_t task) {
        alignas(64) float sums[BLOCK * WIDTH];
        const int64_t panel = task % panels, block = task / panels;
        const int64_t top = M * block / blocks, rows = M * (block + 1) / blocks - top;
        multiply_panel(x + top * stride, K, stride, packed + panel * K * WIDTH, rows, depth, sums);
        const int64_t width = std::min<int64_t>(WIDTH, N - panel * WIDTH);
        for (int64_t m = 0; m < rows; m++) {
            float* row = sums + m * WIDTH;
            bf16* to = out + (top + m) * N + panel * WIDTH;
            for (int64_t n = 0; bias && n < width; n++) row[n] += widen(bias[panel * WIDTH + n]);
            int64_t n = 0;
            for (; n + LANES <= width; n += LANES) store(to + n, load(row + n));
            for (; n < width; n++) store_one(to + n, row[n]);
        }
    });
}
RECORDABLE(autodeploy_linear)

#endif
