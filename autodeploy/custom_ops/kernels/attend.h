// The work of a call of paged attention. The keys of a request are cut into ranges that depend on the request alone, never on what
// runs beside it or on how many threads there are. Each thread works on neighbours, as long as it has some of its own.
//
// `attention.cpp` and `attention_*.cpp` have it compiled for the kinds of caches; those of 8 bits are libraries of their own, which
// are built when first asked for.
#pragma once

#include <optional>
#include <vector>

#include "attention_decode.h"
#include "attention_tile.h"

constexpr int64_t RANGE = 256;        // keys of a task that streams tokens
constexpr int64_t TILE_RANGE = 2048;  // and of one that serves a single token whose group is large enough for tiles
constexpr int64_t LARGE_GROUP = 16;

// A token whose keys were split: the partial results [first, last), each of all heads.
struct Split {
    int64_t token, first, last;
};

template <typename T, typename S>
class Plan {
  public:
    std::vector<Task> tasks;
    std::vector<Split> splits;
    int64_t partials = 0;

    // Long tasks come first, and short ones fill the gaps at the end.
    void make(const Call<T, S>& call, int64_t threads) {
        tasks.clear(), splits.clear(), partials = 0;
        const int64_t size = rows_of_task(call, threads);
        for (int64_t i = 0; i < call.requests; i++)
            if (call.new_tokens(i) > 1) add_tiles(call, i, size);
        const int64_t tiles = int64_t(tasks.size());
        for (int64_t i = 0; i < call.requests; i++)
            if (call.new_tokens(i) == 1) add_token(call, i);
        if (tiles == 0) split_heads(threads);
    }

  private:
    // More share the keys that are made ready for them, but each thread should get some tasks.
    static int64_t rows_of_task(const Call<T, S>& call, int64_t threads) {
        int64_t tiles = 0;
        for (int64_t i = 0; i < call.requests; i++)
            if (call.new_tokens(i) > 1) tiles += call.kv_heads * ((call.num_rows(i) + ROWS - 1) / ROWS);
        return ROWS * std::clamp<int64_t>(tiles / (4 * threads), 1, MAX_TILES);
    }

    void add_tiles(const Call<T, S>& call, int64_t request, int64_t size) {
        const int64_t rows = call.num_rows(request);
        for (int64_t head = 0; head < call.kv_heads; head++)
            for (int64_t row = (rows - 1) / size * size; row >= 0; row -= size)
                tasks.push_back({request, head, 1, row, std::min(size, rows - row), 0, call.seq_lens[request], -1});
    }

    // Halves the heads of tasks until there are so many tasks: heads know nothing of each other. More than one to a thread would take
    // turns to read the same tokens, in smaller pieces.
    void split_heads(int64_t enough) {
        while (!tasks.empty() && int64_t(tasks.size()) < enough && tasks[0].num_heads > 1) {
            const int64_t count = int64_t(tasks.size());
            for (int64_t i = 0; i < count; i++) {
                Task other = tasks[i];
                const int64_t half = other.num_heads / 2;
                other.kv_head += half, other.num_heads -= half, tasks[i].num_heads = half;
                tasks.push_back(other);
            }
        }
    }

    void add_token(const Call<T, S>& call, int64_t request) {
        const bool in_tiles = call.group() >= LARGE_GROUP;
        const int64_t seq_len = call.seq_lens[request], low = call.first_seen(seq_len - 1), size = in_tiles ? TILE_RANGE : RANGE;
        const bool is_split = low / size != (seq_len - 1) / size;
        const int64_t before = partials;
        for (int64_t first = low; first < seq_len; first = first / size * size + size) {
            const int64_t last = std::min(seq_len, first / size * size + size), partial = is_split ? partials++ : -1;
            if (!in_tiles) tasks.push_back({request, 0, call.kv_heads, -1, 0, first, last, partial});
            for (int64_t head = 0; in_tiles && head < call.kv_heads; head++)
                for (int64_t row = 0; row < call.group(); row += ROWS)
                    tasks.push_back({request, head, 1, row, std::min<int64_t>(ROWS, call.group() - row), first, last, partial});
        }
        if (is_split) splits.push_back({call.cu_seqlens_q[request], before, partials});
    }
};

// What is worked on: made by one thread, for all.
template <typename T, typename S>
class Attention {
    Plan<T, S> plan;
    Scratch memory;
    float* partials = nullptr;  // [partials, H, Dv + 2]: largest, sum, values

  public:
    void prepare(const Call<T, S>& call, int64_t threads) {
        plan.make(call, threads);
        const int64_t size = plan.partials * partial_size(call);
        memory.reserve(Scratch::bytes_of<float>(size));
        partials = memory.take<float>(size);
    }

    // On every thread.
    void work(const Call<T, S>& call) {
        thread_local Scratch scratch, tile_scratch;
        std::optional<Tiles<T, S>> tiles;
        const int64_t rows = int64_t(plan.splits.size()) * call.heads;  // read while the plan is sure to be this call's
        share_out(int64_t(plan.tasks.size()), [&](int64_t i) { run_task(call, i, scratch, tiles, tile_scratch); });
        if (rows) share_out(rows, [&](int64_t i) { merge(call, plan.splits[i / call.heads], i % call.heads, scratch); });
    }

