// The AVX2 + FMA + F16C instance of the Simd interface. See docs/interfaces.md.
// Include only from translation units compiled with the AVX2 flags: everything here must inline.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/simd/common.h"

namespace nybble {

struct Avx2 {
    static constexpr int lanes = 8;
    static constexpr int max_tile = 4;  // 16 registers: 4 accumulators beside codes and scales
    using F = __m256;
    using I = __m256i;
    using B = __m256i;

    // ---- float ----
    NYBBLE_SIMD F zero() { return _mm256_setzero_ps(); }
    NYBBLE_SIMD F set1(float x) { return _mm256_set1_ps(x); }
    NYBBLE_SIMD F load(const float* p) { return _mm256_loadu_ps(p); }
    NYBBLE_SIMD void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    NYBBLE_SIMD F add(F a, F b) { return _mm256_add_ps(a, b); }
    NYBBLE_SIMD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    NYBBLE_SIMD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    NYBBLE_SIMD F div(F a, F b) { return _mm256_div_ps(a, b); }
    NYBBLE_SIMD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    // max and min return the second operand when either is NaN (in every instance).
    NYBBLE_SIMD F max(F a, F b) { return _mm256_max_ps(a, b); }
    NYBBLE_SIMD F min(F a, F b) { return _mm256_min_ps(a, b); }
    NYBBLE_SIMD F sqrt(F a) { return _mm256_sqrt_ps(a); }
    NYBBLE_SIMD F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

