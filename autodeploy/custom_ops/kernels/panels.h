// Weights in panels of 64 rows (the outputs), made of words of 32 bits: [N / 64][words of a row][64]. A word holds two numbers of 16 bits
// of its row, four of 8 or eight of 4, so that a whole panel is one stream of memory, and each 64 bytes of it are one operand of the CPU's
// dot products of pairs (bf16) or of fours (int8).
#pragma once

#include "common.h"

constexpr int WIDTH = 64;   // outputs of a panel
constexpr int BLOCK = 192;  // rows of x to a task, whole groups
constexpr int ROWS = 6;     // rows of x that are multiplied together
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 24;  // vectors of sums that stay in registers
#else
constexpr int SUMS = 12;
#endif
constexpr int NEAR = 64;          // words after which the next rows get their turn: 16 KB of a panel
constexpr int FAR = 512;          // the same where there are several blocks: 128 KB
constexpr int LINE = WIDTH * 4;   // bytes of a panel to a word of x
constexpr int AHEAD = 64 * LINE;  // bytes from what is read to what is fetched into the second cache
constexpr int LINE_VECTORS = WIDTH / LANES;
// With one row of x: panels that are read in turns, and words of a turn. Zen 3 follows several streams by itself, and reads a quarter more of
// memory that way than from one stream whose lines are fetched by us.
constexpr int STREAMS = LANES == 8 ? 4 : 1, TURN = 2;

// How many vectors of a line have their sums in registers at once, for so many rows.
constexpr int vectors_at_once(int rows) {
    int vectors = LINE_VECTORS;
    while (vectors * rows > SUMS) vectors /= 2;
    return vectors;
}

// Bytes of what comes next that a group of rows fetches for each line of a panel.
constexpr int fetched_by(int groups) { return groups == 1 ? LINE : groups == 2 ? LINE / 2 : LINE / 4; }

// A loop that must be unrolled, for what it counts to lie in registers.
#define EACH(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

// Calls body<rows>(), at most ROWS: what is to be unrolled must be known to the compiler.
template <int M = ROWS, typename Body>
inline void with_rows(int64_t rows, Body body) {
    if (rows == M) body.template operator()<M>();
    else if constexpr (M > 1) with_rows<M - 1>(rows, body);
}

// Walks through a panel, a part of so many words with all rows before the next one, where the sums of a line do not stay in registers. Calls
// prepare(word, words, groups) for each part, then multiply<M, GROUPS>(top, word, words, c, next) for M rows from `top` on and the vectors
// from c on that are taken at once. GROUPS: of rows that take turns with a part, MANY for more; next: what is to be fetched meanwhile.
constexpr int MANY = 3;

template <typename Prepare, typename Multiply>
inline void in_parts(const char* panel, int64_t rows, int64_t words, int64_t most, Prepare prepare, Multiply multiply) {
    const int64_t groups = (rows + ROWS - 1) / ROWS;
    const int64_t depth = groups == 1 && vectors_at_once(int(rows)) == LINE_VECTORS ? words : most;
    const int fetched = fetched_by(int(groups));
    for (int64_t word = 0; word < words; word += depth) {
        const int64_t part = std::min(depth, words - word);
        prepare(word, part, groups);
        for (int64_t group = 0; group < groups; group++) {
            const int64_t top = rows * group / groups, count = rows * (group + 1) / groups - top;
            const char* next = panel + word * LINE + AHEAD + group % (LINE / fetched) * part * fetched;
            with_rows(count, [&]<int M>() {
                for (int c = 0; c < LINE_VECTORS; c += vectors_at_once(M)) {
                    const char* from = next + c * part * fetched / LINE_VECTORS;
                    if (groups == 1) multiply.template operator()<M, 1>(top, word, part, c, from);
                    else if (groups == 2) multiply.template operator()<M, 2>(top, word, part, c, from);
                    else multiply.template operator()<M, MANY>(top, word, part, c, from);
                }
            });
        }
    }
}

#if defined(__AVX512BF16__)

struct BfloatDot {
    using Sum = float;
    using Sums = __m512;
    static __m512 get(const float* from) { return _mm512_loadu_ps(from); }
    static void put(float* to, __m512 sums) { _mm512_storeu_ps(to, sums); }
    static __m512 add(__m512 sums, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)w); }
};

#endif

#if defined(__AVX512VNNI__)

