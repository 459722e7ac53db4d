// Packed units of the types with one scale per 32 weights: the scales of the 16 rows (f16 d, f16 m where there is a
// minimum, or one E8M0 byte), then the codes.
#pragma once

#include "quant/packed_codes.h"

namespace nybble::packed {

// f16 scales, and f16 minima if `minimum`.
template <bool minimum>
struct HalfScales {
    static constexpr int bytes = minimum ? 64 : 32;
    template <class Block>
    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 2 * row, &b.d, 2);
        if constexpr (minimum) std::memcpy(unit + 32 + 2 * row, &b.m, 2);
    }
    template <class S>
    NYBBLE_SIMD void load(const uint8_t* unit, int row0, typename S::F* ws, typename S::F* wm) {
        ws[0] = S::load_f16((const uint16_t*)unit + row0);
        if constexpr (minimum) wm[0] = S::load_f16((const uint16_t*)(unit + 32) + row0);
    }
};

// Half of 2^(e - 127): the codes are doubled. Two factors keep both exponents in range, down to subnormal results.
struct E8M0Scales {
    static constexpr int bytes = 16;
    static void pack(uint8_t* unit, int row, const raw::MXFP4& b) { unit[row] = b.e; }
    template <class S>
    NYBBLE_SIMD void load(const uint8_t* unit, int row0, typename S::F* ws, typename S::F*) {
        typename S::I e = S::load_u8(unit + row0);
        typename S::I half = S::template ishr<1>(e);
        typename S::I first = S::iadd(half, S::iset1(63));
        typename S::I second = S::iadd(S::isub(e, half), S::iset1(63));
        ws[0] = S::mul(S::as_float(S::template ishl<23>(first)), S::as_float(S::template ishl<23>(second)));
    }
};

// Codes = Nibbles or Bytes; `fifth` adds the bit plane of the 5-bit types.
template <class Block_, class Scales, class Codes, bool fifth, int shift_, int max_code_, bool minimum>
struct Legacy {
    using Block = Block_;
    static constexpr int unit_k = 32;
    static constexpr int unit_bytes = Scales::bytes + Codes::bytes + (fifth ? BitPlane::bytes : 0);
    static constexpr int subs = 1;
    static constexpr int shift = shift_;
    static constexpr int max_code = max_code_;
    static constexpr bool has_min = minimum;
    static_assert(unit_bytes == 16 * sizeof(Block));

    static void pack(uint8_t* unit, int row, const Block& b) {
        Scales::pack(unit, row, b);
        Codes::pack(unit + Scales::bytes, row, b.qs);
        if constexpr (fifth) BitPlane::pack(unit + Scales::bytes + Codes::bytes, row, b.qh);
    }
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int, int row0, typename S::B w[8]) {
        const uint8_t* p = unit + Scales::bytes + 4 * row0;
        Codes::template load<S>(p, w);
        if constexpr (fifth) BitPlane::add<S, 4>(p + Codes::bytes, w);
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int, int row0, typename S::F ws[2], typename S::F wm[2]) {
        Scales::template load<S>(unit, row0, ws, wm);
    }
};

// Nibbles that index a table: the packed unit keeps the file's nibbles, the kernel looks the codes up.
template <class Block_, class Scales, const uint8_t (&values)[16], int shift_, int max_code_>
struct LegacyTable : Legacy<Block_, Scales, Nibbles, false, shift_, max_code_, false> {
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int, int row0, typename S::B w[8]) {
        Nibbles::load<S>(unit + Scales::bytes + 4 * row0, w);
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) w[v] = S::lut16(w[v], values);
    }
};

using Q4_0 = Legacy<raw::Q4_0, HalfScales<false>, Nibbles, false, 3, 15, false>;
using Q4_1 = Legacy<raw::Q4_1, HalfScales<true>, Nibbles, false, -1, 15, true>;
using Q5_0 = Legacy<raw::Q5_0, HalfScales<false>, Nibbles, true, 4, 31, false>;
using Q5_1 = Legacy<raw::Q5_1, HalfScales<true>, Nibbles, true, -1, 31, true>;
using Q8_0 = Legacy<raw::Q8_0, HalfScales<false>, Bytes, false, 7, 255, false>;
using IQ4_NL = LegacyTable<raw::IQ4_NL, HalfScales<false>, kIq4Codes, 7, 241>;
using MXFP4 = LegacyTable<raw::MXFP4, E8M0Scales, kMxfp4Codes, 4, 28>;

}  // namespace nybble::packed