    NYBBLE_SIMD F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    // E4M3, divided by 256 (quant/packed_float8.h): widened with its sign, whose copies the mask takes off.
    NYBBLE_SIMD F load_e4m3(const uint8_t* p) {
        __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
        return _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbf80)));
    }
    NYBBLE_SIMD void store_f16(uint16_t* p, F x) {
        F clamped = min(max(x, set1(-65504.0f)), set1(65504.0f));
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT));
    }
    NYBBLE_SIMD F load_bf16(const uint16_t* p) {
        I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }

    NYBBLE_SIMD float reduce_add(F x) {
        __m128 quad = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        quad = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
        return _mm_cvtss_f32(_mm_add_ss(quad, _mm_movehdup_ps(quad)));
    }
    NYBBLE_SIMD float reduce_max(F x) {
        __m128 quad = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        quad = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
        return _mm_cvtss_f32(_mm_max_ss(quad, _mm_movehdup_ps(quad)));
    }
    // a * 2^n in two steps, because n of exp() may leave the range of one exponent field.
    NYBBLE_SIMD F scale_by_power_of_2(F a, F n) {
        I whole = cvt_round(n);
        I first = _mm256_srai_epi32(whole, 1);
        I second = isub(whole, first);
        I bias = iset1(127);
        F scaled = mul(a, as_float(ishl<23>(iadd(first, bias))));
        return mul(scaled, as_float(ishl<23>(iadd(second, bias))));
    }
    NYBBLE_SIMD F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    NYBBLE_SIMD F exp(F x) { return simd_exp<Avx2>(x); }

    // ---- int32 ----
    NYBBLE_SIMD I iset1(int32_t x) { return _mm256_set1_epi32(x); }
    NYBBLE_SIMD I iload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
    NYBBLE_SIMD I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    NYBBLE_SIMD I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
    NYBBLE_SIMD I iand(I a, I b) { return _mm256_and_si256(a, b); }
    NYBBLE_SIMD I ior(I a, I b) { return _mm256_or_si256(a, b); }
    template <int n>
    NYBBLE_SIMD I ishl(I a) {
        return _mm256_slli_epi32(a, n);
    }
    template <int n>
    NYBBLE_SIMD I ishr(I a) {
        return _mm256_srli_epi32(a, n);
    }
    NYBBLE_SIMD F cvt(I a) { return _mm256_cvtepi32_ps(a); }
    NYBBLE_SIMD F as_float(I a) { return _mm256_castsi256_ps(a); }
    NYBBLE_SIMD I cvt_round(F a) { return _mm256_cvtps_epi32(a); }  // the default mode is nearest even
    NYBBLE_SIMD I load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
    NYBBLE_SIMD I load_i8(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
    NYBBLE_SIMD void store_i8(int8_t* p, I x) {
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
    }
    NYBBLE_SIMD void store_i16(int16_t* p, I x) {
        _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
    }
    // Two codes for each lane, as 16 bits each, the first one below; see dot2.
    NYBBLE_SIMD I load_i8_pairs(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
    // The sum of 16 codes. psadbw adds bytes without signs, so they are moved up by 128 first.
    NYBBLE_SIMD int32_t sum16(const int8_t* p) {
        const __m128i moved = _mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8((char)0x80));
        const __m128i sums = _mm_sad_epu8(moved, _mm_setzero_si128());
        return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 16 * 128;
    }
    NYBBLE_SIMD int32_t ireduce_add(I x) {
        __m128i quad = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        quad = _mm_add_epi32(quad, _mm_shuffle_epi32(quad, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(quad, _mm_shuffle_epi32(quad, 0xb1)));
    }
    // Makes x opaque to the optimiser, for loops that only measure.
    template <class V>
    NYBBLE_SIMD void keep(V& x) {
        __asm__ volatile("" : "+x"(x));
    }

    // ---- bytes, 4 per lane ----
    NYBBLE_SIMD B bload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
    NYBBLE_SIMD B bset1(uint8_t x) { return _mm256_set1_epi8((char)x); }
    NYBBLE_SIMD B band(B a, B b) { return _mm256_and_si256(a, b); }
    NYBBLE_SIMD B bor(B a, B b) { return _mm256_or_si256(a, b); }
    NYBBLE_SIMD B bxor(B a, B b) { return _mm256_xor_si256(a, b); }
    template <int n>
    NYBBLE_SIMD B bshr(B a) {
        return band(_mm256_srli_epi16(a, n), bset1((uint8_t)(0xff >> n)));
    }
    template <int n>
    NYBBLE_SIMD B bshl(B a) {
        return band(_mm256_slli_epi16(a, n), bset1((uint8_t)(0xff << n)));
    }
    NYBBLE_SIMD B lut16(B index, const uint8_t table[16]) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), index);
    }
    NYBBLE_SIMD I as_int(B a) { return a; }

    // ---- products ----
    // acc[r] += sum over j of w[4r+j] * a[j], exact. vpmaddubsw saturates at 16 bits, which two products of codes up
    // to 127 cannot reach; larger codes are split into their low seven bits and their top bit (128 * -128 * 2 fits).
    template <int max_code = 255>
    NYBBLE_SIMD I dot4(I acc, B w, const int8_t* a) {
        I act = broadcast4(a);
        I ones = _mm256_set1_epi16(1);
        if constexpr (max_code <= 127) {
            return iadd(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, act), ones));
        } else {
            I low = _mm256_madd_epi16(_mm256_maddubs_epi16(band(w, bset1(0x7f)), act), ones);
            I high = _mm256_madd_epi16(_mm256_maddubs_epi16(band(w, bset1(0x80)), act), ones);
            return iadd(acc, iadd(low, high));
        }
    }
    // dot4 of `count` vectors in a row. Small codes leave room to sum several vectors in 16 bits before widening.
    template <int max_code, int count>
    NYBBLE_SIMD I dot(I acc, const B* w, const int8_t* a) {
        constexpr int room = 32767 / (2 * 128 * max_code);
        constexpr int run = room >= count ? count : room >= 4 ? 4 : room >= 2 ? 2 : 1;
        if constexpr (run == 1) {
#pragma GCC unroll 8
            for (int v = 0; v < count; ++v) acc = dot4<max_code>(acc, w[v], a + 4 * v);
        } else {
#pragma GCC unroll 8
            for (int v = 0; v < count; v += run) {
                I words = _mm256_maddubs_epi16(w[v], broadcast4(a + 4 * v));
#pragma GCC unroll 8
                for (int i = v + 1; i < v + run; ++i) {
                    words = _mm256_add_epi16(words, _mm256_maddubs_epi16(w[i], broadcast4(a + 4 * i)));
                }
                acc = iadd(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
            }
        }
        return acc;
    }
    // acc[r] += a.low * b.low + a.high * b.high of 16-bit halves, exact while the sum fits.
    NYBBLE_SIMD I dot2(I acc, I a, I b) { return iadd(acc, _mm256_madd_epi16(a, b)); }
    // The sum of (w - 128) * a for codes of full range and a within +-127: half the work of undoing the offset later.
    static constexpr bool has_offset_dot = true;
    template <int count>
    NYBBLE_SIMD I offset_dot(const B* w, const int8_t* a) {
        I acc = iset1(0);
#pragma GCC unroll 8
        for (int v = 0; v < count; ++v) {
            const B code = bxor(w[v], bset1(0x80));
            const I words = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(broadcast4(a + 4 * v), code));
            acc = iadd(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
        }
        return acc;
    }
    // The start of a sum whose codes carry an offset of 2^shift: -offset * sum(a), broadcast.
    template <int shift>
    NYBBLE_SIMD I start(const int32_t* neg_sum) {
        return _mm256_slli_epi32(_mm256_set1_epi32(*neg_sum), shift);
    }
    NYBBLE_SIMD I start(const int32_t* neg_sum, int shift) {
        return _mm256_slli_epi32(_mm256_set1_epi32(*neg_sum), shift);
    }

private:
    NYBBLE_SIMD I broadcast4(const int8_t* a) {
        int32_t four;
        std::memcpy(&four, a, 4);
        return _mm256_set1_epi32(four);
    }
};

}  // namespace nybble
