// Attention of up to 64 query rows (tokens times the heads of a group) of one request over its keys, some at a time.
#pragma once

#include "attention.h"

constexpr int ROWS = 64;
constexpr int LOW = 4;                                              // of its rows, products of so many or of M::HIGH stay in registers,
constexpr int WIDE = LANES == 16 ? 4 : ROWS % (3 * LANES) ? 2 : 3;  // and so many vectors of each

// out [HIGH, COUNT vectors] = out * factors + a times b. a: units at row * row_step + k * unit_step; b: units [k, b_step];
// no factors: start from zero.
template <class M, int HIGH, int COUNT>
inline void multiply(const typename M::Unit* a, int64_t row_step, int64_t unit_step, const typename M::Unit* b, int64_t b_step,
                     int64_t units, const float* factors, float* out,
                     int64_t out_step) {
    Vec total[HIGH][COUNT];
#pragma GCC unroll 6
    for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) total[r][c] = factors ? load(out + r * out_step + c * LANES) * factors[r] : Vec{};
    for (int64_t k = 0; k < units; k++) {
        typename M::Operand x[COUNT];
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) x[c] = M::load(b + k * b_step + c * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < HIGH; r++) {
            const auto one = M::spread(a[r * row_step + k * unit_step]);
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; c++) total[r][c] = M::dot(total[r][c], one, x[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) store(out + r * out_step + c * LANES, total[r][c]);
}

// The same of as many columns as there are, at most WIDE vectors, rounded up to LANES.
template <class M, int HIGH>
inline void multiply(int64_t columns, const typename M::Unit* a, int64_t row_step, int64_t unit_step, const typename M::Unit* b,
                     int64_t b_step, int64_t units, const float* factors, float* out, int64_t out_step) {
    switch (std::min<int64_t>(WIDE, (columns + LANES - 1) / LANES)) {
        case 1: return multiply<M, HIGH, 1>(a, row_step, unit_step, b, b_step, units, factors, out, out_step);
        case 2: return multiply<M, HIGH, 2>(a, row_step, unit_step, b, b_step, units, factors, out, out_step);
        case 3: return multiply<M, HIGH, 3>(a, row_step, unit_step, b, b_step, units, factors, out, out_step);
        default: return multiply<M, HIGH, WIDE>(a, row_step, unit_step, b, b_step, units, factors, out, out_step);
    }
}

// The same of any number of rows and columns; rows are rounded up, to LOW or to HIGH, but not over a multiple of both.
template <class M>
inline void multiply(int64_t rows, int64_t columns, const typename M::Unit* a, int64_t row_step, int64_t unit_step,
                     const typename M::Unit* b, int64_t b_step, int64_t units, const float* factors, float* out,
                     int64_t out_step) {
    for (int64_t c = 0; c < columns; c += WIDE * LANES)
        for (int64_t r = 0, high; r < rows; r += high) {
            high = rows - r > LOW ? M::HIGH : LOW;
            const auto* left = a + r * row_step;
            const float* factor = factors ? factors + r : nullptr;
            float* to = out + r * out_step + c;
            if (high == LOW) multiply<M, LOW>(columns - c, left, row_step, unit_step, b + c, b_step, units, factor, to, out_step);
            else multiply<M, M::HIGH>(columns - c, left, row_step, unit_step, b + c, b_step, units, factor, to, out_step);
        }
}

template <typename T, typename S>
class Tile {
    using M = Math<T>;
    using Unit = typename M::Unit;
    static constexpr int TOGETHER = M::TOGETHER, KEYS = M::KEYS;
    static_assert(ROWS % M::HIGH % LOW == 0 && KEYS % M::HIGH % LOW == 0);  // no rounding goes over them

    const Call<T, S>& call;
    const int64_t depth, columns;  // units of a key; numbers of a row of the sums
    Unit *q, *keys, *values, *weights;  // [depth, ROWS], [KEYS, depth], [KEYS / TOGETHER, columns], [KEYS / TOGETHER, ROWS]
    float *scores, *sums;               // [KEYS, ROWS], [ROWS, columns]
    float *largest, *sum, *factors, *slopes;  // [ROWS]
    float *key_scales, *value_scales;         // [KEYS]
    int32_t *first_seen, *position;           // [ROWS]
    const S** tokens;                         // [2, KEYS + 1]: of these keys, with room to repeat the last one, and of the next
    int64_t num_rows = 0;

