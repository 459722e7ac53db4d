// The portable instance of the Simd interface: four lanes in the compiler's vector extension, no fused multiply-add.
// It is the reference that every other instance is tested against.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "kernels/simd/common.h"
#include "quant/packed_float8.h"

namespace nybble {

struct Generic {
    static constexpr int lanes = 4;
    static constexpr int max_tile = 4;
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));
    typedef uint8_t B __attribute__((vector_size(16)));

    // ---- float ----
    NYBBLE_SIMD F zero() { return F{}; }
    NYBBLE_SIMD F set1(float x) { return F{x, x, x, x}; }
    NYBBLE_SIMD F load(const float* p) { return read<F>(p); }
    NYBBLE_SIMD void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
    NYBBLE_SIMD F add(F a, F b) { return a + b; }
    NYBBLE_SIMD F sub(F a, F b) { return a - b; }
    NYBBLE_SIMD F mul(F a, F b) { return a * b; }
    NYBBLE_SIMD F div(F a, F b) { return a / b; }
    NYBBLE_SIMD F fma(F a, F b, F c) { return a * b + c; }
    // max and min return the second operand when either is NaN (in every instance).
    NYBBLE_SIMD F max(F a, F b) { return a > b ? a : b; }
    NYBBLE_SIMD F min(F a, F b) { return a < b ? a : b; }
    NYBBLE_SIMD F sqrt(F a) {
        return F{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
    }
    NYBBLE_SIMD F abs(F a) { return (F)((I)a & 0x7fffffff); }

    NYBBLE_SIMD F load_f16(const uint16_t* p) {
        return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
    }
    // E4M3, divided by 256 (quant/packed_float8.h).
    NYBBLE_SIMD F load_e4m3(const uint8_t* p) {
        return F{packed::e4m3_part(p[0]), packed::e4m3_part(p[1]), packed::e4m3_part(p[2]), packed::e4m3_part(p[3])};
    }
    NYBBLE_SIMD void store_f16(uint16_t* p, F x) {
        F clamped = min(max(x, set1(-65504.0f)), set1(65504.0f));
        for (int i = 0; i < lanes; ++i) p[i] = float_to_half(clamped[i]);
    }
    NYBBLE_SIMD F load_bf16(const uint16_t* p) {
        return F{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
    }

    NYBBLE_SIMD float reduce_add(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
    NYBBLE_SIMD float reduce_max(F x) {
        float a = x[0] > x[2] ? x[0] : x[2];
        float b = x[1] > x[3] ? x[1] : x[3];
        return a > b ? a : b;
    }
    // a * 2^n in two steps, because n of exp() may leave the range of one exponent field.
    NYBBLE_SIMD F scale_by_power_of_2(F a, F n) {
        I whole = cvt_round(n);
        I first = whole >> 1;
        I second = whole - first;
        return a * (F)(((U)(first + 127)) << 23) * (F)(((U)(second + 127)) << 23);
    }
    // Adding and subtracting 1.5 * 2^23 rounds to nearest even for |x| < 2^22, and is defined for any x.
    NYBBLE_SIMD F round(F x) { return (x + set1(12582912.0f)) - set1(12582912.0f); }
    NYBBLE_SIMD F exp(F x) { return simd_exp<Generic>(x); }

    // ---- int32 (wrapping) ----
    NYBBLE_SIMD I iset1(int32_t x) { return I{x, x, x, x}; }
    NYBBLE_SIMD I iload(const void* p) { return read<I>(p); }
    NYBBLE_SIMD I iadd(I a, I b) { return (I)((U)a + (U)b); }
    NYBBLE_SIMD I isub(I a, I b) { return (I)((U)a - (U)b); }
    NYBBLE_SIMD I iand(I a, I b) { return a & b; }
    NYBBLE_SIMD I ior(I a, I b) { return a | b; }
    template <int n>
    NYBBLE_SIMD I ishl(I a) {
        return (I)((U)a << n);
    }
    template <int n>
    NYBBLE_SIMD I ishr(I a) {
        return (I)((U)a >> n);
    }
    NYBBLE_SIMD F cvt(I a) { return __builtin_convertvector(a, F); }
    NYBBLE_SIMD F as_float(I a) { return (F)a; }
    NYBBLE_SIMD I cvt_round(F a) {  // for |a| < 2^22; anything else gives a defined but meaningless integer
        return isub((I)(a + set1(12582912.0f)), iset1(0x4b400000));
    }
    NYBBLE_SIMD I load_u8(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
    NYBBLE_SIMD I load_i8(const int8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
    NYBBLE_SIMD void store_i8(int8_t* p, I x) {
        for (int i = 0; i < lanes; ++i) p[i] = (int8_t)x[i];
    }
    NYBBLE_SIMD void store_i16(int16_t* p, I x) {
        for (int i = 0; i < lanes; ++i) p[i] = (int16_t)x[i];
    }
    // Two codes for each lane, as 16 bits each, the first one below; see dot2.
    NYBBLE_SIMD I load_i8_pairs(const int8_t* p) {
        I out{};
        for (int i = 0; i < lanes; ++i) out[i] = (int32_t)((uint32_t)p[2 * i + 1] << 16 | (uint16_t)p[2 * i]);
        return out;
    }
    NYBBLE_SIMD int32_t sum16(const int8_t* p) {
        int32_t sum = 0;
        for (int i = 0; i < 16; ++i) sum += p[i];
        return sum;
    }
    NYBBLE_SIMD int32_t ireduce_add(I x) { return (x[0] + x[1]) + (x[2] + x[3]); }
    // Makes x opaque to the optimiser, for loops that only measure.
    template <class V>
    NYBBLE_SIMD void keep(V& x) {
#if defined(__x86_64__)
        __asm__ volatile("" : "+x"(x));
#elif defined(__aarch64__)
        __asm__ volatile("" : "+w"(x));
#else
        __asm__ volatile("" : "+m"(x));
#endif
    }

    // ---- bytes, 4 per lane ----
    NYBBLE_SIMD B bload(const void* p) { return read<B>(p); }
    NYBBLE_SIMD B bset1(uint8_t x) { return B{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
    NYBBLE_SIMD B band(B a, B b) { return a & b; }
    NYBBLE_SIMD B bor(B a, B b) { return a | b; }
    NYBBLE_SIMD B bxor(B a, B b) { return a ^ b; }
    template <int n>
    NYBBLE_SIMD B bshr(B a) {
        return a >> n;
    }
    template <int n>
    NYBBLE_SIMD B bshl(B a) {
        return a << n;
    }
    NYBBLE_SIMD B lut16(B index, const uint8_t table[16]) {
        B out{};
        for (int i = 0; i < 16; ++i) out[i] = table[index[i] & 15];
        return out;
    }
    NYBBLE_SIMD I as_int(B a) {  // byte 0 is the lowest, whatever the machine
        if constexpr (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) return (I)a;
        I out{};
        for (int r = 0; r < lanes; ++r) {
            out[r] = (int32_t)(a[4 * r] | (uint32_t)a[4 * r + 1] << 8 | (uint32_t)a[4 * r + 2] << 16 |
                               (uint32_t)a[4 * r + 3] << 24);
        }
        return out;
    }

    // ---- products ----
    // acc[r] += sum over j of w[4r+j] * a[j]; max_code bounds w (only AVX2 cares).
    template <int max_code = 255>
    NYBBLE_SIMD I dot4(I acc, B w, const int8_t* a) {
        I bits = as_int(w);
        I low = iset1(255);
        acc += (bits & low) * (int32_t)a[0];
        acc += (ishr<8>(bits) & low) * (int32_t)a[1];
        acc += (ishr<16>(bits) & low) * (int32_t)a[2];
        acc += ishr<24>(bits) * (int32_t)a[3];
        return acc;
    }
    // dot4 of `count` vectors in a row.
    template <int max_code, int count>
    NYBBLE_SIMD I dot(I acc, const B* w, const int8_t* a) {
#pragma GCC unroll 8
        for (int v = 0; v < count; ++v) acc = dot4(acc, w[v], a + 4 * v);
        return acc;
    }
    // acc[r] += a.low * b.low + a.high * b.high of 16-bit halves, exact while the sum fits.
    NYBBLE_SIMD I dot2(I acc, I a, I b) {
        const I a_low = (I)((U)a << 16) >> 16, b_low = (I)((U)b << 16) >> 16;
        return acc + a_low * b_low + (a >> 16) * (b >> 16);
    }
    static constexpr bool has_offset_dot = false;  // see avx2.h
    // The start of a sum whose codes carry an offset of 2^shift: -offset * sum(a), broadcast.
    template <int shift>
    NYBBLE_SIMD I start(const int32_t* neg_sum) {
        return iset1(*neg_sum * (1 << shift));
    }
    NYBBLE_SIMD I start(const int32_t* neg_sum, int shift) { return iset1(*neg_sum * (1 << shift)); }

private:
    template <class V>
    NYBBLE_SIMD V read(const void* p) {
        V x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
};

}  // namespace nybble
