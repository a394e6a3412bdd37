// Attention of one new token over a range of keys: the cache keeps all heads of a token together, so whole tokens are streamed.
#pragma once

#include "attention.h"

constexpr int BLOCK = 32;                         // tokens whose scores come before their values; the next ones are prefetched
constexpr int MAX_SLICE = LANES < 8 ? LANES : 8;  // query rows that share each read of a key

// Lane i is the sum of x[i].
template <int STEP = 1>
inline Vec sums(Vec* x) {
    if constexpr (STEP == LANES) {
        return x[0];
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / STEP / 2; i++) {
            const auto [a, b] = exchange<STEP>(x[2 * i], x[2 * i + 1]);
            x[i] = a + b;
        }
        return sums<2 * STEP>(x);
    }
}

// Asks for the tokens of the next block in the order of memory, while those of this one are worked on.
template <typename S>
struct Ahead {
    const S* const* token;
    const S* const* end;
    int64_t width, at = 0;  // numbers of a token, and how many of them have been asked for

    void ask(int64_t count) {
        while (count > 0 && token != end) {
            const int64_t stop = std::min(width, at + count);
            count -= stop - at;
            for (; at < stop; at += 64 / sizeof(S)) __builtin_prefetch(*token + at, 0, 2);
            if (at >= width) token++, at = 0;
        }
    }
};

// One new token of one request over keys [first, last). A slice is ROWS query rows of one head of the cache; rows beyond the
// group are zeros.
template <typename T, typename S, int ROWS>
class DecodeRange {
    using M = Math<T>;
    static constexpr int TOKENS = LANES / ROWS;                     // whose scores are summed at once
    static constexpr int OPERANDS = ROWS > 2 ? 16 / ROWS : 8;       // vectors of values whose sums stay in registers

    const Call<T, S>& call;
    const int64_t first_head, num_heads;   // of the cache
    const int64_t slices, depth, columns;  // of a head of the cache; numbers of a row of q, of the sums
    typename M::Stored* q;                 // [heads * slices, ROWS, depth]
    float* values;                         // [heads * slices, ROWS, columns]
    float *largest, *sum;                  // [heads * slices, ROWS]
    const S** tokens;

  public:
    static int64_t num_slices(const Call<T, S>& call) { return (call.group() + ROWS - 1) / ROWS; }

    static int64_t bytes(const Call<T, S>& call, int64_t num_heads, int64_t range) {
        const int64_t rows = num_heads * num_slices(call) * ROWS;
        return Scratch::bytes_of<typename M::Stored>(rows * round_up(call.head_dim_k, M::WIDTH)) +
               Scratch::bytes_of<float>(rows * round_up(call.head_dim_v, M::WIDTH)) + 2 * Scratch::bytes_of<float>(rows) +
               Scratch::bytes_of<const S*>(range + BLOCK);
    }

    DecodeRange(const Call<T, S>& call, int64_t first_head, int64_t num_heads, Scratch& scratch, int64_t range)
        : call(call), first_head(first_head), num_heads(num_heads), slices(num_slices(call)), depth(round_up(call.head_dim_k, M::WIDTH)),
          columns(round_up(call.head_dim_v, M::WIDTH)) {
        const int64_t rows = num_heads * slices * ROWS;
        q = scratch.take<typename M::Stored>(rows * depth);
        values = scratch.take<float>(rows * columns);
        largest = scratch.take<float>(rows);
        sum = scratch.take<float>(rows);
        tokens = scratch.take<const S*>(range + BLOCK);
    }

