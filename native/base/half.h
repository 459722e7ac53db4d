// Scalar conversions of the two 16-bit float types. Always inlined, so that no copy compiled with one ISA's flags can
// be linked into code meant for another.
#pragma once

#include <cstdint>
#include <cstring>

namespace nybble {

[[gnu::always_inline]] inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

[[gnu::always_inline]] inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

[[gnu::always_inline]] inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
    if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
    // Subnormal: an integer times 2^-24, exact in float.
    return bits_to_float(sign | float_to_bits((float)rest * 5.9604644775390625e-8f));
}

// Rounds to nearest even; overflow gives inf, NaN stays (quiet) NaN.
[[gnu::always_inline]] inline uint16_t float_to_half(float x) {
    uint32_t bits = float_to_bits(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to inf
    if (rest >= 0x38800000) {                                  // a normal half
        uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
        return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);
    }
    // Subnormal half: adding 0.5 leaves the value, in units of 2^-24 and rounded to even, in the low bits.
    uint32_t sum = float_to_bits(bits_to_float(rest) + 0.5f);
    return (uint16_t)(sign | (sum - 0x3f000000));
}

[[gnu::always_inline]] inline float bf16_to_float(uint16_t half) { return bits_to_float((uint32_t)half << 16); }

// Rounds to nearest even; NaN stays NaN.
[[gnu::always_inline]] inline uint16_t float_to_bf16(float x) {
    uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace nybble