// sums [M][64] += x [M][words] times a panel's part. Half a line of `next` is fetched for each line that is read.
template <typename Dot, int M>
inline void multiply(const char* x, int64_t stride, const char* panel, int64_t words, typename Dot::Sum* sums, const char* next) {
    typename Dot::Sums total[M][4];
    EACH(int m = 0; m < M; m++)
    EACH(int c = 0; c < 4; c++) total[m][c] = Dot::get(sums + m * WIDTH + c * 16);
    for (int64_t word = 0; word < words; word++, panel += LINE, next += LINE / 2) {
        __m512i w[4];
        EACH(int c = 0; c < 4; c++) w[c] = _mm512_loadu_si512(panel + c * 64);
        EACH(int c = 0; c < 2; c++) _mm_prefetch(next + c * 64, _MM_HINT_T1);
        EACH(int m = 0; m < M; m++) {
            int32_t one;
            memcpy(&one, x + m * stride + 4 * word, 4);
            EACH(int c = 0; c < 4; c++) total[m][c] = Dot::add(total[m][c], _mm512_set1_epi32(one), w[c]);
        }
    }
    EACH(int m = 0; m < M; m++)
    EACH(int c = 0; c < 4; c++) Dot::put(sums + m * WIDTH + c * 16, total[m][c]);
}

template <typename Dot>
inline void multiply(int64_t M, const char* x, int64_t stride, const char* panel, int64_t words, typename Dot::Sum* sums,
                     const char* next) {
    switch (M) {
        case 1: return multiply<Dot, 1>(x, stride, panel, words, sums, next);
        case 2: return multiply<Dot, 2>(x, stride, panel, words, sums, next);
        case 3: return multiply<Dot, 3>(x, stride, panel, words, sums, next);
        case 4: return multiply<Dot, 4>(x, stride, panel, words, sums, next);
        case 5: return multiply<Dot, 5>(x, stride, panel, words, sums, next);
        default: return multiply<Dot, 6>(x, stride, panel, words, sums, next);
    }
}

// sums [rows][64] += x [rows] times a panel. The rows are taken in groups of equal size; every other group fetches the other half.
template <typename Dot>
inline void multiply_panel(const char* x, int64_t stride, const char* panel, int64_t rows, int64_t words, int64_t depth,
                           typename Dot::Sum* sums) {
    const int64_t groups = (rows + ROWS - 1) / ROWS;
    for (int64_t word = 0; word < words; word += depth) {
        const int64_t part = std::min(depth, words - word);
        const char* from = panel + word * LINE;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t top = rows * group / groups, bottom = rows * (group + 1) / groups;
            const char* next = from + AHEAD + group % 2 * part * (LINE / 2);
            multiply<Dot>(bottom - top, x + top * stride + 4 * word, stride, from, part, sums + top * WIDTH, next);
        }
    }
}

#endif

// How many words of a panel are taken before the next rows get their turn.
inline int64_t depth_of(int64_t rows, int64_t blocks, int64_t words) { return rows <= ROWS ? words : blocks == 1 ? NEAR : FAR; }

// Calls body(panel, top, rows, blocks) for each panel and each block of M rows: at most so many, and whole groups, but for the last.
template <typename Body>
inline void each_panel(int64_t threads, int64_t M, int64_t N, int64_t most, Body body) {
    const int64_t panels = (N + WIDTH - 1) / WIDTH, groups = (M + ROWS - 1) / ROWS, blocks = (M + most - 1) / most;
    share_out(threads, panels * blocks, [&](int64_t task) {
        const int64_t panel = task % panels, block = task / panels, top = groups * block / blocks * ROWS;
        body(panel, top, std::min(M, groups * (block + 1) / blocks * ROWS) - top, blocks);
    });
}

// Calls body(first, last) for some panels at a time, which are read in turns.
template <typename Body>
inline void each_stream(int64_t threads, int64_t N, Body body) {
    const int64_t panels = (N + WIDTH - 1) / WIDTH, at_once = std::clamp<int64_t>(panels / threads, 1, STREAMS);
    share_out(threads, (panels + at_once - 1) / at_once,
              [&](int64_t task) { body(task * at_once, std::min((task + 1) * at_once, panels)); });
}

// out [rows][N] at a panel's columns = sums [rows][64] + bias.
inline void write_out(float* sums, const bf16* bias, bf16* out, int64_t rows, int64_t N, int64_t panel) {
    const int64_t width = std::min<int64_t>(WIDTH, N - panel * WIDTH);
    for (int64_t m = 0; m < rows; m++) {
        float* row = sums + m * WIDTH;
        bf16* to = out + m * N + panel * WIDTH;
        for (int64_t n = 0; bias && n < width; n++) row[n] += widen(bias[panel * WIDTH + n]);
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES) store(to + n, load(row + n));
        for (; n < width; n++) store_one(to + n, row[n]);
    }
}
