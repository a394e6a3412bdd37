// Paged attention: what one call is given, how its numbers are multiplied, and how a row of the output is completed.
#pragma once

#include <cstdlib>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cache.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// A part of the work of a call, for one thread.
struct Task {
    int64_t request, kv_head, num_heads;  // heads of the cache; of tiles one
    int64_t first_row, num_rows;          // of tiles; -1: one token
    int64_t first, last;                  // keys; of tiles, as far as their rows see them
    int64_t partial;                      // where its result goes; -1: it is the whole
};

// One number for each head, of float or bf16.
struct PerHead {
    const void* numbers;
    int64_t bytes;  // of one number

    float operator[](int64_t head) const {
        return bytes == 4 ? static_cast<const float*>(numbers)[head] : widen(static_cast<const bf16*>(numbers)[head]);
    }
};

// The arguments of a call. Lengths are read when it runs: only shapes and addresses may be remembered from call to call.
template <typename T, typename S>
struct Call {
    const T* q;                   // [H, T, Dk], strided
    const S* cache;               // [pages, page, Hkv, width]: keys are the first Dk numbers, values the last Dv before any scales
    const int64_t* page_table;    // [B, P], rows strided
    const int32_t* cu_seqlens_q;  // [B + 1]
    const int32_t* seq_lens;      // [B]
    PerHead sinks, alibi;         // [H], or null
    T* out;                       // [T, H, Dv]
    int64_t requests, heads, kv_heads, head_dim_k, head_dim_v, width, page_size;
    int64_t q_head_stride, q_token_stride, q_dim_stride, page_table_stride;
    int64_t window, chunk;
    float scale, softcap;

    int64_t group() const { return heads / kv_heads; }
    int64_t new_tokens(int64_t request) const { return cu_seqlens_q[request + 1] - cu_seqlens_q[request]; }

    // Rows of a request and a head of the cache: new tokens, each with the heads of the group.
    int64_t num_rows(int64_t request) const { return new_tokens(request) * group(); }

    // Calls visit(i, token, head) for each of so many rows.
    template <typename Visit>
    void each_row(int64_t request, int64_t kv_head, int64_t first_row, int64_t count, Visit visit) const {
        const int64_t size = group(), first_head = kv_head * size;
        int64_t token = cu_seqlens_q[request] + first_row / size, head = first_head + first_row % size;
        for (int64_t i = 0; i < count; i++) {
            visit(i, token, head);
            if (++head == first_head + size) token++, head = first_head;
        }
    }

    // Position of the first key that a query at that position sees.
    int64_t first_seen(int64_t position) const {
        const int64_t in_window = window ? std::max<int64_t>(0, position - window + 1) : 0;
        return chunk ? std::max(in_window, position / chunk * chunk) : in_window;
    }

    // Where the values of a row of the cache start.
    int64_t values() const { return width - SCALE_BYTES<T, S> - head_dim_v; }

    // Of the keys (0) or values (1) of tokens at that place, which are no multiples of scales where T is S.
    void find_scales(const S* const* tokens, int64_t count, int64_t place, int which, float* found) const {
        if constexpr (IS_SCALED<T, S>)
            for (int64_t i = 0; i < count; i++) found[i] = scale_of(tokens[i] + place, width, which);
    }

    // Addresses of the tokens [first, last) of a request, each with all its heads.
    void find_tokens(int64_t request, int64_t first, int64_t last, const S** found) const {
        const int64_t* page = page_table + request * page_table_stride + first / page_size;
        int64_t within = first % page_size;
        for (int64_t i = 0; i < last - first; i++, within++) {
            if (within == page_size) page++, within = 0;
            found[i] = cache + (*page * page_size + within) * kv_heads * width;
        }
    }

    // Numbers d.. of a query as an operand of M, zeros behind the last.
    template <class M>
    auto operand(const T* query, int64_t d) const {
        const int64_t count = head_dim_k - d;
        if (q_dim_stride == 1) return M::read(query + d, count);
        T some[M::WIDTH] = {};
        for (int64_t i = 0; i < std::min<int64_t>(M::WIDTH, count); i++) some[i] = query[(d + i) * q_dim_stride];
        return M::read(some, M::WIDTH);
    }

    const T* query(int64_t token, int64_t head) const { return q + token * q_token_stride + head * q_head_stride; }
    T* output(int64_t token, int64_t head) const { return out + (token * heads + head) * head_dim_v; }
};

// Products of single floats; numbers of a cache are widened to float when they are read.
struct Singles {
    using Stored = float;  // a number of q, or of a copy of keys
    using Unit = float;    // what one lane of an operand holds: TOGETHER stored numbers
    using Operand = Vec;
    using Value = Vec;     // an operand that was interleaved
    static constexpr int TOGETHER = 1, WIDTH = LANES;  // stored numbers of a unit, of an operand
    static constexpr int KEYS = LANES == 16 ? 96 : 64, HIGH = LANES >= 8 ? 6 : 4;  // of a tile at a time, of them in registers

