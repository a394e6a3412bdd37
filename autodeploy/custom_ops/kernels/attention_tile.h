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
        __builtin_prefetch(a + HIGH * row_step + k * (row_step == 1 ? unit_step : HIGH), 0, 3);
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

// Keys and values of one head, from `first` to before `last`, as they are multiplied.
template <typename Unit>
struct Block {
    int64_t request, kv_head, first, last;
    Unit *keys, *values;               // [KEYS, depth], [KEYS / TOGETHER, columns]
    float *key_scales, *value_scales;  // [KEYS]
};

constexpr int64_t KEPT_BYTES = 4 << 20;  // of a thread's blocks that the next tile of a head finds as this one has left them

template <typename T, typename S>
class Tile {
    using M = Math<T>;
    using Unit = typename M::Unit;
    static constexpr int TOGETHER = M::TOGETHER, KEYS = M::KEYS;
    static constexpr int64_t FEW = 2 * M::HIGH;  // keys, after whose products some more of the next are fetched
    static_assert(ROWS % M::HIGH % LOW == 0 && KEYS % M::HIGH % LOW == 0);  // no rounding goes over them

    const Call<T, S>& call;
    const int64_t depth, columns;             // units of a key; numbers of a row of the sums
    const int64_t num_blocks;
    Block<Unit>* blocks;                      // [num_blocks]
    Unit *q, *weights;                        // [depth, ROWS], [KEYS / TOGETHER, ROWS]
    float *scores, *sums;                     // [KEYS, ROWS], [ROWS, columns]
    float *largest, *sum, *factors, *slopes;  // [ROWS]
    int32_t *first_seen, *position;           // [ROWS]
    const S** tokens;                         // [KEYS + 1]: of a block, with room to repeat the last one
    int64_t num_rows = 0;

    static int64_t units_of(const Call<T, S>& call) { return (call.head_dim_k + TOGETHER - 1) / TOGETHER; }
    static int64_t columns_of(const Call<T, S>& call) { return round_up(call.head_dim_v, M::WIDTH); }
    static int64_t block_bytes(const Call<T, S>& call) {
        return Scratch::bytes_of<Unit>(KEYS * units_of(call)) + Scratch::bytes_of<Unit>(KEYS / TOGETHER * columns_of(call)) +
               2 * Scratch::bytes_of<float>(KEYS);
    }
    // One for each that the longest request has, and one for what would be too many.
    static int64_t num_blocks_of(const Call<T, S>& call) {
        const int64_t longest = *std::max_element(call.seq_lens, call.seq_lens + call.requests);
        return 1 + std::min(KEPT_BYTES / block_bytes(call), (longest + KEYS - 1) / KEYS);
    }

    static int64_t bytes(const Call<T, S>& call) {
        const int64_t blocks = num_blocks_of(call);
        return Scratch::bytes_of<Block<Unit>>(blocks) + blocks * block_bytes(call) + Scratch::bytes_of<Unit>(units_of(call) * ROWS) +
               Scratch::bytes_of<Unit>(KEYS / TOGETHER * ROWS) + Scratch::bytes_of<float>(KEYS * ROWS) +
               Scratch::bytes_of<float>(ROWS * columns_of(call)) + 6 * Scratch::bytes_of<float>(ROWS) +
               Scratch::bytes_of<const S*>(KEYS + 1);
    }

  public:
    // Takes all of the scratch.
    Tile(const Call<T, S>& call, Scratch& scratch)
        : call(call), depth(units_of(call)), columns(columns_of(call)), num_blocks(num_blocks_of(call)) {
        scratch.reserve(bytes(call));
        blocks = scratch.take<Block<Unit>>(num_blocks);
        for (int64_t i = 0; i < num_blocks; i++)
            blocks[i] = {-1, 0, 0, 0, scratch.take<Unit>(KEYS * depth), scratch.take<Unit>(KEYS / TOGETHER * columns),
                         scratch.take<float>(KEYS), scratch.take<float>(KEYS)};
        q = scratch.take<Unit>(depth * ROWS);
        weights = scratch.take<Unit>(KEYS / TOGETHER * ROWS);
        scores = scratch.take<float>(KEYS * ROWS);
        sums = scratch.take<float>(ROWS * columns);
        for (float** rows : {&largest, &sum, &factors, &slopes}) *rows = scratch.take<float>(ROWS);
        for (int32_t** rows : {&first_seen, &position}) *rows = scratch.take<int32_t>(ROWS);
        tokens = scratch.take<const S*>(KEYS + 1);
    }

