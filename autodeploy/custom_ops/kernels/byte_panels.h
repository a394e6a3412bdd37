// Products with panels of bytes, and of halves of bytes. Sums of whole numbers are exact, so no order matters.
#pragma once

#include "panels.h"

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define MULTIPLIES_BYTES

inline IntVec load_words(const void* from) {
    IntVec x;
    memcpy(&x, from, sizeof x);
    return x;
}

// The word at an address in all lanes.
inline IntVec spread_word(const void* from) {
    int32_t word;
    memcpy(&word, from, 4);
    return word - IntVec{};
}

// The nearest whole numbers, ties to even; the least number there is for what is none.
inline IntVec rounded(Vec x) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_cvtps_epi32((__m512)x);
#else
    return (IntVec)_mm256_cvtps_epi32((__m256)x);
#endif
}

// a * b + c, rounded once: where a compiler could choose which of two products that is, rows would depend on those beside them.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// total + products of the four lower halves of bytes of each lane of w, and of the upper ones, with the bytes of x and of y.
inline IntVec add_products(IntVec total, IntVec w, IntVec x, IntVec y) {
    const IntVec low = w & 0x0f0f0f0f, high = w >> 4 & 0x0f0f0f0f;
#if defined(__AVX512VNNI__)
    total = (IntVec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)low, (__m512i)x);
    return (IntVec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)high, (__m512i)y);
#else
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)low, (__m256i)x), others = _mm256_maddubs_epi16((__m256i)high, (__m256i)y);
    return total + (IntVec)_mm256_madd_epi16(_mm256_add_epi16(pairs, others), _mm256_set1_epi16(1));
#endif
}

#if defined(__AVX512VNNI__)

using Code = uint8_t;  // a byte of a number of x, 128 too much
constexpr int TOO_MUCH = 128;

constexpr int codes_of(int bytes) { return bytes; }                                                  // of a number of so many bytes
constexpr int64_t span_of(int) { return std::numeric_limits<int64_t>::max() / 2; }  // columns whose sums surely fit in 32 bits

// Numbers of x [count], at most LANES, as codes.
inline void put_codes(Code* to, IntVec numbers, int64_t count) {
    const auto codes = resized<CodeVec>((WordVec)(numbers + TOO_MUCH));
    memcpy(to, &codes, count);
}

struct ByteDot {
    using Sum = int32_t;
    using Sums = __m512i;
    static __m512i get(const int32_t* from) { return _mm512_loadu_si512(from); }
    static void put(int32_t* to, __m512i sums) { _mm512_storeu_si512(to, sums); }
    static __m512i add(__m512i sums, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sums, x, w); }
};

// sums [rows][64] += rows of x times a panel.
inline void multiply_byte_panel(const Code* x, int64_t stride, const char* panel, int64_t rows, int64_t words, int64_t depth, int32_t* sums) {
    multiply_panel<ByteDot>((const char*)x, stride, panel, rows, words, depth, sums);
}

#else

// With AVX2 alone bytes are widened to 16 bits. There is a product of bytes, but it sums pairs in 16 bits, which is too few for them.
// The four columns of a word of a panel are in the order 0, 2, 1, 3 in x.
using Code = int16_t;
constexpr int TOO_MUCH = 0;

constexpr int codes_of(int) { return 1; }
constexpr int64_t span_of(int bytes) { return bytes == 1 ? 1 << 16 : 1 << 9; }

constexpr int BYTE_DEPTH = 64;  // words of a panel that are multiplied with all rows before the next ones: 16 KB

inline void put_codes(Code* to, IntVec numbers, int64_t count) {
    const auto codes = resized<HalfVec>(__builtin_shufflevector((WordVec)numbers, (WordVec)numbers, 0, 2, 1, 3, 4, 6, 5, 7));
    memcpy(to, &codes, count * sizeof(Code));
}

// sums [M][64] += x [M][4 * words] times a panel's part, of which some vectors at once: a multiple of the line, from `panel` on.
template <int M, int GROUPS>
inline void multiply_bytes(const Code* x, int64_t stride, const char* panel, int64_t words, int32_t* sums, const char* next) {
    constexpr int C = vectors_at_once(M), FETCHED = M == 1 ? 0 : fetched_by(GROUPS) * C / LINE_VECTORS;
    __m256i total[M][C];
    EACH(int m = 0; m < M; m++)
    EACH(int c = 0; c < C; c++) total[m][c] = (__m256i)load_words(sums + m * WIDTH + c * LANES);
    for (int64_t word = 0; word < words; word++, panel += LINE, next += FETCHED) {
        EACH(int at = 0; at < FETCHED; at += 64) __builtin_prefetch(next + at, 0, 2);
        EACH(int c = 0; c < C; c++) {
            const __m256i w = (__m256i)load_words(panel + c * 4 * LANES);
            const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd = _mm256_srai_epi16(w, 8);
            EACH(int m = 0; m < M; m++) {
                const Code* four = x + m * stride + 4 * word;
                total[m][c] = _mm256_add_epi32(total[m][c], _mm256_madd_epi16(even, (__m256i)spread_word(four)));
                total[m][c] = _mm256_add_epi32(total[m][c], _mm256_madd_epi16(odd, (__m256i)spread_word(four + 2)));
            }
        }
    }
    EACH(int m = 0; m < M; m++)
    EACH(int c = 0; c < C; c++) memcpy(sums + m * WIDTH + c * LANES, &total[m][c], sizeof total[m][c]);
}

// sums [count][64] += a row of x times parts of some panels, which are `step` bytes apart, in turns.
inline void multiply_byte_row(const Code* x, const char* panels, int64_t step, int64_t count, int64_t words, int32_t* sums) {
    for (int64_t word = 0; word < words; word += TURN)
        for (int64_t panel = 0; panel < count; panel++)
            multiply_bytes<1, 1>(x + 4 * word, 0, panels + panel * step + word * LINE, std::min<int64_t>(TURN, words - word),
                                 sums + panel * WIDTH, nullptr);
}

// sums [rows][64] += rows of x times a panel.
inline void multiply_byte_panel(const Code* x, int64_t stride, const char* panel, int64_t rows, int64_t words, int64_t, int32_t* sums) {
    in_parts(
        panel, rows, words, BYTE_DEPTH, [](int64_t, int64_t, int64_t) {},
        [&]<int M, int GROUPS>(int64_t top, int64_t word, int64_t part, int c, const char* next) {
            multiply_bytes<M, GROUPS>(x + top * stride + 4 * word, stride, panel + word * LINE + c * LANES * 4, part,
                                      sums + top * WIDTH + c * LANES, next);
        });
}

#endif
#endif
