// Products of bfloat16 out of floats, so that the kernels for CPUs that have them run on AVX-512 alone.
#pragma once
#include <immintrin.h>

// The odd pairs first, as the instruction does.
static inline __m512 emulated_dot(__m512 sums, __m512bh a, __m512bh b) {
    const __m512i x = (__m512i)a, y = (__m512i)b, odd = _mm512_set1_epi32(int(0xffff0000));
    sums = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, odd), (__m512)_mm512_and_si512(y, odd), sums);
    return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), sums);
}

static inline __m256i emulated_half(__m512 x) {
    const __m512i bits = (__m512i)x, last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), last));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000)), 16));
}

static inline __m512bh emulated_halves(__m512 high, __m512 low) {
    return (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512(emulated_half(low)), emulated_half(high), 1);
}

#define _mm512_dpbf16_ps emulated_dot
#define _mm512_cvtne2ps_pbh emulated_halves