    // Rows [first_row, first_row + count) of a head of the cache, over keys [first, last) of those that they see.
    void run(int64_t request, int64_t kv_head, int64_t first_row, int64_t count, int64_t first, int64_t last) {
        num_rows = count;
        read_queries(request, kv_head, first_row);
        std::fill(sums, sums + ROWS * columns, 0.0f);
        first = std::max<int64_t>(first, first_seen[0]), last = std::min<int64_t>(last, position[num_rows - 1] + 1);
        for (int64_t start = first, stop; start < last; start = stop) {
            stop = std::min(last, start / KEYS * KEYS + KEYS);
            Block<Unit>& here = block_at(request, start);
            if (!holds(here, request, kv_head, start, stop)) {
                here.request = request, here.kv_head = kv_head, here.first = start, here.last = stop;
                read_block(here);
            }
            const int64_t after = std::min(last, stop + KEYS);
            const bool is_ready = stop == after || holds(block_at(request, stop), request, kv_head, stop, after);
            add_keys(here, start, stop - start, is_ready ? stop : after);
        }
    }

    Partial row(int64_t i) const { return {largest[i], sum[i], sums + i * columns}; }

  private:
    // Also what each row sees; rows of padding see what the last one sees.
    void read_queries(int64_t request, int64_t kv_head, int64_t first_row) {
        const int64_t before = call.seq_lens[request] - call.new_tokens(request);
        const T* query[ROWS];
        for (int64_t i = 0; i < ROWS; i++) {
            const int64_t row = first_row + std::min(i, num_rows - 1), token = row / call.group();
            const int64_t head = kv_head * call.group() + row % call.group();
            query[i] = call.query(call.cu_seqlens_q[request] + token, head);
            position[i] = int32_t(before + token);
            first_seen[i] = int32_t(call.first_seen(before + token));
            slopes[i] = call.alibi.numbers ? call.alibi[head] : 0;
            largest[i] = -INFINITE, sum[i] = 0;
        }
        for (int64_t i = 0; i < ROWS; i += LANES)
            for (int64_t d = 0; d < depth; d += LANES) {
                Vec x[LANES];
                for (int r = 0; r < LANES; r++) x[r] = units(query[i + r], d);
                transpose(x);
                for (int64_t u = 0; u < std::min<int64_t>(LANES, depth - d); u++) memcpy(q + (d + u) * ROWS + i, x + u, sizeof *x);
            }
    }

    // Units d.. of a query, one to a lane; zeros behind the last.
    Vec units(const T* query, int64_t d) const {
        const int64_t count = call.head_dim_k - d * TOGETHER, stride = call.q_dim_stride;
        if (stride == 1) return (Vec)M::read(query + d * TOGETHER, count);
        T some[M::WIDTH] = {};
        for (int64_t i = 0; i < std::min<int64_t>(M::WIDTH, count); i++) some[i] = query[(d * TOGETHER + i) * stride];
        return (Vec)M::read(some, M::WIDTH);
    }

    // Where keys start.. and their values go: where further tiles of a head will see them each block has a place, as far as there are.
    Block<Unit>& block_at(int64_t request, int64_t start) const {
        const bool is_only = call.new_tokens(request) * call.group() <= ROWS;
        const int64_t index = start / KEYS, most = num_blocks - 1;
        return blocks[is_only ? most : call.window || call.chunk ? index % num_blocks : std::min(index, most)];
    }

    static bool holds(const Block<Unit>& block, int64_t request, int64_t kv_head, int64_t start, int64_t stop) {
        return block.request == request && block.kv_head == kv_head && block.first == start && block.last >= stop;
    }

