// Attention of one new token over a range of keys. The cache keeps all heads of a token together, and memory is read in its order:
// a few tokens at a time, their keys and then their values.
#pragma once

#include "attention.h"

constexpr int AHEAD = 32;                                        // tokens that are on their way from memory, at most
constexpr int64_t BYTES_AHEAD = LANES == 8 ? 1 << 15 : 1 << 30;  // and their bytes: few for the small caches of CPUs with AVX2
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

// Asks for tokens in the order of memory, a line at a time, while earlier ones are worked on.
template <typename S>
struct Ahead {
    const S* const* token;
    const int64_t bytes;  // of a token
    const S* const* end = token;
    const char *at = nullptr, *stop = nullptr;

    void fetch() {
        if (at >= stop) {
            if (token == end) return;
            at = reinterpret_cast<const char*>(*token++), stop = at + bytes;
        }
        __builtin_prefetch(at, 0, 2);
        at += 64;
    }
};

// One new token of one request over keys [first, last). A slice is ROWS query rows of one head of the cache; rows beyond the
// group are zeros.
template <typename T, typename S, int ROWS>
class DecodeRange {
    using M = Streamed<T, S>;
    static constexpr int TOKENS = std::min(4, LANES / ROWS), SLICES = LANES / ROWS / TOKENS;  // whose scores are summed at once
    static constexpr int BLOCK = std::max(8, 4 * ROWS);        // tokens whose scores come before their values
    static constexpr int OPERANDS = ROWS > 2 ? 16 / ROWS : 8;  // vectors of values whose sums stay in registers
    static constexpr int LINE = 64 / sizeof(S);                // numbers of a line of memory

    const Call<T, S>& call;
    const int64_t first_head, num_heads;        // of the cache
    const int64_t slices, all;                  // of a head of the cache, of these heads
    const int64_t depth, columns, step;         // numbers of a row of q, of the sums; rows, in whole vectors
    const int64_t token_bytes, num_ahead;       // of these heads; tokens on their way
    typename M::Stored* q;                      // [all, ROWS, depth]
    float* values;                              // [all, ROWS, columns]
    float *largest, *sum, *slopes;              // [step]: score, sum of weights, of alibi
    float* factors;                             // [step]
    float *scores, *key_scales, *value_scales;  // [BLOCK, step]
    typename M::Unit* weights;                  // [BLOCK / TOGETHER, step], in place of the scores
    const S** tokens;

  public:
    static int64_t num_slices(const Call<T, S>& call) { return (call.group() + ROWS - 1) / ROWS; }

    static int64_t bytes(const Call<T, S>& call, int64_t num_heads, int64_t range) {
        const int64_t rows = num_heads * num_slices(call) * ROWS, step = round_up(rows, LANES);
        return Scratch::bytes_of<typename M::Stored>(rows * round_up(call.head_dim_k, M::WIDTH)) +
               Scratch::bytes_of<float>(rows * round_up(call.head_dim_v, M::WIDTH)) + 4 * Scratch::bytes_of<float>(step) +
               3 * Scratch::bytes_of<float>(BLOCK * step) + Scratch::bytes_of<const S*>(range + AHEAD);
    }

    DecodeRange(const Call<T, S>& call, int64_t first_head, int64_t num_heads, Scratch& scratch, int64_t range)
        : call(call), first_head(first_head), num_heads(num_heads), slices(num_slices(call)), all(num_heads * slices),
          depth(round_up(call.head_dim_k, M::WIDTH)), columns(round_up(call.head_dim_v, M::WIDTH)), step(round_up(all * ROWS, LANES)),
          token_bytes(num_heads * call.width * int64_t(sizeof(S))), num_ahead(std::clamp<int64_t>(BYTES_AHEAD / token_bytes, 1, AHEAD)) {
        q = scratch.take<typename M::Stored>(all * ROWS * depth);
        values = scratch.take<float>(all * ROWS * columns);
        for (float** numbers : {&largest, &sum, &slopes, &factors}) *numbers = scratch.take<float>(step);
        for (float** numbers : {&scores, &key_scales, &value_scales}) *numbers = scratch.take<float>(BLOCK * step);
        weights = reinterpret_cast<typename M::Unit*>(scores);
        tokens = scratch.take<const S*>(range + AHEAD);
    }

