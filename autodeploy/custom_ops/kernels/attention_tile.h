// Attention of query rows (tokens times the heads of a group) of one request over its keys: some of these at a time, as they are
// multiplied, for 64 rows after the other.
#pragma once

#include "attention.h"

constexpr int ROWS = 64;
constexpr int MAX_TILES = 8;                                        // of ROWS, for which keys are made ready at once
constexpr int LOW = 4;                                              // of its rows, products of so many or of M::HIGH stay in registers,
constexpr int WIDE = LANES == 16 ? 4 : ROWS % (3 * LANES) ? 2 : 3;  // and so many vectors of each, which together are
constexpr int PANEL = WIDE * LANES;                                 // numbers

// Lines of memory that are fetched while something is multiplied, one now and then.
struct Lines {
    const char **next, **end;

    void add(const void* from, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += 64) *end++ = static_cast<const char*>(from) + i;
    }
    void fetch() {
        if (next != end) __builtin_prefetch(*next++, 0, 2);
    }
};

// out [HIGH, COUNT vectors] = a times b, of units [k, PANEL]. Those of a row of a are neighbours, and its rows a_step apart. Or, with
// factors, out = out * factors + a times b, and the rows of a are neighbours, and its units a_step apart.
template <class M, bool HAS_FACTORS, int HIGH, int COUNT>
inline void multiply(const typename M::Unit* a, int64_t a_step, const typename M::Unit* b, int64_t units, const float* factors, float* out,
                     int64_t out_step, Lines& lines) {
    Vec total[HIGH][COUNT];
#pragma GCC unroll 6
    for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) total[r][c] = HAS_FACTORS ? load(out + r * out_step + c * LANES) * factors[r] : Vec{};
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        typename M::Operand x[COUNT];
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) x[c] = M::load(b + k * PANEL + c * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < HIGH; r++) {
            const auto one = M::spread(HAS_FACTORS ? a[r + k * a_step] : a[r * a_step + k]);
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; c++) total[r][c] = M::dot(total[r][c], one, x[c]);
        }
    };
    int64_t k = 0;
    for (; k + 2 <= units; k += 2) {
        if (!HAS_FACTORS) __builtin_prefetch(a + HIGH * (a_step + k), 0, 3);  // the rows behind these
        lines.fetch();
        add(k);
        add(k + 1);
    }
    if (k < units) add(k);
#pragma GCC unroll 6
    for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) store(out + r * out_step + c * LANES, total[r][c]);
}

// The same of as many columns as there are, at most WIDE vectors, rounded up to LANES.
template <class M, bool HAS_FACTORS, int HIGH>
inline void multiply(int64_t columns, const typename M::Unit* a, int64_t a_step, const typename M::Unit* b, int64_t units,
                     const float* factors, float* out, int64_t out_step, Lines& lines) {
    const int64_t count = std::min<int64_t>(WIDE, (columns + LANES - 1) / LANES);
    if (count == 1) return multiply<M, HAS_FACTORS, HIGH, 1>(a, a_step, b, units, factors, out, out_step, lines);
    if (count == 2) return multiply<M, HAS_FACTORS, HIGH, 2>(a, a_step, b, units, factors, out, out_step, lines);
    if (count == 3) return multiply<M, HAS_FACTORS, HIGH, 3>(a, a_step, b, units, factors, out, out_step, lines);
    multiply<M, HAS_FACTORS, HIGH, WIDE>(a, a_step, b, units, factors, out, out_step, lines);
}

// The same of any number of rows and columns, with b of units [columns / PANEL, k, PANEL]; rows are rounded up, to LOW or to HIGH, but not
// over a multiple of both.
template <class M, bool HAS_FACTORS>
inline void multiply(int64_t rows, int64_t columns, const typename M::Unit* a, int64_t a_step, const typename M::Unit* b, int64_t units,
                     const float* factors, float* out, int64_t out_step, Lines& lines) {
    for (int64_t c = 0; c < columns; c += PANEL)
        for (int64_t r = 0, high; r < rows; r += high) {
            high = rows - r > LOW ? M::HIGH : LOW;
            const auto* left = a + (HAS_FACTORS ? r : r * a_step);
            float* to = out + r * out_step + c;
            if (high == LOW) multiply<M, HAS_FACTORS, LOW>(columns - c, left, a_step, b + c * units, units, factors + r, to, out_step, lines);
            else multiply<M, HAS_FACTORS, M::HIGH>(columns - c, left, a_step, b + c * units, units, factors + r, to, out_step, lines);
        }
}

