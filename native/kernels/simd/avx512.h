// The AVX-512 (F, BW, VL, DQ, VNNI) instance of the Simd interface. See docs/interfaces.md.
// Include only from translation units compiled with the AVX-512 flags: everything here must inline.
#pragma once

// GCC 12's own intrinsics warn about their deliberately undefined operands.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>

#include "kernels/simd/common.h"

namespace nybble {

struct Avx512 {
    static constexpr int lanes = 16;
    static constexpr int max_tile = 16;  // tokens whose accumulators fit the 32 registers
    using F = __m512;
    using I = __m512i;
    using B = __m512i;

    // ---- float ----
    NYBBLE_SIMD F zero() { return _mm512_setzero_ps(); }
    NYBBLE_SIMD F set1(float x) { return _mm512_set1_ps(x); }
    NYBBLE_SIMD F load(const float* p) { return _mm512_loadu_ps(p); }
    NYBBLE_SIMD void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    NYBBLE_SIMD F add(F a, F b) { return _mm512_add_ps(a, b); }
    NYBBLE_SIMD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    NYBBLE_SIMD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    NYBBLE_SIMD F div(F a, F b) { return _mm512_div_ps(a, b); }
    NYBBLE_SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    // max and min return the second operand when either is NaN (in every instance).
    NYBBLE_SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
    NYBBLE_SIMD F min(F a, F b) { return _mm512_min_ps(a, b); }
    NYBBLE_SIMD F sqrt(F a) { return _mm512_sqrt_ps(a); }
    NYBBLE_SIMD F abs(F a) { return _mm512_abs_ps(a); }

    NYBBLE_SIMD F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    // E4M3, divided by 256 (quant/packed_float8.h): widened with its sign, whose copies the mask takes off.
    NYBBLE_SIMD F load_e4m3(const uint8_t* p) {
        __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
        return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbf80)));
    }
    NYBBLE_SIMD void store_f16(uint16_t* p, F x) {
        F clamped = min(max(x, set1(-65504.0f)), set1(65504.0f));
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    NYBBLE_SIMD F load_bf16(const uint16_t* p) {
        I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }

    NYBBLE_SIMD float reduce_add(F x) {
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        __m128 quad = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        quad = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
        return _mm_cvtss_f32(_mm_add_ss(quad, _mm_movehdup_ps(quad)));
    }
    NYBBLE_SIMD float reduce_max(F x) {
        __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        __m128 quad = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        quad = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
        return _mm_cvtss_f32(_mm_max_ss(quad, _mm_movehdup_ps(quad)));
    }
    // a * 2^n for the n of exp(); lets exp() stay one template.
    NYBBLE_SIMD F scale_by_power_of_2(F a, F n) { return _mm512_scalef_ps(a, n); }
    NYBBLE_SIMD F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    NYBBLE_SIMD F exp(F x) { return simd_exp<Avx512>(x); }

    // ---- int32 ----
    NYBBLE_SIMD I iset1(int32_t x) { return _mm512_set1_epi32(x); }
    NYBBLE_SIMD I iload(const void* p) { return _mm512_loadu_si512(p); }
    NYBBLE_SIMD I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    NYBBLE_SIMD I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    NYBBLE_SIMD I iand(I a, I b) { return _mm512_and_si512(a, b); }
    NYBBLE_SIMD I ior(I a, I b) { return _mm512_or_si512(a, b); }
    template <int n>
    NYBBLE_SIMD I ishl(I a) {
        return _mm512_slli_epi32(a, n);
    }
    template <int n>
    NYBBLE_SIMD I ishr(I a) {
        return _mm512_srli_epi32(a, n);
    }
    NYBBLE_SIMD F cvt(I a) { return _mm512_cvtepi32_ps(a); }
    NYBBLE_SIMD F as_float(I a) { return _mm512_castsi512_ps(a); }
    NYBBLE_SIMD I cvt_round(F a) { return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    NYBBLE_SIMD I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
    NYBBLE_SIMD I load_i8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
    NYBBLE_SIMD void store_i8(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
    NYBBLE_SIMD void store_i16(int16_t* p, I x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x)); }
    // Two codes for each lane, as 16 bits each, the first one below; see dot2.
    NYBBLE_SIMD I load_i8_pairs(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
    // The sum of 16 codes. psadbw adds bytes without signs, so they are moved up by 128 first.
    NYBBLE_SIMD int32_t sum16(const int8_t* p) {
        const __m128i moved = _mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8((char)0x80));
        const __m128i sums = _mm_sad_epu8(moved, _mm_setzero_si128());
        return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 16 * 128;
    }
    NYBBLE_SIMD int32_t ireduce_add(I x) { return _mm512_reduce_add_epi32(x); }
    // Makes x opaque to the optimiser, for loops that only measure.
    template <class V>
    NYBBLE_SIMD void keep(V& x) {
        __asm__ volatile("" : "+v"(x));
    }

    // ---- bytes, 4 per lane ----
    NYBBLE_SIMD B bload(const void* p) { return _mm512_loadu_si512(p); }
    NYBBLE_SIMD B bset1(uint8_t x) { return _mm512_set1_epi8((char)x); }
    NYBBLE_SIMD B band(B a, B b) { return _mm512_and_si512(a, b); }
    NYBBLE_SIMD B bor(B a, B b) { return _mm512_or_si512(a, b); }
    NYBBLE_SIMD B bxor(B a, B b) { return _mm512_xor_si512(a, b); }
    template <int n>
    NYBBLE_SIMD B bshr(B a) {
        return band(_mm512_srli_epi16(a, n), bset1((uint8_t)(0xff >> n)));
    }
    template <int n>
    NYBBLE_SIMD B bshl(B a) {
        return band(_mm512_slli_epi16(a, n), bset1((uint8_t)(0xff << n)));
    }
    NYBBLE_SIMD B lut16(B index, const uint8_t table[16]) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), index);
    }
    NYBBLE_SIMD I as_int(B a) { return a; }

    // ---- products ----
    // acc[r] += sum over j of w[4r+j] * a[j]; max_code bounds w (only AVX2 cares).
    template <int max_code = 255>
    NYBBLE_SIMD I dot4(I acc, B w, const int8_t* a) {
        int32_t four;
        std::memcpy(&four, a, 4);
        return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
    }
    // dot4 of `count` vectors in a row. Eight go through two chains (the sums are exact, so the order is free): with
    // one, the scheduler fills with waiting products before the multipliers are busy.
    template <int max_code, int count>
    NYBBLE_SIMD I dot(I acc, const B* w, const int8_t* a) {
        if constexpr (count == 8) {
            return iadd(dot<max_code, 4>(acc, w, a), dot<max_code, 4>(iset1(0), w + 4, a + 16));
        } else {
#pragma GCC unroll 4
            for (int v = 0; v < count; ++v) acc = dot4(acc, w[v], a + 4 * v);
            return acc;
        }
    }
    // acc[r] += a.low * b.low + a.high * b.high of 16-bit halves, exact while the sum fits.
    NYBBLE_SIMD I dot2(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }
    static constexpr bool has_offset_dot = false;  // see avx2.h
    // The start of a sum whose codes carry an offset of 2^shift: -offset * sum(a), broadcast.
    template <int shift>
    NYBBLE_SIMD I start(const int32_t* neg_sum) {
        return _mm512_slli_epi32(_mm512_set1_epi32(*neg_sum), shift);
    }
    NYBBLE_SIMD I start(const int32_t* neg_sum, int shift) {
        return _mm512_slli_epi32(_mm512_set1_epi32(*neg_sum), (unsigned)shift);
    }
};

}  // namespace nybble