    // after: what this thread will work on next, or null.
    void run(int64_t request, int64_t first, int64_t last, const Task* after) {
        const int64_t token = call.cu_seqlens_q[request], position = call.seq_lens[request] - 1;
        find_tokens(request, first, last, first_head, tokens);
        const int64_t ahead_of = after ? std::min(num_ahead, after->last - after->first) : 0;
        if (after) find_tokens(after->request, after->first, after->first + ahead_of, after->kv_head, tokens + (last - first));
        const S* const* const end = tokens + (last - first + ahead_of);
        read_queries(token);
        std::fill_n(values, all * ROWS * columns, 0.0f);
        std::fill_n(largest, step, -INFINITE);
        std::fill_n(sum, step, 0.0f);
        if (IS_SCALED<T, S>) std::fill_n(key_scales, BLOCK * step, 0.0f), std::fill_n(value_scales, BLOCK * step, 0.0f);
        Ahead<S> ahead{std::min<const S* const*>(tokens + num_ahead, end), token_bytes};
        for (int64_t start = first; start < last; start += BLOCK) {
            const S** block = tokens + (start - first);
            const int64_t count = std::min<int64_t>(BLOCK, last - start);
            ahead.end = std::min<const S* const*>(block + count + num_ahead, end);
            add_block(block, count, start - position, ahead);
        }
        for (int64_t row = 0; row < all * ROWS; row++) M::in_order(values + row * columns, columns);
    }

    // Of a head of q; 0 is the first of these heads of the cache.
    Partial row(int64_t head) const {
        const int64_t row = row_of(head);
        return {largest[row], sum[row], values + row * columns};
    }

  private:
    // Of a request, from a head on.
    void find_tokens(int64_t request, int64_t first, int64_t last, int64_t kv_head, const S** found) const {
        call.find_tokens(request, first, last, found);
        for (int64_t i = 0; i < last - first; i++) found[i] += kv_head * call.width;
    }

    int64_t row_of(int64_t head) const {
        const int64_t within = head % call.group();
        return (head / call.group() * slices + within / ROWS) * ROWS + within % ROWS;
    }

    void read_queries(int64_t token) {
        memset(q, 0, all * ROWS * depth * sizeof *q);
        std::fill_n(slopes, step, 0.0f);
        for (int64_t head = 0; head < num_heads * call.group(); head++) {
            const int64_t row = row_of(head), head_of_q = first_head * call.group() + head;
            const T* from = call.query(token, head_of_q);
            if (call.alibi.numbers) slopes[row] = call.alibi[head_of_q];
            for (int64_t d = 0; d < call.head_dim_k; d += M::WIDTH) {
                const auto numbers = call.template operand<M>(from, d);
                memcpy(q + row * depth + d, &numbers, sizeof numbers);
            }
        }
    }

    // offset: the position of the first key less that of the query.
    void add_block(const S* const* block, int64_t count, int64_t offset, Ahead<S>& ahead) {
        for (int64_t slice = 0; slice < all; slice += SLICES)
            for (int64_t t = 0; t < count; t += TOKENS) score(slice, block, t, count, ahead);
        for (int64_t i = 0; i < step; i += LANES) weigh(i, count, offset);
        for (int64_t slice = 0; slice < all; slice++) add_columns<OPERANDS>(slice, block, count, 0, ahead);
    }