  public:
    static int64_t bytes(const Call<T, S>& call) {
        const int64_t depth = (call.head_dim_k + TOGETHER - 1) / TOGETHER, columns = round_up(call.head_dim_v, M::WIDTH);
        return Scratch::bytes_of<Unit>(depth * ROWS) + Scratch::bytes_of<Unit>(KEYS * depth) +
               Scratch::bytes_of<Unit>(KEYS / TOGETHER * columns) + Scratch::bytes_of<Unit>(KEYS / TOGETHER * ROWS) +
               Scratch::bytes_of<float>(KEYS * ROWS) + Scratch::bytes_of<float>(ROWS * columns) +
               6 * Scratch::bytes_of<float>(ROWS) + 2 * Scratch::bytes_of<float>(KEYS) +
               Scratch::bytes_of<const S*>(2 * (KEYS + 1));
    }

    Tile(const Call<T, S>& call, Scratch& scratch)
        : call(call), depth((call.head_dim_k + TOGETHER - 1) / TOGETHER), columns(round_up(call.head_dim_v, M::WIDTH)) {
        q = scratch.take<Unit>(depth * ROWS);
        keys = scratch.take<Unit>(KEYS * depth);
        values = scratch.take<Unit>(KEYS / TOGETHER * columns);
        weights = scratch.take<Unit>(KEYS / TOGETHER * ROWS);
        scores = scratch.take<float>(KEYS * ROWS);
        sums = scratch.take<float>(ROWS * columns);
        for (float** rows : {&largest, &sum, &factors, &slopes}) *rows = scratch.take<float>(ROWS);
        for (int32_t** rows : {&first_seen, &position}) *rows = scratch.take<int32_t>(ROWS);
        for (float** scales : {&key_scales, &value_scales}) *scales = scratch.take<float>(KEYS);
        tokens = scratch.take<const S*>(2 * (KEYS + 1));
    }

    // Rows [first_row, first_row + count) of a head of the cache, over keys [first, last) of those that they see.
    void run(int64_t request, int64_t kv_head, int64_t first_row, int64_t count, int64_t first, int64_t last) {
        num_rows = count;
        read_queries(request, kv_head, first_row);
        std::fill(sums, sums + ROWS * columns, 0.0f);
        first = std::max<int64_t>(first, first_seen[0]), last = std::min<int64_t>(last, position[num_rows - 1] + 1);
        int64_t start = first, stop = std::min(last, first / KEYS * KEYS + KEYS);
        call.find_tokens(request, start, stop, tokens);
        for (const S **here = tokens, **next = tokens + KEYS + 1; start < last; std::swap(here, next)) {
            const int64_t after = std::min(last, stop + KEYS);
            call.find_tokens(request, stop, after, next);
            prefetch(next, after - stop, kv_head * call.width);
            add_keys(here, start, stop - start, kv_head * call.width);
            start = stop, stop = after;
        }
    }

    Partial row(int64_t i) const { return {largest[i], sum[i], sums + i * columns}; }

  private:
    // Also what each row sees; rows of padding see what the last one sees.
    void read_queries(int64_t request, int64_t kv_head, int64_t first_row) {
        const int64_t before = call.seq_lens[request] - call.new_tokens(request);
        for (int64_t i = 0; i < ROWS; i++) {
            const int64_t row = first_row + std::min(i, num_rows - 1), token = row / call.group();
            const int64_t head = kv_head * call.group() + row % call.group();
            const T* from = call.query(call.cu_seqlens_q[request] + token, head);
            for (int64_t d = 0; d < depth; d++) q[d * ROWS + i] = unit_of(from, d * TOGETHER);
            position[i] = int32_t(before + token);
            first_seen[i] = int32_t(call.first_seen(before + token));
            slopes[i] = call.alibi.numbers ? call.alibi[head] : 0;
            largest[i] = -INFINITE, sum[i] = 0;
        }
    }