// ROWS rows, or fewer: their queries, what each sees, and what it has found so far. Rows of padding see what the last one sees.
template <typename Unit>
struct Rows {
    int64_t count;
    Unit* q;                         // [ROWS / PANEL, depth, PANEL]
    float* sums;                     // [ROWS, columns], of weights times values
    float *largest, *sum, *slopes;   // [ROWS]: score, sum of weights, of alibi
    int32_t *first_seen, *position;  // [ROWS]
};

template <typename T, typename S>
class Tiles {
    using M = Math<T>;
    using Unit = typename M::Unit;
    static constexpr int TOGETHER = M::TOGETHER, KEYS = M::KEYS;
    static_assert(ROWS % M::HIGH % LOW == 0 && KEYS % M::HIGH % LOW == 0);  // no rounding goes over them

    const Call<T, S>& call;
    const int64_t depth, columns;             // units of a key; numbers of a row of the sums
    Rows<Unit> tiles[MAX_TILES];
    Unit *keys, *values;                      // [KEYS, depth], [columns / PANEL, KEYS / TOGETHER, PANEL]
    float *key_scales, *value_scales;         // [KEYS]
    float* scores;                            // [KEYS, ROWS]
    Unit* weights;                            // [KEYS / TOGETHER, ROWS], in place of the scores
    float* factors;                           // [ROWS]
    const S** tokens;                         // [KEYS + 1]: of keys, with room to repeat the last one
    const char** lines;                       // to be fetched meanwhile

    static int64_t units_of(const Call<T, S>& call) { return (call.head_dim_k + TOGETHER - 1) / TOGETHER; }
    static int64_t columns_of(const Call<T, S>& call) { return round_up(call.head_dim_v, PANEL); }
    static int64_t bytes(const Call<T, S>& call) {
        const int64_t of_rows = Scratch::bytes_of<Unit>(units_of(call) * ROWS) + Scratch::bytes_of<float>(ROWS * columns_of(call)) +
                                5 * Scratch::bytes_of<float>(ROWS);
        return MAX_TILES * of_rows + Scratch::bytes_of<Unit>(KEYS * units_of(call)) +
               Scratch::bytes_of<Unit>(KEYS / TOGETHER * columns_of(call)) + 2 * Scratch::bytes_of<float>(KEYS) +
               Scratch::bytes_of<float>(KEYS * ROWS) + Scratch::bytes_of<float>(ROWS) + Scratch::bytes_of<const S*>(KEYS + 1) +
               Scratch::bytes_of<const char*>(num_lines_of(call));
    }
    // Of keys and their values, and of the queries of a task and the outputs of another.
    static int64_t num_lines_of(const Call<T, S>& call) {
        const auto of = [](int64_t bytes) { return (bytes + 63) / 64; };
        const int64_t of_row = of(call.head_dim_k * sizeof(T)) + of(call.head_dim_v * sizeof(T));
        return KEYS * of(call.width * sizeof(S)) + MAX_TILES * ROWS * of_row;
    }

  public:
    // Takes all of the scratch.
    Tiles(const Call<T, S>& call, Scratch& scratch) : call(call), depth(units_of(call)), columns(columns_of(call)) {
        scratch.reserve(bytes(call));
        for (Rows<Unit>& rows : tiles) {
            rows.q = scratch.take<Unit>(depth * ROWS);
            rows.sums = scratch.take<float>(ROWS * columns);
            for (float** numbers : {&rows.largest, &rows.sum, &rows.slopes}) *numbers = scratch.take<float>(ROWS);
            for (int32_t** numbers : {&rows.first_seen, &rows.position}) *numbers = scratch.take<int32_t>(ROWS);
        }
        keys = scratch.take<Unit>(KEYS * depth);
        values = scratch.take<Unit>(KEYS / TOGETHER * columns);
        for (float** numbers : {&key_scales, &value_scales}) *numbers = scratch.take<float>(KEYS);
        scores = scratch.take<float>(KEYS * ROWS);
        weights = reinterpret_cast<Unit*>(scores);
        factors = scratch.take<float>(ROWS);
        tokens = scratch.take<const S*>(KEYS + 1);
        lines = scratch.take<const char*>(num_lines_of(call));
    }

