// Packed units of FP8 (E4M3): f32 scales of the 16 rows, then [k][16 rows] codes. Exponent and mantissa of a code lie
// as in a float16, with another bias, so kernels widen a code by a shift and get its value divided by 256, subnormal
// ones too. NaN, whose code gives 480 that way, is refused by who makes blocks.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "base/half.h"
#include "quant/blocks.h"

namespace nybble::packed {

// Types whose codes are floats: they are multiplied with float activations.
template <class Q>
inline constexpr bool kFloat8 = requires { Q::float8; };

inline constexpr float kE4m3Unit = 256.0f;

// What the kernels widen a code to, and its value.
inline float e4m3_part(uint8_t code) {
    return half_to_float(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7));
}
inline float e4m3_value(uint8_t code) {
    return (code & 0x7f) == 0x7f ? std::numeric_limits<float>::quiet_NaN() : kE4m3Unit * e4m3_part(code);
}

template <int group>
struct Float8 {
    using Block = raw::Float8<group>;
    static constexpr bool float8 = true;
    static constexpr int unit_k = group;
    static constexpr int unit_bytes = 16 * sizeof(Block);
    static constexpr int header_bytes = 64;

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 4 * row, &b.d, 4);
        for (int k = 0; k < group; ++k) unit[header_bytes + 16 * k + row] = b.codes[k];
    }
};

using F8_32 = Float8<32>;
using F8_128 = Float8<128>;

}  // namespace nybble::packed