    Unit unit_of(const T* query, int64_t d) const {
        if (call.q_dim_stride == 1) return M::unit(query + d, call.head_dim_k - d);
        T some[2] = {query[d * call.q_dim_stride], {}};
        if (d + 1 < call.head_dim_k) some[1] = query[(d + 1) * call.q_dim_stride];
        return M::unit(some, 2);
    }

    void prefetch(const S* const* next, int64_t count, int64_t place) const {
        for (int64_t t = 0; t < count; t++)
            for (int64_t d = 0; d < call.width; d += 64 / sizeof(S)) __builtin_prefetch(next[t] + place + d, 0, 2);
    }

    // Keys at positions start.. and their values, for all rows.
    void add_keys(const S** here, int64_t start, int64_t count, int64_t place) {
        const int64_t units = (count + TOGETHER - 1) / TOGETHER;
        here[count] = here[count - 1];
        copy_keys(here, count, place);
        copy_values(here, units, place + call.values());
        call.find_scales(here, count, place, 0, key_scales);
        call.find_scales(here, count, place, 1, value_scales);
        multiply<M>(count, num_rows, keys, depth, 1, q, ROWS, depth, nullptr, scores, ROWS);
        for (int64_t i = 0; i < num_rows; i += LANES) weigh(i, start, count);
        multiply<M>(num_rows, call.head_dim_v, weights, 1, ROWS, values, columns, units, factors, sums, columns);
    }

    void copy_keys(const S* const* here, int64_t count, int64_t place) {
        for (int64_t t = 0; t < count; t++) {
            const S* from = here[t] + place;
            Unit* to = keys + t * depth;
            int64_t d = 0;
            for (; (d + LANES) * TOGETHER <= call.head_dim_k; d += LANES) {
                const auto some = M::read(from + d * TOGETHER, M::WIDTH);
                memcpy(to + d, &some, sizeof some);
            }
            for (; d < depth; d++) to[d] = M::unit(from + d * TOGETHER, call.head_dim_k - d * TOGETHER);
        }
    }

    void copy_values(const S* const* here, int64_t units, int64_t offset) {
        for (int64_t k = 0; k < units; k++)
            for (int64_t d = 0; d < call.head_dim_v; d += M::WIDTH) {
                typename M::Operand some[TOGETHER];
                M::interleave(here + k * TOGETHER, offset + d, call.head_dim_v - d, some);
                memcpy(values + k * columns + d, some, sizeof some);
            }
    }

    // Scores [count, lanes of rows i..] become weights relative to each row's largest score so far.
    void weigh(int64_t i, int64_t start, int64_t count) {
        IntVec first, last;
        memcpy(&first, first_seen + i, sizeof first);
        memcpy(&last, position + i, sizeof last);
        const bool sees_all = start >= first_seen[ROWS - 1] && start + count - 1 <= position[0];
        const Vec query = __builtin_convertvector(last, Vec), slope = load(slopes + i);
        Vec top = load(largest + i);
        const Vec before = top;
        for (int64_t k = 0; k < count; k++) {
            const int32_t key = int32_t(start + k);
            Vec x = load(scores + k * ROWS + i) * (IS_SCALED<T, S> ? call.scale * key_scales[k] : call.scale);
            if (call.softcap) x = capped(x, call.softcap);
            if (call.alibi.numbers) x += slope * (float(key) - query);
            if (!sees_all) x = ((key >= first) & (key <= last)) ? x : all(-INFINITE);
            store(scores + k * ROWS + i, x);
            top = larger(top, x);
        }
        const Vec base = top == -INFINITE ? Vec{} : top, factor = exp(before - base);
        Vec total = load(sum + i) * factor;
        for (int64_t k = 0; k < count; k += TOGETHER) {
            Vec some[2] = {};
            for (int64_t j = k; j < std::min(k + TOGETHER, count); j++) {
                total += some[j - k] = exp(load(scores + j * ROWS + i) - base);
                if (IS_SCALED<T, S>) some[j - k] *= value_scales[j];
            }
            M::pack(some, weights + k / TOGETHER * ROWS + i);
        }
        store(sum + i, total);
        store(largest + i, top);
        store(factors + i, factor);
    }
};