    // Scores of slices.. [SLICES] and tokens t.. [TOKENS]. Those of tokens and slices that are not there are of no use.
    __attribute__((always_inline)) void score(int64_t slice, const S* const* block, int64_t t, int64_t count, Ahead<S>& ahead) {
        Vec total[TOKENS * SLICES * ROWS] = {};
#pragma GCC unroll 4
        for (int i = 0; i < SLICES; i++) {
            if (slice + i >= all) continue;
            const typename M::Stored* rows = q + (slice + i) * ROWS * depth;
            const S* keys[TOKENS];
            for (int j = 0; j < TOKENS; j++) keys[j] = block[std::min(t + j, count - 1)] + (slice + i) / slices * call.width;
            Vec found[TOKENS][ROWS] = {};
            int64_t d = 0;
            for (; d + M::WIDTH <= call.head_dim_k; d += M::WIDTH) add_products(rows + d, keys, d, M::WIDTH, found, ahead);
            if (d < call.head_dim_k) add_products(rows + d, keys, d, call.head_dim_k - d, found, ahead);
#pragma GCC unroll 4
            for (int j = 0; j < TOKENS; j++)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) total[(j * SLICES + i) * ROWS + r] = found[j][r];
            if constexpr (IS_SCALED<T, S>)
                for (int j = 0; j < TOKENS; j++) {
                    const int64_t place = (t + j) * step + (slice + i) * ROWS;
                    std::fill_n(key_scales + place, ROWS, scale_of(keys[j], call.width, 0));
                    std::fill_n(value_scales + place, ROWS, scale_of(keys[j], call.width, 1));
                }
        }
        const Vec found = sums(total);
        const auto* lanes = reinterpret_cast<const float*>(&found);
#pragma GCC unroll 4
        for (int j = 0; j < TOKENS; j++)
            memcpy(scores + (t + j) * step + slice * ROWS, lanes + j * SLICES * ROWS, SLICES * ROWS * sizeof(float));
    }

    // found [TOKENS, ROWS] += numbers d.. of q [ROWS, depth], at most WIDTH of them, times those of keys.
    __attribute__((always_inline)) void add_products(const typename M::Stored* rows, const S* const* keys, int64_t d, int64_t count,
                                                     Vec (&found)[TOKENS][ROWS], Ahead<S>& ahead) const {
        typename M::Operand numbers[TOKENS];
#pragma GCC unroll 4
        for (int j = 0; j < TOKENS; j++) {
            if (d % LINE == 0) ahead.fetch();
            numbers[j] = M::read(keys[j] + d, count);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const auto query = M::load(reinterpret_cast<const typename M::Unit*>(rows + r * depth));
#pragma GCC unroll 4
            for (int j = 0; j < TOKENS; j++) found[j][r] = M::dot(found[j][r], query, numbers[j]);
        }
    }

    // Scores [count, rows i..] become weights.
    void weigh(int64_t i, int64_t count, int64_t offset) {
        const bool is_plain = !IS_SCALED<T, S> && !call.softcap && !call.alibi.numbers && call.scale > 0;
        const float scale = is_plain ? call.scale : 1;  // by which scores are multiplied at last
        for (int64_t k = 0; k < count && !is_plain; k++) {
            Vec x = load(scores + k * step + i) * call.scale;
            if (IS_SCALED<T, S>) x *= load(key_scales + k * step + i);
            if (call.softcap) x = capped(x, call.softcap);
            if (call.alibi.numbers) x += load(slopes + i) * float(offset + k);
            store(scores + k * step + i, x);
        }
        to_weights<M>(scores + i, step, count, scale, largest + i, sum + i, factors + i, weights + i, [&](int64_t k, Vec weight) {
            return IS_SCALED<T, S> ? weight * load(value_scales + k * step + i) : weight;
        });
    }

    // Columns d.. of the sums of a slice, so many vectors at a time, and then fewer.
    template <int COUNT>
    void add_columns(int64_t slice, const S* const* block, int64_t count, int64_t d, Ahead<S>& ahead) {
        for (; d + COUNT * LANES <= call.head_dim_v; d += COUNT * LANES) add_values<COUNT, true>(slice, block, count, d, ahead);
        if (d == call.head_dim_v) return;
        if constexpr (COUNT > M::WIDTH / LANES) add_columns<COUNT / 2>(slice, block, count, d, ahead);
        else add_values<COUNT, false>(slice, block, count, d, ahead);
    }

    // Columns d.. of the sums of a slice: times factors, plus weights times values, which all are there, or not.
    template <int COUNT, bool IS_WHOLE>
    void add_values(int64_t slice, const S* const* block, int64_t count, int64_t d, Ahead<S>& ahead) {
        float* into = values + slice * ROWS * columns + d;
        const int64_t offset = slice / slices * call.width + call.values() + d, rest = IS_WHOLE ? COUNT * LANES : call.head_dim_v - d;
        Vec total[ROWS][COUNT];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c++) total[r][c] = load(into + r * columns + c * LANES) * factors[slice * ROWS + r];
        for (int64_t t = 0; t < count; t += M::TOGETHER) {
            const S* pair[] = {block[t], block[std::min(t + 1, count - 1)]};
            typename M::Value value[COUNT];
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c += M::WIDTH / LANES) {
                for (int i = 0; i < M::TOGETHER; i++)
                    if (c * LANES % LINE == 0) ahead.fetch();
                M::interleave(pair, offset + c * LANES, rest - c * LANES, value + c);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const auto weight = M::spread(weights[t / M::TOGETHER * step + slice * ROWS + r]);
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