    // next: what this thread will work on then, or null.
    void run(const Task& task, const Task* next) {
        const int64_t count = (task.num_rows + ROWS - 1) / ROWS;
        for (int64_t i = 0; i < count; i++) {
            tiles[i].count = std::min<int64_t>(ROWS, task.num_rows - i * ROWS);
            read_queries(task, task.first_row + i * ROWS, tiles[i]);
        }
        const int64_t first = std::max<int64_t>(task.first, tiles[0].first_seen[0]), last = end_of(tiles[count - 1], task.last);
        for (int64_t start = first / TOGETHER * TOGETHER, stop; start < last; start = stop) {
            stop = std::min(last, start / KEYS * KEYS + KEYS);
            read_tokens(task, first, start, stop);
            Lines ahead{lines, lines};
            const int64_t after = std::min(last, stop + KEYS);
            add_tokens(task, stop, after, ahead);
            if (stop < last ? after == last : start <= first) {
                add_outputs(task, ahead);
                if (next && next->first_row >= 0) add_queries(*next, ahead);
            }
            for (int64_t i = 0; i < count; i++) {
                const int64_t end = end_of(tiles[i], stop);
                if (end > start && end > tiles[i].first_seen[0]) add_keys(tiles[i], start, end - start, ahead);
            }
        }
    }

    // Of a task.
    Partial row(int64_t i) const {
        const Rows<Unit>& rows = tiles[i / ROWS];
        return {rows.largest[i % ROWS], rows.sum[i % ROWS], rows.sums + i % ROWS * columns};
    }

  private:
    // Behind the last key that any of them sees, but not above a limit.
    static int64_t end_of(const Rows<Unit>& rows, int64_t limit) {
        return std::min<int64_t>(limit, rows.position[rows.count - 1] + 1);
    }

    void read_queries(const Task& task, int64_t first_row, Rows<Unit>& rows) const {
        const int64_t end = call.cu_seqlens_q[task.request + 1], seq_len = call.seq_lens[task.request];
        const T* query[ROWS];
        call.each_row(task.request, task.kv_head, first_row, rows.count, [&](int64_t i, int64_t token, int64_t head) {
            query[i] = call.query(token, head);
            rows.position[i] = int32_t(seq_len - end + token);
            rows.first_seen[i] = int32_t(call.first_seen(rows.position[i]));
            rows.slopes[i] = call.alibi.numbers ? call.alibi[head] : 0;
        });
        for (int64_t i = rows.count; i < ROWS; i++) {
            query[i] = query[i - 1], rows.position[i] = rows.position[i - 1];
            rows.first_seen[i] = rows.first_seen[i - 1], rows.slopes[i] = rows.slopes[i - 1];
        }
        std::fill_n(rows.largest, ROWS, -INFINITE);
        std::fill_n(rows.sum, ROWS, 0.0f);
        std::fill_n(rows.sums, ROWS * columns, 0.0f);
        for (int64_t i = 0; i < ROWS; i += LANES)
            for (int64_t d = 0; d < depth; d += LANES) {
                Vec x[LANES];
                for (int r = 0; r < LANES; r++) x[r] = (Vec)call.template operand<M>(query[i + r], d * TOGETHER);
                transpose(x);
                Unit* to = rows.q + i / PANEL * PANEL * depth + i % PANEL;
                for (int64_t u = 0; u < std::min<int64_t>(LANES, depth - d); u++) memcpy(to + (d + u) * PANEL, x + u, sizeof *x);
            }
    }

    // Keys and values of tokens start.. to before stop. Where start is before the first that may be read, that one is read twice.
    void read_tokens(const Task& task, int64_t first, int64_t start, int64_t stop) {
        const int64_t count = stop - start, unseen = std::max<int64_t>(0, first - start), place = task.kv_head * call.width;
        call.find_tokens(task.request, start + unseen, stop, tokens + unseen);
        std::fill_n(tokens, unseen, tokens[unseen]);
        tokens[count] = tokens[count - 1];
        read_keys(tokens, count, place, call.head_dim_k, depth, keys);
        read_values(tokens, count, place + call.values(), call.head_dim_v, values);
        call.find_scales(tokens, count, place, 0, key_scales);
        call.find_scales(tokens, count, place, 1, value_scales);
    }

