// Attention of up to 64 query rows (tokens times the heads of a group) of one request over its keys, some at a time.
#pragma once

#include "attention.h"

constexpr int ROWS = 64;
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

// out [HIGH, COUNT vectors] = a times b, of units [k, STEP]. Those of a row of a are neighbours, and its rows a_step apart. Or, with
// factors, out = out * factors + a times b, and the rows of a are neighbours, and its units a_step apart.
template <class M, int STEP, bool HAS_FACTORS, int HIGH, int COUNT>
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
        for (int c = 0; c < COUNT; c++) x[c] = M::load(b + k * STEP + c * LANES);
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
template <class M, int STEP, bool HAS_FACTORS, int HIGH>
inline void multiply(int64_t columns, const typename M::Unit* a, int64_t a_step, const typename M::Unit* b, int64_t units,
                     const float* factors, float* out, int64_t out_step, Lines& lines) {
    const int64_t count = std::min<int64_t>(WIDE, (columns + LANES - 1) / LANES);
    if (count == 1) return multiply<M, STEP, HAS_FACTORS, HIGH, 1>(a, a_step, b, units, factors, out, out_step, lines);
    if (count == 2) return multiply<M, STEP, HAS_FACTORS, HIGH, 2>(a, a_step, b, units, factors, out, out_step, lines);
    if (count == 3) return multiply<M, STEP, HAS_FACTORS, HIGH, 3>(a, a_step, b, units, factors, out, out_step, lines);
    multiply<M, STEP, HAS_FACTORS, HIGH, WIDE>(a, a_step, b, units, factors, out, out_step, lines);
}

// The same of any number of rows and columns; rows are rounded up, to LOW or to HIGH, but not over a multiple of both.
template <class M, int STEP, bool HAS_FACTORS>
inline void multiply(int64_t rows, int64_t columns, const typename M::Unit* a, int64_t a_step, const typename M::Unit* b, int64_t units,
                     const float* factors, float* out, int64_t out_step, Lines& lines) {
    for (int64_t c = 0; c < columns; c += PANEL)
        for (int64_t r = 0, high; r < rows; r += high) {
            high = rows - r > LOW ? M::HIGH : LOW;
            const auto* left = a + (HAS_FACTORS ? r : r * a_step);
            float* to = out + r * out_step + c;
            if (high == LOW) multiply<M, STEP, HAS_FACTORS, LOW>(columns - c, left, a_step, b + c, units, factors + r, to, out_step, lines);
            else multiply<M, STEP, HAS_FACTORS, M::HIGH>(columns - c, left, a_step, b + c, units, factors + r, to, out_step, lines);
        }
}

// Keys and values of one head, from `first` to before `last`, as they are multiplied.
template <typename Unit>
struct Block {
    int64_t request, kv_head, first, last;
    Unit *keys, *values;               // [KEYS, depth], [columns / PANEL, KEYS / TOGETHER, PANEL]
    float *key_scales, *value_scales;  // [KEYS]
};

constexpr int64_t KEPT_BYTES = 4 << 20;  // of a thread's blocks that the next tile of a head finds as this one has left them

template <typename T, typename S>
class Tile {
    using M = Math<T>;
    using Unit = typename M::Unit;
    static constexpr int TOGETHER = M::TOGETHER, KEYS = M::KEYS;
    static_assert(ROWS % M::HIGH % LOW == 0 && KEYS % M::HIGH % LOW == 0);  // no rounding goes over them

    const Call<T, S>& call;
    const int64_t depth, columns;             // units of a key; numbers of a row of the sums
    const int64_t num_blocks;
    Block<Unit>* blocks;                      // [num_blocks]
    Unit* q;                                  // [depth, ROWS]
    float *scores, *sums;                     // [KEYS, ROWS], [ROWS, columns]
    Unit* weights;                            // [KEYS / TOGETHER, ROWS], in place of the scores
    float *largest, *sum, *factors, *slopes;  // [ROWS]
    int32_t *first_seen, *position;           // [ROWS]
    const S** tokens;                         // [KEYS + 1]: of a block, with room to repeat the last one
    const char** lines;                       // to be fetched during a block
    int64_t num_rows = 0;

