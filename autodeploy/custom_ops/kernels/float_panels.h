// Products with panels of bfloat16 on CPUs that multiply nothing but floats: a word of a panel is two floats, an even and an odd column of
// its row. Each sum is one chain over the columns in ascending order, whatever the number of rows, as with the CPU's own products of pairs.
#pragma once

#include "panels.h"

constexpr int FLOAT_DEPTH = 32;              // words of a panel that are written down as floats at a time: 16 KB. Worth it for MANY groups
constexpr int FLOAT_PART = 2 * FLOAT_DEPTH;  // columns of x to such a part

// x as floats. Of many rows a part of all lies together: what a part of a panel is multiplied by is then one stream, and few pages.
struct FloatRows {
    const float* data;
    int64_t row_step, part_step;

    int64_t place(int64_t row, int64_t column) const { return row * row_step + column / FLOAT_PART * part_step + column % FLOAT_PART; }
};

inline FloatRows float_rows(const float* data, int64_t M, int64_t K) {
    if (M <= ROWS) return {data, K, FLOAT_PART};
    return {data, FLOAT_PART, M * FLOAT_PART};
}

// The even columns of a vector of words, or the odd ones.
inline Vec half_of(const char* words, int half) {
    WordVec both;
    memcpy(&both, words, sizeof both);
    return __builtin_bit_cast(Vec, half ? both & 0xffff0000u : both << 16);
}

// What is read and fetched depends on how many groups of rows take turns with a part of a panel: one, two, or MANY.
// sums [M][vectors_at_once] += x [M][2 * words] times a part: its words, or (many groups) the floats in them, [2 * words][64].
// Meanwhile a part of `next` is fetched, and of many groups each fetches the rows of the next one.
template <int M, int GROUPS>
inline void multiply_floats(const float* x, int64_t stride, const char* panel, int64_t words, float* sums, const char* next) {
    constexpr int C = vectors_at_once(M), FETCHED = M == 1 && STREAMS > 1 ? 0 : fetched_by(GROUPS) * C / LINE_VECTORS;
    constexpr bool IS_FLOAT = GROUPS == MANY;
    Vec total[M][C];
    EACH(int m = 0; m < M; m++)
    EACH(int c = 0; c < C; c++) total[m][c] = load(sums + m * WIDTH + c * LANES);
    for (int64_t word = 0; word < words; word++, panel += IS_FLOAT ? 2 * LINE : LINE, next += FETCHED) {
        EACH(int at = 0; at < FETCHED; at += 64) __builtin_prefetch(next + at, 0, 2);
        if (IS_FLOAT) __builtin_prefetch((const char*)(x + M * stride) + word * 64, 0, 3);
        EACH(int half = 0; half < 2; half++) {
            Vec w[C];
            EACH(int c = 0; c < C; c++)
            w[c] = IS_FLOAT ? load((const float*)panel + half * WIDTH + c * LANES) : half_of(panel + c * 4 * LANES, half);
            EACH(int m = 0; m < M; m++) {
                const Vec one = all(x[m * stride + 2 * word + half]);
                EACH(int c = 0; c < C; c++) total[m][c] += one * w[c];
            }
        }
    }
    EACH(int m = 0; m < M; m++)
    EACH(int c = 0; c < C; c++) store(sums + m * WIDTH + c * LANES, total[m][c]);
}

// Words of a panel as floats, [2 * words][64].
inline void write_floats(const char* panel, int64_t words, float* floats) {
    for (int64_t word = 0; word < words; word++, panel += LINE, floats += 2 * WIDTH)
        EACH(int half = 0; half < 2; half++)
        EACH(int c = 0; c < LINE_VECTORS; c++) store(floats + half * WIDTH + c * LANES, half_of(panel + c * 4 * LANES, half));
}

// sums [rows][64] += rows of x, from `first` on, times a panel: `multiply_panel` of what the CPU has no products of.
inline void multiply_float_panel(const FloatRows& x, int64_t first, const char* panel, int64_t rows, int64_t words, float* sums) {
    alignas(64) float floats[2 * FLOAT_DEPTH * WIDTH];
    in_parts(
        panel, rows, words, FLOAT_DEPTH,
        [&](int64_t word, int64_t part, int64_t groups) {
            if (groups >= MANY) write_floats(panel + word * LINE, part, floats);
        },
        [&]<int M, int GROUPS>(int64_t top, int64_t word, int64_t part, int c, const char* next) {
            const char* from = GROUPS == MANY ? (const char*)floats : panel + word * LINE;
            multiply_floats<M, GROUPS>(x.data + x.place(first + top, 2 * word), x.row_step, from + c * LANES * 4, part,
                                       sums + top * WIDTH + c * LANES, next);
        });
}

// sums [count][64] += a row of x times some panels, one behind the other.
inline void multiply_row(const float* x, const char* panels, int64_t count, int64_t words, float* sums) {
    for (int64_t word = 0; word < words; word += TURN)
        for (int64_t panel = 0; panel < count; panel++) {
            const char* from = panels + (panel * words + word) * LINE;
            multiply_floats<1, 1>(x + 2 * word, 0, from, std::min<int64_t>(TURN, words - word), sums + panel * WIDTH, from);
        }
}
