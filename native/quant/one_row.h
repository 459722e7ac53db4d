// A Simd type of one lane, so that one row of a packed matrix is decoded by the very code that the kernels run, without
// decoding its neighbours. Only the operations that the packed layouts use.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "kernels/simd/common.h"

namespace nybble {

struct OneRow {
    static constexpr int lanes = 1;
    using F = float;
    using I = int32_t;
    using B = uint32_t;  // four bytes

    NYBBLE_SIMD F load(const float* p) { return *p; }
    NYBBLE_SIMD F mul(F a, F b) { return a * b; }
    NYBBLE_SIMD F load_f16(const uint16_t* p) {
        uint16_t half;
        std::memcpy(&half, p, 2);
        return half_to_float(half);
    }

    NYBBLE_SIMD I iset1(int32_t x) { return x; }
    NYBBLE_SIMD I iadd(I a, I b) { return (I)((uint32_t)a + (uint32_t)b); }
    NYBBLE_SIMD I isub(I a, I b) { return (I)((uint32_t)a - (uint32_t)b); }
    NYBBLE_SIMD I iand(I a, I b) { return a & b; }
    NYBBLE_SIMD I ior(I a, I b) { return a | b; }
    template <int n>
    NYBBLE_SIMD I ishl(I a) {
        return (I)((uint32_t)a << n);
    }
    template <int n>
    NYBBLE_SIMD I ishr(I a) {
        return (I)((uint32_t)a >> n);
    }
    NYBBLE_SIMD F cvt(I a) { return (F)a; }
    NYBBLE_SIMD F as_float(I a) { return bits_to_float((uint32_t)a); }
    NYBBLE_SIMD I load_u8(const uint8_t* p) { return *p; }
    NYBBLE_SIMD I load_i8(const int8_t* p) { return *p; }

    NYBBLE_SIMD B bload(const void* p) {
        B x;
        std::memcpy(&x, p, 4);
        return x;
    }
    NYBBLE_SIMD B bset1(uint8_t x) { return x * 0x01010101u; }
    NYBBLE_SIMD B band(B a, B b) { return a & b; }
    NYBBLE_SIMD B bor(B a, B b) { return a | b; }
    NYBBLE_SIMD B bxor(B a, B b) { return a ^ b; }
    template <int n>
    NYBBLE_SIMD B bshr(B a) {
        return a >> n & bset1((uint8_t)(0xff >> n));
    }
    template <int n>
    NYBBLE_SIMD B bshl(B a) {
        return a << n & bset1((uint8_t)(0xff << n));
    }
    NYBBLE_SIMD B lut16(B index, const uint8_t table[16]) {
        return (B)table[index & 15] | (B)table[index >> 8 & 15] << 8 | (B)table[index >> 16 & 15] << 16 |
               (B)table[index >> 24 & 15] << 24;
    }
};

}  // namespace nybble
