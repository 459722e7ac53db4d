// Packed units of the 4-bit codebooks NF4 and FP4: f32 scales of the 16 rows, then nibbles that index a table. The
// values of the table have 16 bits and come as two planes of codes, value = 256 * (high - 128) + (low - 128), because a
// table of eight bits would move NF4's values by a tenth of their distance.
#pragma once

#include <array>

#include "quant/packed_grouped.h"

namespace nybble::packed {

// Types whose codes have a second, lower plane.
template <class Q>
inline constexpr bool kTwoPlanes = requires { Q::two_planes; };
template <class Q>
inline constexpr int kNumCodes = kTwoPlanes<Q> ? 16 : 8;

template <Format format, bool high>
inline constexpr auto kCodebookPlane = [] {
    std::array<uint8_t, 16> plane{};
    for (int code = 0; code < 16; ++code) {
        const int value = codebook_value<format>(code);
        const int low = ((value + 128) & 255) - 128;
        plane[code] = static_cast<uint8_t>((high ? (value - low) / 256 : low) + 128);
    }
    return plane;
}();

template <Format format>
struct Codebook {
    using Block = raw::Codebook<format>;
    static constexpr int unit_k = 64;
    static constexpr int unit_bytes = 16 * sizeof(Block);
    static constexpr int subs = 1, shift = 7, max_code = 255;
    static constexpr bool has_min = false, two_planes = true;
    static constexpr int header_bytes = 64;

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 4 * row, &b.d, 4);
        for (int kb = 0; kb < 2; ++kb) {
            raw::Words words;
            raw::codes(b, kb, words);
            GroupedCodes<4>::pack(unit + header_bytes + kb * Nibbles::bytes, row, words);
        }
    }
    // Eight vectors of the high plane, then eight of the low one.
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int kb, int row0, typename S::B w[16]) {
        Nibbles::load<S>(unit + header_bytes + kb * Nibbles::bytes + 4 * row0, w);
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
            w[8 + v] = S::lut16(w[v], kCodebookPlane<format, false>.data());
            w[v] = S::lut16(w[v], kCodebookPlane<format, true>.data());
        }
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int, int row0, typename S::F ws[2], typename S::F*) {
        ws[0] = S::load((const float*)unit + row0);
    }
};

using NF4_64 = Codebook<Format::NF4_64>;
using FP4_64 = Codebook<Format::FP4_64>;

}  // namespace nybble::packed