    // after: what this thread will work on next, or null.
    void run(int64_t request, int64_t first, int64_t last, const Task* after) {
        const int64_t token = call.cu_seqlens_q[request], position = call.seq_lens[request] - 1;
        const int64_t rows = num_heads * slices * ROWS;
        find_tokens(request, first, last, first_head, tokens);
        const int64_t ahead_of = after ? std::min<int64_t>(BLOCK, after->last - after->first) : 0;
        if (after) find_tokens(after->request, after->first, after->first + ahead_of, after->kv_head, tokens + (last - first));
        const S* const* const end = tokens + (last - first + ahead_of);
        read_queries(token);
        std::fill(values, values + rows * columns, 0.0f);
        std::fill(largest, largest + rows, -INFINITE);
        std::fill(sum, sum + rows, 0.0f);
        for (int64_t start = first; start < last; start += BLOCK) {
            const S** block = tokens + (start - first);
            const int64_t count = std::min<int64_t>(BLOCK, last - start);
            Ahead<S> ahead{block + count, std::min<const S* const*>(block + count + BLOCK, end), num_heads * call.width};
            for (int64_t slice = 0; slice < num_heads * slices; slice++)
                add_block(slice, block, count, start - position, ahead);
        }
    }

    // Of a head of q; 0 is the first of these heads of the cache.
    Partial row(int64_t head) const {
        const int64_t within = head % call.group();
        const int64_t row = (head / call.group() * slices + within / ROWS) * ROWS + within % ROWS;
        return {largest[row], sum[row], values + row * columns};
    }

  private:
    // Of a request, from a head on.
    void find_tokens(int64_t request, int64_t first, int64_t last, int64_t kv_head, const S** found) const {
        call.find_tokens(request, first, last, found);
        for (int64_t i = 0; i < last - first; i++) found[i] += kv_head * call.width;
    }

    int64_t head_of(int64_t slice, int64_t row) const {
        return std::min((first_head + slice / slices) * call.group() + slice % slices * ROWS + row, call.heads - 1);
    }

    void read_queries(int64_t token) {
        memset(q, 0, num_heads * slices * ROWS * depth * sizeof *q);
        for (int64_t head = 0; head < num_heads * call.group(); head++) {
            const int64_t within = head % call.group();
            typename M::Stored* to = q + ((head / call.group() * slices + within / ROWS) * ROWS + within % ROWS) * depth;
            const T* from = call.query(token, first_head * call.group() + head);
            for (int64_t d = 0; d < call.head_dim_k; d++) copy(from[d * call.q_dim_stride], to + d);
        }
    }
    static void copy(T from, T* to) { *to = from; }
    static void copy(bf16 from, float* to) { *to = widen(from); }

    // offset: the position of the first key less that of the query.
    void add_block(int64_t slice, const S* const* block, int64_t count, int64_t offset, Ahead<S>& ahead) {
        const int64_t place = slice / slices * call.width;
        alignas(64) float scores[ROWS * BLOCK];
        alignas(64) typename M::Unit weights[ROWS * BLOCK / M::TOGETHER];
        alignas(64) float key_scales[BLOCK] = {}, value_scales[BLOCK] = {};
        float factors[ROWS];
        call.find_scales(block, count, place, 0, key_scales);
        call.find_scales(block, count, place, 1, value_scales);
        score(q + slice * ROWS * depth, block, count, place, scores, ahead);
        for (int64_t row = 0; row < ROWS; row++) {
            factors[row] = weigh(slice, row, count, offset, key_scales, value_scales, scores + row * BLOCK);
            for (int64_t i = 0; i < BLOCK; i += M::WIDTH)
                M::pack_row(scores + row * BLOCK + i, weights + (row * BLOCK + i) / M::TOGETHER);
        }
        const int64_t together = OPERANDS * LANES;
        int64_t d = 0;
        for (; d + together <= call.head_dim_v; d += together)
            add_values<OPERANDS, true>(slice, block, count, place, d, weights, factors, ahead);
        for (; d < call.head_dim_v; d += M::WIDTH)
            add_values<M::TOGETHER, false>(slice, block, count, place, d, weights, factors, ahead);
    }