    void read_block(const Block<Unit>& block) {
        const int64_t count = block.last - block.first, place = block.kv_head * call.width;
        call.find_tokens(block.request, block.first, block.last, tokens);
        tokens[count] = tokens[count - 1];
        for (int64_t t = 0; t < count; t++) {
            int64_t d = 0;
            for (; (d + LANES) * TOGETHER <= call.head_dim_k; d += LANES) read_key<LANES>(t, d, place, block.keys);
            if (d < depth) read_key<0>(t, d, place, block.keys);
        }
        for (int64_t t = 0; t < count; t += TOGETHER)
            for (int64_t d = 0; d < call.head_dim_v; d += M::WIDTH) {
                typename M::Operand some[TOGETHER];
                M::interleave(tokens + t, place + call.values() + d, call.head_dim_v - d, some);
                memcpy(block.values + t / TOGETHER * columns + d, some, sizeof some);
            }
        call.find_scales(tokens, count, place, 0, block.key_scales);
        call.find_scales(tokens, count, place, 1, block.value_scales);
    }

    // Units d.. of a key: so many, or the rest.
    template <int COUNT>
    void read_key(int64_t t, int64_t d, int64_t place, Unit* keys) const {
        const auto some = M::read(tokens[t] + place + d * TOGETHER, COUNT ? M::WIDTH : call.head_dim_k - d * TOGETHER);
        memcpy(keys + t * depth + d, &some, (COUNT ? COUNT : depth - d) * sizeof(Unit));
    }

    // A block, or the first keys of it, for all rows. Meanwhile the tokens behind them are fetched, as far as `ahead`.
    void add_keys(const Block<Unit>& block, int64_t start, int64_t count, int64_t ahead) {
        const int64_t units = (count + TOGETHER - 1) / TOGETHER, place = block.kv_head * call.width;
        ahead -= start + count;
        call.find_tokens(block.request, start + count, start + count + ahead, tokens);
        for (int64_t k = 0; k < count; k += FEW) {
            for (int64_t t = k; t < std::min(k + FEW, ahead); t++)
                for (int64_t d = 0; d < call.width; d += 64 / sizeof(S)) __builtin_prefetch(tokens[t] + place + d, 0, 2);
            multiply<M>(std::min(FEW, count - k), num_rows, block.keys + k * depth, depth, 1, q, ROWS, depth, nullptr, scores + k * ROWS, ROWS);
        }
        for (int64_t i = 0; i < num_rows; i += LANES) weigh(i, start, count, block.key_scales, block.value_scales);
        multiply<M>(num_rows, call.head_dim_v, weights, 1, ROWS, block.values, columns, units, factors, sums, columns);
    }

    // Scores [count, lanes of rows i..] become weights relative to each row's largest score so far.
    void weigh(int64_t i, int64_t start, int64_t count, const float* key_scales, const float* value_scales) {
        IntVec first, last;
        memcpy(&first, first_seen + i, sizeof first);
        memcpy(&last, position + i, sizeof last);
        const bool sees_all = start >= first_seen[ROWS - 1] && start + count - 1 <= position[0];
        const bool is_plain = !IS_SCALED<T, S> && !call.softcap && !call.alibi.numbers && call.scale > 0;
        const float scale = is_plain ? call.scale : 1;  // by which scores are multiplied at last
        const Vec query = __builtin_convertvector(last, Vec), slope = load(slopes + i), before = load(largest + i);
        Vec highest = all(-INFINITE);
        for (int64_t k = 0; k < count; k++) {
            const int32_t key = int32_t(start + k);
            Vec x = load(scores + k * ROWS + i);
            if (!is_plain || !sees_all) {
                if (!is_plain) x *= IS_SCALED<T, S> ? call.scale * key_scales[k] : call.scale;
                if (call.softcap) x = capped(x, call.softcap);
                if (call.alibi.numbers) x += slope * (float(key) - query);
                if (!sees_all) x = ((key >= first) & (key <= last)) ? x : all(-INFINITE);
                store(scores + k * ROWS + i, x);
            }
            highest = larger(highest, x);
        }
        const Vec top = larger(before, highest * scale), base = top == -INFINITE ? Vec{} : top, factor = exp(before - base);
        Vec total = load(sum + i) * factor;
        for (int64_t k = 0; k < count; k += TOGETHER) {
            Vec some[2] = {};
            for (int64_t j = k; j < std::min(k + TOGETHER, count); j++) {
                total += some[j - k] = exp_of_small(load(scores + j * ROWS + i) * scale - base);
                if (IS_SCALED<T, S>) some[j - k] *= value_scales[j];
            }
            M::pack(some, weights + k / TOGETHER * ROWS + i);
        }
        store(sum + i, total);
        store(largest + i, top);
        store(factors + i, factor);
    }
};