    static Operand load(const Unit* from) { return ::load(from); }
    static Operand spread(Unit x) { return all(x); }
    static Vec dot(Vec total, Operand a, Operand b) { return total + a * b; }

    // The next `count` numbers, zeros after them.
    template <typename S>
    static Operand read(const S* from, int64_t count) {
        if (count >= WIDTH) return ::load(from);
        S some[WIDTH] = {};
        memcpy(some, from, count * sizeof(S));
        return ::load(some);
    }

    // Numbers of TOGETHER tokens, so that a lane holds the same number of each.
    template <typename S>
    static void interleave(const S* const* tokens, int64_t offset, int64_t count, Value* into) {
        into[0] = read(tokens[0] + offset, count);
    }

    // Weights [TOGETHER] of rows of lanes as units.
    static void pack(const Vec* weights, Unit* into) { store(into, weights[0]); }

    // Sums of columns that were interleaved, in their order.
    static void in_order(float*, int64_t) {}
};

// The first of so many numbers, zeros behind them.
inline WordVec some_of(const bf16* from, int64_t count) {
#if defined(__AVX512F__)
    if (count < 2 * LANES) return (WordVec)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), from);
#endif
    WordVec some = {};
    memcpy(&some, from, std::min<int64_t>(count, 2 * LANES) * sizeof *from);
    return some;
}

// Products of single floats that are read from bf16 two vectors at a time: the numbers at even places, and those at odd ones.
struct Halves : Singles {
    struct Operand {
        Vec even, odd;
    };
    static constexpr int WIDTH = 2 * LANES;

    static Operand load(const float* from) { return {::load(from), ::load(from + LANES)}; }
    static Operand read(const bf16* from, int64_t count) {
        const WordVec both = some_of(from, count);
        return {__builtin_bit_cast(Vec, both << 16), __builtin_bit_cast(Vec, both & 0xffff0000)};
    }
    static void interleave(const bf16* const* tokens, int64_t offset, int64_t count, Value* into) {
        const Operand both = read(tokens[0] + offset, count);
        into[0] = both.even, into[1] = both.odd;
    }

    using Singles::dot;
    static Vec dot(Vec total, Operand a, Operand b) { return total + a.even * b.even + a.odd * b.odd; }

    static void in_order(float* sums, int64_t count) {
        for (float* end = sums + count; sums < end; sums += WIDTH) {
            const auto [low, high] = zipped(::load(sums), ::load(sums + LANES), std::make_integer_sequence<int, LANES>{});
            store(sums, low), store(sums + LANES, high);
        }
    }

  private:
    // a0, b0, a1, b1, ..
    template <int... lane>
    static std::pair<Vec, Vec> zipped(Vec a, Vec b, std::integer_sequence<int, lane...>) {
        return {__builtin_shufflevector(a, b, (lane / 2 + lane % 2 * LANES)...),
                __builtin_shufflevector(a, b, (LANES / 2 + lane / 2 + lane % 2 * LANES)...)};
    }
};

#if defined(__AVX512BF16__)

// Products of pairs of bf16, summed in float by the CPU's own instruction.
struct Pairs {
    using Stored = bf16;
    using Unit = uint32_t;
    using Operand = __m512bh;
    using Value = Operand;
    static constexpr int TOGETHER = 2, WIDTH = 2 * LANES, KEYS = 64, HIGH = 4;

    static Operand load(const Unit* from) { return (Operand)_mm512_loadu_si512(from); }
    static Operand spread(Unit x) { return (Operand)_mm512_set1_epi32(int32_t(x)); }
    static Vec dot(Vec total, Operand a, Operand b) { return _mm512_dpbf16_ps(total, a, b); }

    static __m512i words(const bf16* from, int64_t count) { return (__m512i)some_of(from, count); }
    static __m512i words(const int8_t* from, int64_t count) {
        const __mmask32 given = count >= WIDTH ? ~__mmask32(0) : __mmask32((uint64_t(1) << count) - 1);
        const __m512i whole = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(given, from));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(whole)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(whole, 1)));
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    static __m512i words(const e4m3* from, int64_t count) {
        alignas(64) static constexpr uint16_t SMALL[WIDTH] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
        const __mmask32 given = count >= WIDTH ? ~__mmask32(0) : __mmask32((uint64_t(1) << count) - 1);
        const __m512i codes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(given, from));
        const __m512i size = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
        const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
        const __mmask32 is_small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
        const __m512i wide = _mm512_mask_permutexvar_epi16(normal, is_small, size, _mm512_load_si512(SMALL));
        return _mm512_or_si512(wide, _mm512_slli_epi16(_mm512_srli_epi16(codes, 7), 15));
    }
    template <typename S>
    static Operand read(const S* from, int64_t count) {
        return (Operand)words(from, count);
    }

    template <typename S>
    static void interleave(const S* const* tokens, int64_t offset, int64_t count, Value* into) {
        const __m512i first = words(tokens[0] + offset, count), second = words(tokens[1] + offset, count);
        into[0] = (Operand)_mm512_permutex2var_epi16(first, alternating(0), second);
        into[1] = (Operand)_mm512_permutex2var_epi16(first, alternating(16), second);
    }

    static void pack(const Vec* weights, Unit* into) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]);
        _mm512_storeu_si512(into, _mm512_permutex2var_epi16(both, alternating(0), _mm512_shuffle_i64x2(both, both, 0x4e)));
    }
    static void in_order(float*, int64_t) {}

    // Indices of words start, start + 1, .. of a first vector, each followed by the same one of a second vector.
    static __m512i alternating(int start) {
        const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i twice = _mm512_or_si512(count, _mm512_slli_epi32(count, 16));
        return _mm512_add_epi32(twice, _mm512_set1_epi32((32 + start) << 16 | start));
    }
};