    // scores [ROWS, BLOCK] = q [ROWS, depth] times keys.
    void score(const typename M::Stored* rows, const S* const* block, int64_t count, int64_t place, float* scores,
               Ahead<S>& ahead) const {
        for (int64_t t = 0; t < count; t += TOKENS) {
            ahead.ask(TOKENS * SCALE_BYTES<T, S>);
            Vec total[LANES] = {};
            const S* keys[TOKENS];
            for (int i = 0; i < TOKENS; i++) keys[i] = block[std::min(t + i, count - 1)] + place;
            int64_t d = 0;
            for (; d + M::WIDTH <= call.head_dim_k; d += M::WIDTH) {
                ahead.ask(TOKENS * M::WIDTH);
                add_products(rows + d, keys, d, M::WIDTH, total);
            }
            if (d < call.head_dim_k) add_products(rows + d, keys, d, call.head_dim_k - d, total);
            const Vec found = sums(total);
            const auto* lanes = reinterpret_cast<const float*>(&found);
            for (int r = 0; r < ROWS; r++) memcpy(scores + r * BLOCK + t, lanes + r * TOKENS, TOKENS * sizeof(float));
        }
    }

    // total [ROWS, TOKENS] += numbers d.. of q [ROWS, depth], at most WIDTH of them, times those of keys.
    void add_products(const typename M::Stored* rows, const S* const* keys, int64_t d, int64_t count, Vec* total) const {
        typename M::Operand query[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) query[r] = M::load(reinterpret_cast<const typename M::Unit*>(rows + r * depth));
#pragma GCC unroll 16
        for (int i = 0; i < TOKENS; i++) {
            const auto key = M::read(keys[i] + d, count);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) total[r * TOKENS + i] = M::dot(total[r * TOKENS + i], query[r], key);
        }
    }

    // Scores [BLOCK] of one row become weights relative to the largest score so far. Returns the factor of earlier sums.
    float weigh(int64_t slice, int64_t row, int64_t count, int64_t offset, const float* key_scales, const float* value_scales,
                float* scores) {
        const Vec slope = all(call.alibi.numbers ? call.alibi[head_of(slice, row)] : 0);
        Vec peak = all(-INFINITE), total = {};
        for (int32_t i = 0; i < BLOCK; i += LANES) {
            const IntVec index = counting() + i;
            Vec x = load(scores + i) * call.scale;
            if (IS_SCALED<T, S>) x *= load(key_scales + i);
            if (call.softcap) x = capped(x, call.softcap);
            if (call.alibi.numbers) x += slope * __builtin_convertvector(index + int32_t(offset), Vec);
            x = index < int32_t(count) ? x : all(-INFINITE);
            store(scores + i, x);
            peak = larger(peak, x);
        }
        const int64_t index = slice * ROWS + row;
        const float top = std::max(largest[index], ::largest(peak));
        const float factor = largest[index] == top ? 1 : std::exp(largest[index] - top);
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            const Vec weight = exp(load(scores + i) - top);
            store(scores + i, IS_SCALED<T, S> ? weight * load(value_scales + i) : weight);
            total += weight;
        }
        sum[index] = sum[index] * factor + ::sum(total);
        largest[index] = top;
        return factor;
    }

    // Columns d.. of the sums of a slice: times a factor, plus weights [ROWS, BLOCK] times values, which all are there, or not.
    template <int COUNT, bool IS_WHOLE>
    void add_values(int64_t slice, const S* const* block, int64_t count, int64_t place, int64_t d,
                    const typename M::Unit* weights, const float* factors, Ahead<S>& ahead) {
        float* into = values + slice * ROWS * columns + d;
        const int64_t offset = place + call.values() + d, rest = IS_WHOLE ? COUNT * LANES : call.head_dim_v - d;
        Vec total[ROWS][COUNT];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c++) total[r][c] = load(into + r * columns + c * LANES) * factors[r];
        for (int64_t t = 0; t < count; t += M::TOGETHER) {
            ahead.ask(M::TOGETHER * COUNT * LANES);
            const S* pair[] = {block[t], block[std::min(t + 1, count - 1)]};
            typename M::Operand value[COUNT];
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c += M::TOGETHER) M::interleave(pair, offset + c * LANES, rest - c * LANES, value + c);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const auto weight = M::spread(weights[(r * BLOCK + t) / M::TOGETHER]);
#pragma GCC unroll 8
                for (int c = 0; c < COUNT; c++) total[r][c] = M::dot(total[r][c], weight, value[c]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c++) store(into + r * columns + c * LANES, total[r][c]);
    }
};