    static int64_t units_of(const Call<T, S>& call) { return (call.head_dim_k + TOGETHER - 1) / TOGETHER; }
    static int64_t columns_of(const Call<T, S>& call) { return round_up(call.head_dim_v, PANEL); }
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
               Scratch::bytes_of<float>(KEYS * ROWS) + Scratch::bytes_of<float>(ROWS * columns_of(call)) +
               6 * Scratch::bytes_of<float>(ROWS) + Scratch::bytes_of<const S*>(KEYS + 1) +
               Scratch::bytes_of<const char*>(num_lines_of(call));
    }
    // Of a block, and of the queries and outputs of a tile.
    static int64_t num_lines_of(const Call<T, S>& call) {
        const auto of = [](int64_t bytes) { return (bytes + 63) / 64; };
        return KEYS * of(call.width * sizeof(S)) + ROWS * (of(call.head_dim_k * sizeof(T)) + of(call.head_dim_v * sizeof(T)));
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
        scores = scratch.take<float>(KEYS * ROWS);
        weights = reinterpret_cast<Unit*>(scores);
        sums = scratch.take<float>(ROWS * columns);
        for (float** rows : {&largest, &sum, &factors, &slopes}) *rows = scratch.take<float>(ROWS);
        for (int32_t** rows : {&first_seen, &position}) *rows = scratch.take<int32_t>(ROWS);
        tokens = scratch.take<const S*>(KEYS + 1);
        lines = scratch.take<const char*>(num_lines_of(call));
    }

    // Rows [first_row, first_row + count) of a head of the cache, over keys [first, last) of those that they see.
    // next: what this thread will work on then, or null.
    void run(int64_t request, int64_t kv_head, int64_t first_row, int64_t count, int64_t first, int64_t last, const Task* next) {
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
            Lines ahead{lines, lines};
            if (stop < after && !holds(block_at(request, stop), request, kv_head, stop, after))
                add_tokens(request, kv_head, stop, after, ahead);
            if (stop < last ? after == last : start == first) {
                add_outputs(request, kv_head, first_row, ahead);
                if (next && next->first_row >= 0) add_queries(*next, ahead);
            }
            add_keys(here, start, stop - start, ahead);
        }
    }

    Partial row(int64_t i) const { return {largest[i], sum[i], sums + i * columns}; }

  private:
    // Also what each row sees; rows of padding see what the last one sees.
    void read_queries(int64_t request, int64_t kv_head, int64_t first_row) {
        const int64_t before = call.seq_lens[request] - call.cu_seqlens_q[request + 1];  // position of a token of the call, less its index
        const T* query[ROWS];
        call.each_row(request, kv_head, first_row, num_rows, [&](int64_t i, int64_t token, int64_t head) {
            query[i] = call.query(token, head);
            position[i] = int32_t(token + before);
            first_seen[i] = int32_t(call.first_seen(position[i]));
            slopes[i] = call.alibi.numbers ? call.alibi[head] : 0;
        });
        const int64_t end = num_rows - 1, rest = ROWS - num_rows;
        std::fill_n(query + num_rows, rest, query[end]);
        std::fill_n(position + num_rows, rest, position[end]);
        std::fill_n(first_seen + num_rows, rest, first_seen[end]);
        std::fill_n(slopes + num_rows, rest, slopes[end]);
        std::fill_n(largest, ROWS, -INFINITE);
        std::fill_n(sum, ROWS, 0.0f);
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
        const bool is_only = call.num_rows(request) <= ROWS;
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
        read_keys(tokens, count, place, call.head_dim_k, depth, block.keys);
        read_values(tokens, count, place + call.values(), call.head_dim_v, block.values);
        call.find_scales(tokens, count, place, 0, block.key_scales);
        call.find_scales(tokens, count, place, 1, block.value_scales);
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
                typename M::Operand some[TOGETHER];
                M::interleave(tokens + t, place + d, dim - d, some);
                memcpy(values + d / PANEL * PANEL * (KEYS / TOGETHER) + d % PANEL, some, sizeof some);
            }
    }

    // What will be read or written soon.
    void add_tokens(int64_t request, int64_t kv_head, int64_t first, int64_t last, Lines& ahead) {
        call.find_tokens(request, first, last, tokens);
        for (int64_t t = 0; t < last - first; t++) ahead.add(tokens[t] + kv_head * call.width, call.width * sizeof(S));
    }

    void add_outputs(int64_t request, int64_t kv_head, int64_t first_row, Lines& ahead) const {
        call.each_row(request, kv_head, first_row, num_rows, [&](int64_t, int64_t token, int64_t head) {
            ahead.add(call.output(token, head), call.head_dim_v * sizeof(T));
        });
    }

    void add_queries(const Task& task, Lines& ahead) const {
        if (call.q_dim_stride != 1) return;
        const int64_t rows = std::min<int64_t>(ROWS, call.num_rows(task.request) - task.first_row);
        call.each_row(task.request, task.kv_head, task.first_row, rows, [&](int64_t, int64_t token, int64_t head) {
            ahead.add(call.query(token, head), call.head_dim_k * sizeof(T));
        });
    }

    // A block, or the first keys of it, for all rows. Meanwhile what is needed next is fetched.
    void add_keys(const Block<Unit>& block, int64_t start, int64_t count, Lines& ahead) {
        const int64_t units = (count + TOGETHER - 1) / TOGETHER;
        multiply<M, ROWS, false>(count, num_rows, block.keys, depth, q, depth, factors, scores, ROWS, ahead);
        for (int64_t i = 0; i < num_rows; i += LANES) weigh(i, start, count, block.key_scales, block.value_scales);
        for (int64_t c = 0; c < call.head_dim_v; c += PANEL)
            multiply<M, PANEL, true>(num_rows, std::min<int64_t>(PANEL, call.head_dim_v - c), weights, ROWS,
                                     block.values + c * (KEYS / TOGETHER), units, factors, sums + c, columns, ahead);
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
        for (int64_t k = 0; k < count && !(is_plain && sees_all); k++) {
            const int32_t key = int32_t(start + k);
            Vec x = load(scores + k * ROWS + i);
            if (!is_plain) x *= IS_SCALED<T, S> ? call.scale * key_scales[k] : call.scale;
            if (call.softcap) x = capped(x, call.softcap);
            if (call.alibi.numbers) x += slope * (float(key) - query);
            if (!sees_all) x = ((key >= first) & (key <= last)) ? x : all(-INFINITE);
            store(scores + k * ROWS + i, x);
        }
        Vec found[4] = {all(-INFINITE), all(-INFINITE), all(-INFINITE), all(-INFINITE)};  // a CPU compares four at once
        for (int64_t k = 0; k < count; k += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) found[j] = larger(found[j], load(scores + std::min(k + j, count - 1) * ROWS + i));
        const Vec highest = larger(larger(found[0], found[1]), larger(found[2], found[3]));
        const Vec top = larger(before, highest * scale), base = top == -INFINITE ? Vec{} : top, factor = exp(before - base);
        const Vec zero = base * LOG2_E;
        Vec total = load(sum + i) * factor;
        for (int64_t k = 0; k < count; k += TOGETHER) {
            Vec some[2] = {};
            for (int64_t j = k; j < std::min(k + TOGETHER, count); j++) {
                total += some[j - k] = exp2_of_small(load(scores + j * ROWS + i) * (scale * LOG2_E) - zero);
                if (IS_SCALED<T, S>) some[j - k] *= value_scales[j];
            }
            M::pack(some, weights + k / TOGETHER * ROWS + i);
        }
        store(sum + i, total);
        store(largest + i, top);
        store(factors + i, factor);
    }
};