  private:
    static int64_t partial_size(const Call<T, S>& call) { return call.heads * (call.head_dim_v + 2); }

    void run_task(const Call<T, S>& call, int64_t i, Scratch& scratch, std::optional<Tiles<T, S>>& tiles, Scratch& tile_scratch) {
        const Task& task = plan.tasks[i];
        const Task* after = i + 1 < int64_t(plan.tasks.size()) ? &task + 1 : nullptr;
        if (task.first_row >= 0) return run_tiles(call, task, after, tiles ? *tiles : tiles.emplace(call, tile_scratch));
        const int64_t group = std::min<int64_t>(call.group(), MAX_SLICE);
        if (group == 1) return run_decode<1>(call, task, after, scratch);
        if (group == 2) return run_decode<2>(call, task, after, scratch);
        if (group <= 4) return run_decode<4>(call, task, after, scratch);
        run_decode<MAX_SLICE>(call, task, after, scratch);
    }

    template <int SLICE>
    void run_decode(const Call<T, S>& call, const Task& task, const Task* after, Scratch& scratch) {
        scratch.reserve(DecodeRange<T, S, SLICE>::bytes(call, task.num_heads, RANGE));
        DecodeRange<T, S, SLICE> range(call, task.kv_head, task.num_heads, scratch, RANGE);
        range.run(task.request, task.first, task.last, after);
        const int64_t first = task.kv_head * call.group(), count = task.num_heads * call.group();
        for (int64_t head = 0; head < count; head++)
            keep(call, task.partial, call.cu_seqlens_q[task.request], first + head, range.row(head));
    }

    void run_tiles(const Call<T, S>& call, const Task& task, const Task* after, Tiles<T, S>& tiles) {
        tiles.run(task, after);
        call.each_row(task.request, task.kv_head, task.first_row, task.num_rows, [&](int64_t i, int64_t token, int64_t head) {
            keep(call, task.partial, token, head, tiles.row(i));
        });
    }

    void keep(const Call<T, S>& call, int64_t partial, int64_t token, int64_t head, Partial row) {
        if (partial < 0) return finish(call, token, head, row);
        float* to = place(call, partial, head);
        to[0] = row.largest, to[1] = row.sum;
        std::copy(row.values, row.values + call.head_dim_v, to + 2);
    }

    float* place(const Call<T, S>& call, int64_t partial, int64_t head) const {
        return partials + partial * partial_size(call) + head * (call.head_dim_v + 2);
    }

    void merge(const Call<T, S>& call, const Split& split, int64_t head, Scratch& scratch) {
        scratch.reserve(Scratch::bytes_of<float>(call.head_dim_v));
        float* values = scratch.take<float>(call.head_dim_v);
        float top = -INFINITE, sum = 0;
        for (int64_t i = split.first; i < split.last; i++) top = std::max(top, place(call, i, head)[0]);
        std::fill(values, values + call.head_dim_v, 0.0f);
        for (int64_t i = split.first; i < split.last; i++) {
            const float *from = place(call, i, head), factor = std::exp(from[0] - top);
            sum += factor * from[1];
            for (int64_t d = 0; d < call.head_dim_v; d++) values[d] += factor * from[2 + d];
        }
        finish(call, split.token, head, {top, sum, values});
    }
};

template <typename T, typename S>
void attend(const Call<T, S>& call, int64_t threads) {
    in_team(threads, [&] {
        thread_local Attention<T, S> own;
        if (me == 0) own.prepare(call, threads);
        (team ? team->of_first(own) : own).work(call);
    });
}

// A kernel over a cache of F where the model has floats, of B where it has bfloat16. bytes: of a number of q and out; sinks and
// alibi have their own.
template <typename F, typename B>
void attend_over(const void* q, const void* cache, const int64_t* page_table, const int32_t* cu_seqlens_q,
                 const int32_t* seq_lens, const void* sinks, const void* alibi, void* out, int64_t bytes, int64_t sinks_bytes,
                 int64_t alibi_bytes, int64_t requests, int64_t heads, int64_t kv_heads, int64_t head_dim_k, int64_t head_dim_v,
                 int64_t width, int64_t page_size, int64_t q_head_stride, int64_t q_token_stride, int64_t q_dim_stride,
                 int64_t page_table_stride, int64_t window, int64_t chunk, int64_t threads, float scale, float softcap) {
    const auto run = [&]<typename T, typename S>(T, S) {
        attend(Call<T, S>{static_cast<const T*>(q), static_cast<const S*>(cache), page_table, cu_seqlens_q, seq_lens,
                       {sinks, sinks_bytes}, {alibi, alibi_bytes}, static_cast<T*>(out), requests, heads, kv_heads, head_dim_k,
                       head_dim_v, width, page_size, q_head_stride, q_token_stride, q_dim_stride, page_table_stride, window,
                       chunk, scale, softcap},
               threads);
    };
    bytes == 4 ? run(float{}, F{}) : run(bf16{}, B{});
}