    // Numbers [count, dim] at that place of tokens to keys [count, depth].
    static void read_keys(const S* const* tokens, int64_t count, int64_t place, int64_t dim, int64_t depth, Unit* keys) {
        for (int64_t t = 0; t < count; t++, keys += depth) {
            const S* from = tokens[t] + place;
            int64_t d = 0;
            for (; d + M::WIDTH <= dim; d += M::WIDTH) {
                const auto some = M::read(from + d, M::WIDTH);
                memcpy(keys + d / TOGETHER, &some, sizeof some);
            }
            if (d == dim) continue;
            const auto some = M::read(from + d, dim - d);
            memcpy(keys + d / TOGETHER, &some, (depth - d / TOGETHER) * sizeof(Unit));
        }
    }

    // The same to values, with room for as many as are read at once.
    static void read_values(const S* const* tokens, int64_t count, int64_t place, int64_t dim, Unit* values) {
        for (int64_t t = 0; t < count; t += TOGETHER, values += PANEL)
            for (int64_t d = 0; d < dim; d += M::WIDTH) {
                typename M::Value some[TOGETHER];
                M::interleave(tokens + t, place + d, dim - d, some);
                memcpy(values + d / PANEL * PANEL * (KEYS / TOGETHER) + d % PANEL, some, sizeof some);
            }
    }

    // What will be read or written soon.
    void add_tokens(const Task& task, int64_t first, int64_t last, Lines& ahead) {
        call.find_tokens(task.request, first, last, tokens);
        for (int64_t t = 0; t < last - first; t++) ahead.add(tokens[t] + task.kv_head * call.width, call.width * sizeof(S));
    }

    void add_outputs(const Task& task, Lines& ahead) const {
        call.each_row(task.request, task.kv_head, task.first_row, task.num_rows, [&](int64_t, int64_t token, int64_t head) {
            ahead.add(call.output(token, head), call.head_dim_v * sizeof(T));
        });
    }

    void add_queries(const Task& task, Lines& ahead) const {
        if (call.q_dim_stride != 1) return;
        call.each_row(task.request, task.kv_head, task.first_row, task.num_rows, [&](int64_t, int64_t token, int64_t head) {
            ahead.add(call.query(token, head), call.head_dim_k * sizeof(T));
        });
    }

    // The keys that were read last, or the first of them. Meanwhile what is needed next is fetched.
    void add_keys(const Rows<Unit>& rows, int64_t start, int64_t count, Lines& ahead) {
        const int64_t units = (count + TOGETHER - 1) / TOGETHER;
        multiply<M, false>(count, rows.count, keys, depth, rows.q, depth, factors, scores, ROWS, ahead);
        for (int64_t i = 0; i < rows.count; i += LANES) weigh(rows, i, start, count);
        for (int64_t c = 0; c < call.head_dim_v; c += PANEL)
            multiply<M, true>(rows.count, std::min<int64_t>(PANEL, call.head_dim_v - c), weights, ROWS,
                                     values + c * (KEYS / TOGETHER), units, factors, rows.sums + c, columns, ahead);
    }

    // Scores [count, lanes of rows i..] become weights relative to each row's largest score so far.
    void weigh(const Rows<Unit>& rows, int64_t i, int64_t start, int64_t count) {
        IntVec first, last;
        memcpy(&first, rows.first_seen + i, sizeof first);
        memcpy(&last, rows.position + i, sizeof last);
        const bool sees_all = start >= rows.first_seen[ROWS - 1] && start + count - 1 <= rows.position[0];
        const bool is_plain = !IS_SCALED<T, S> && !call.softcap && !call.alibi.numbers && call.scale > 0;
        const float scale = is_plain ? call.scale : 1;  // by which scores are multiplied at last
        const Vec query = __builtin_convertvector(last, Vec), slope = load(rows.slopes + i);
        for (int64_t k = 0; k < count && !(is_plain && sees_all); k++) {
            const int32_t key = int32_t(start + k);
            Vec x = load(scores + k * ROWS + i);
            if (!is_plain) x *= IS_SCALED<T, S> ? call.scale * key_scales[k] : call.scale;
            if (call.softcap) x = capped(x, call.softcap);
            if (call.alibi.numbers) x += slope * (float(key) - query);
            if (!sees_all) x = ((key >= first) & (key <= last)) ? x : all(-INFINITE);
            store(scores + k * ROWS + i, x);
        }
        to_weights<M>(scores + i, ROWS, count, scale, rows.largest + i, rows.sum + i, factors + i, weights + i,
                      [&](int64_t k, Vec weight) { return IS_SCALED<T, S> ? weight * value_scales[k] : weight; });
    }
};