template <typename T>
using Math = std::conditional_t<std::is_same_v<T, bf16>, Pairs, Singles>;

#else

template <typename T>
using Math = Singles;

#endif

// Where every number of a cache is used by few rows, so that reading it counts.
template <typename T, typename S>
using Streamed = std::conditional_t<std::is_same_v<Math<T>, Singles> && std::is_same_v<S, bf16>, Halves, Math<T>>;

// Memory of a thread that grows to what the largest call needs, and stays. Sanitizers get a gap behind each part to watch.
class Scratch {
  public:
    void reserve(int64_t bytes) {
        if (bytes > size) {
            size = round_up(bytes, 4096);
            memory.reset(static_cast<char*>(std::aligned_alloc(64, size)));
        }
        used = 0;
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(memory.get(), size);
#endif
    }

    template <typename U>
    U* take(int64_t count) {
        U* taken = reinterpret_cast<U*>(memory.get() + used);
        used += bytes_of<U>(count);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(taken + count, memory.get() + used - reinterpret_cast<char*>(taken + count));
#endif
        return taken;
    }

    template <typename U>
    static int64_t bytes_of(int64_t count) {
        return round_up(count * sizeof(U), 64) + GAP;
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory;
    int64_t size = 0, used = 0;
#if defined(__SANITIZE_ADDRESS__)
    static constexpr int64_t GAP = 64;
#else
    static constexpr int64_t GAP = 0;
#endif
};

// softcap * tanh(score / softcap), to about the last bit: a polynomial near 0, where 1 - 2 / (e^2x + 1) would lose digits.
inline Vec capped(Vec score, float softcap) {
    const Vec x = score / softcap, size = x < 0 ? -x : x, square = x * x;
    Vec p = all(-5.70498872745e-3f);
    for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) p = p * square + c;
    const Vec far = 1 - 2 / (exp(2 * size) + 1);
    return softcap * (size < 0.625f ? x + x * square * p : x < 0 ? -far : far);
}

// Scores [count, LANES], those of a key `step` behind those of the one before and yet to be multiplied by a scale, become weights
// relative to the largest score of each lane so far. Those of earlier keys are to be multiplied by factors. scaled: weights of a key
// as values are multiplied by them.
template <class M, typename Scaled>
inline void to_weights(const float* scores, int64_t step, int64_t count, float scale, float* largest, float* sum, float* factors,
                       typename M::Unit* weights, Scaled scaled) {
    Vec found[4] = {all(-INFINITE), all(-INFINITE), all(-INFINITE), all(-INFINITE)};  // a CPU compares four at once
    for (int64_t k = 0; k < count; k += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) found[j] = larger(found[j], load(scores + std::min(k + j, count - 1) * step));
    const Vec highest = larger(larger(found[0], found[1]), larger(found[2], found[3])), before = load(largest);
    const Vec top = larger(before, highest * scale), base = top == -INFINITE ? Vec{} : top, factor = exp(before - base);
    const Vec zero = base * LOG2_E;
    Vec total = load(sum) * factor;
    for (int64_t k = 0; k < count; k += M::TOGETHER) {
        Vec some[2] = {};
        for (int64_t j = k; j < std::min(k + M::TOGETHER, count); j++) {
            const Vec weight = exp2_of_small(load(scores + j * step) * (scale * LOG2_E) - zero);
            total += weight;
            some[j - k] = scaled(j, weight);
        }
        M::pack(some, weights + k / M::TOGETHER * step);
    }
    store(sum, total);
    store(largest, top);
    store(factors, factor);
}

// What a row of queries has found among some keys.
struct Partial {
    float largest;      // score
    float sum;          // of exp(score - largest)
    const float* values;  // [Dv], of exp(score - largest) * value
};

// Writes a row of the output: the sum of values over the sum of weights, a sink among them.
template <typename T, typename S>
inline void finish(const Call<T, S>& call, int64_t token, int64_t head, Partial row) {
    float top = row.largest, before = 1, total = row.sum;
    if (call.sinks.numbers) {
        const float sink = call.sinks[head];
        top = std::max(top, sink);
        before = std::exp(row.largest - top);
        total = row.sum * before + std::exp(sink - top);
    }
    T* out = call.output(token, head);
    const float factor = before / total;
    int64_t d = 0;
    for (; d + LANES <= call.head_dim_v; d += LANES) store(out + d, load(row.values + d) * factor);
    for (; d < call.head_dim_v; d++) store_one(out + d, row.values[d] * factor);
}
