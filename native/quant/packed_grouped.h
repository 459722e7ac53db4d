// Packed units of the safetensors dialects: a scale and a whole zero point for 32 or 128 weights, and codebooks.
#pragma once

#include <array>
#include <cmath>

#include "quant/packed_codes.h"

namespace nybble::packed {

// How codes of 2, 3, 4 or 8 bits lie in a packed k block.
template <int bits>
struct GroupedCodes {
    static constexpr int bytes = 64 * bits;

    static void pack(uint8_t* dst, int row, const raw::Words& w) {
        if constexpr (bits == 8) {
            for (int v = 0; v < 8; ++v) put(dst + 64 * v + 4 * row, w[v]);
        } else if constexpr (bits == 4) {
            for (int v = 0; v < 4; ++v) put(dst + 64 * v + 4 * row, w[v] | w[v + 4] << 4);
        } else {
            for (int half = 0; half < 2; ++half) {
                uint32_t plane = 0;
                for (int v = 0; v < 4; ++v) plane |= (w[4 * half + v] & 0x03030303) << 2 * v;
                put(dst + 64 * half + 4 * row, plane);
            }
            if constexpr (bits == 3) {
                uint32_t plane = 0;
                for (int v = 0; v < 8; ++v) plane |= (w[v] >> 2 & 0x01010101) << v;
                put(dst + TwoBitPlanes::bytes + 4 * row, plane);
            }
        }
    }
    template <class S>
    NYBBLE_SIMD void load(const uint8_t* src, typename S::B codes[8]) {
        if constexpr (bits == 8) {
            Bytes::load<S>(src, codes);
        } else if constexpr (bits == 4) {
            Nibbles::load<S>(src, codes);
        } else {
            TwoBitPlanes::add<S, 0>(src, codes);
            if constexpr (bits == 3) BitPlane::add<S, 2>(src + TwoBitPlanes::bytes, codes);
        }
    }
};

// Header: d of the 16 rows (f16, or f32 with 8 bits), then their zero points. The zero point becomes a minimum of
// -d * zero, which is exact in float32, and so is d * code - d * zero.
template <int bits, int group>
struct Grouped {
    using Block = raw::Grouped<bits, group>;
    using Codes = GroupedCodes<bits>;
    static constexpr int unit_k = group;
    static constexpr int unit_bytes = 16 * sizeof(Block);
    static constexpr int subs = 1, shift = -1, max_code = (1 << bits) - 1;
    static constexpr bool has_min = true;
    static constexpr int scale_bytes = sizeof(Block::d), zeros = 16 * scale_bytes;
    static constexpr int header_bytes = unit_bytes - group / 32 * Codes::bytes;

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + scale_bytes * row, &b.d, scale_bytes);
        unit[zeros + row] = b.zero;
        for (int i = zeros + 16 + row; i < header_bytes; i += 16) unit[i] = 0;
        for (int kb = 0; kb < group / 32; ++kb) {
            raw::Words words;
            raw::codes(b, kb, words);
            Codes::pack(unit + header_bytes + kb * Codes::bytes, row, words);
        }
    }
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int kb, int row0, typename S::B w[8]) {
        Codes::template load<S>(unit + header_bytes + kb * Codes::bytes + 4 * row0, w);
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int, int row0, typename S::F ws[2], typename S::F wm[2]) {
        if constexpr (bits == 8) {
            ws[0] = S::load((const float*)unit + row0);
        } else {
            ws[0] = S::load_f16((const uint16_t*)unit + row0);
        }
        wm[0] = S::mul(ws[0], S::cvt(S::isub(S::iset1(0), S::load_u8(unit + zeros + row0))));
    }
};

using U2_32 = Grouped<2, 32>;
using U2_128 = Grouped<2, 128>;
using U3_32 = Grouped<3, 32>;
using U3_128 = Grouped<3, 128>;
using U4_32 = Grouped<4, 32>;
using U4_128 = Grouped<4, 128>;
using U8_32 = Grouped<8, 32>;
using U8_128 = Grouped<8, 128>;

}  // namespace nybble::packed
