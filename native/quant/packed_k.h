// Packed units of the types with two levels of scales (256 inputs): f16 d of the 16 rows (and -dmin), the integer
// scales with the bits that they have in the file, then the codes of eight k blocks.
#pragma once

#include "quant/packed_codes.h"

namespace nybble::packed {

template <class S>
NYBBLE_INLINE typename S::F half_at(const uint8_t* p, int row0) {
    return S::load_f16((const uint16_t*)p + row0);
}

// dmin is kept as -dmin: the kernels add minima, and flipping a sign here is exact (that of a zero included).
inline void put_negated_half(uint8_t* p, uint16_t half) {
    const uint16_t negated = half ^ 0x8000;
    std::memcpy(p, &negated, 2);
}

// Byte i of `four` is of row `row` in the i-th run of 16 bytes.
inline void scatter(uint8_t* p, int row, uint32_t four) {
    for (int i = 0; i < 4; ++i) p[16 * i + row] = (uint8_t)(four >> 8 * i);
}

// What all of them share. A derived type gives pack, codes and scales.
template <class Block_, int subs_, int shift_, int max_code_, bool minimum>
struct Superblock {
    using Block = Block_;
    static constexpr int unit_k = 256;
    static constexpr int unit_bytes = 16 * sizeof(Block);
    static constexpr int subs = subs_;
    static constexpr int shift = shift_;
    static constexpr int max_code = max_code_;  // the largest code: tells AVX2 how many products fit 16 bits
    static constexpr bool has_min = minimum;
};

// Q4_K and Q5_K. Header: d, -dmin, then per k block and row a byte with the low nibbles of scale and min, then per pair
// of k blocks and row a byte with their upper bits (scale 0-1, min 2-3, and the same of the second at 4-7).
template <class Block, bool fifth>
struct ScaleMin : Superblock<Block, 1, -1, fifth ? 31 : 15, true> {
    static constexpr int low = 64, high = low + 128, header_bytes = high + 64;
    static constexpr int block_bytes = Nibbles::bytes + (fifth ? BitPlane::bytes : 0);
    static_assert(header_bytes + 8 * block_bytes == 16 * sizeof(Block));

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 2 * row, &b.d, 2);
        put_negated_half(unit + 32 + 2 * row, b.dmin);
        // The file has whole six-bit fields for k blocks 0-3 in the first eight bytes, whose spare bits are the upper
        // bits of 4-7; the lower nibbles of those are in the last four bytes, paired just as wanted.
        const uint32_t scale = raw::word(b.scales), min = raw::word(b.scales + 4), rest = raw::word(b.scales + 8);
        scatter(unit + low, row, (scale & 0x0f0f0f0f) | (min & 0x0f0f0f0f) << 4);
        scatter(unit + low + 64, row, rest);
        const uint32_t first = (scale >> 4 & 0x03030303) | (min >> 2 & 0x0c0c0c0c);
        const uint32_t second = (scale >> 6 & 0x03030303) | (min >> 4 & 0x0c0c0c0c);
        const uint32_t upper = (first & 0x000f000f) | (first >> 4 & 0x00f000f0);
        const uint32_t later = (second & 0x000f000f) | (second >> 4 & 0x00f000f0);
        scatter(unit + high, row, (upper & 0xff) | (upper >> 8 & 0xff00) | later << 16 | (later & 0xff0000) << 8);
        uint8_t* dst = unit + header_bytes;
        for (int kb = 0; kb < 8; kb += 2) {
            Nibbles::pack_two(dst + kb * block_bytes, dst + (kb + 1) * block_bytes, row, b.qs + 16 * kb);
        }
        if constexpr (fifth) BitPlane::pack_eight(dst + Nibbles::bytes, block_bytes, row, b.qh);
    }
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int kb, int row0, typename S::B w[8]) {
        const uint8_t* p = unit + header_bytes + kb * block_bytes + 4 * row0;
        Nibbles::load<S>(p, w);
        if constexpr (fifth) BitPlane::add<S, 4>(p + Nibbles::bytes, w);
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int kb, int row0, typename S::F ws[2], typename S::F wm[2]) {
        using I = typename S::I;
        const I low_bits = S::load_u8(unit + low + 16 * kb + row0);
        I upper = S::load_u8(unit + high + 16 * (kb / 2) + row0);
        if (kb % 2 == 1) upper = S::template ishr<4>(upper);
        const I scale = S::ior(S::iand(low_bits, S::iset1(15)), S::iand(S::template ishl<4>(upper), S::iset1(48)));
        const I min = S::ior(S::template ishr<4>(low_bits), S::iand(S::template ishl<2>(upper), S::iset1(48)));
        ws[0] = S::mul(half_at<S>(unit, row0), S::cvt(scale));
        wm[0] = S::mul(half_at<S>(unit + 32, row0), S::cvt(min));
    }
};
using Q4_K = ScaleMin<raw::Q4_K, false>;
using Q5_K = ScaleMin<raw::Q5_K, true>;

// Header: d, -dmin, then per 16 inputs and row the file's byte: scale low, min high.
struct Q2_K : Superblock<raw::Q2_K, 2, -1, 3, true> {
    static constexpr int header_bytes = 64 + 256, block_bytes = TwoBitPlanes::bytes;
    static_assert(header_bytes + 8 * block_bytes == unit_bytes);

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 2 * row, &b.d, 2);
        put_negated_half(unit + 32 + 2 * row, b.dmin);
        for (int j = 0; j < 16; ++j) unit[64 + 16 * j + row] = b.scales[j];
        TwoBitPlanes::pack_eight(unit + header_bytes, block_bytes, row, b.qs);
    }
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int kb, int row0, typename S::B w[8]) {
        TwoBitPlanes::add<S, 0>(unit + header_bytes + kb * block_bytes + 4 * row0, w);
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int kb, int row0, typename S::F ws[2], typename S::F wm[2]) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const typename S::I both = S::load_u8(unit + 64 + 16 * (2 * kb + i) + row0);
            ws[i] = S::mul(half_at<S>(unit, row0), S::cvt(S::iand(both, S::iset1(15))));
            wm[i] = S::mul(half_at<S>(unit + 32, row0), S::cvt(S::template ishr<4>(both)));
        }
    }
};

// Header: d, then per k block and row a byte with the low nibbles of its two scales, then per two k blocks and row a
// byte with the upper two bits of their four.
struct Q3_K : Superblock<raw::Q3_K, 2, 2, 7, false> {
    static constexpr int low = 32, high = low + 128, header_bytes = high + 64;
    static constexpr int block_bytes = TwoBitPlanes::bytes + BitPlane::bytes;
    static_assert(header_bytes + 8 * block_bytes == unit_bytes);

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 2 * row, &b.d, 2);
        // The low nibbles of scales 0-7 and 8-15 share bytes; upper bits 2p, 2p + 1 of byte q belong to scale 4p + q.
        for (int p = 0; p < 4; ++p) {
            const uint8_t even = b.scales[2 * p], odd = b.scales[2 * p + 1];
            unit[low + 16 * p + row] = (uint8_t)((even & 15) | odd << 4);
            unit[low + 16 * (p + 4) + row] = (uint8_t)(even >> 4 | (odd & 0xf0));
        }
        scatter(unit + high, row, transpose_pairs_of_word(raw::word(b.scales + 8)));
        uint8_t* dst = unit + header_bytes;
        TwoBitPlanes::pack_eight(dst, block_bytes, row, b.qs);
        BitPlane::pack_eight(dst + TwoBitPlanes::bytes, block_bytes, row, b.hmask);
    }
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int kb, int row0, typename S::B w[8]) {
        const uint8_t* p = unit + header_bytes + kb * block_bytes + 4 * row0;
        TwoBitPlanes::add<S, 0>(p, w);
        BitPlane::add<S, 2>(p + TwoBitPlanes::bytes, w);
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int kb, int row0, typename S::F ws[2], typename S::F*) {
        using I = typename S::I;
        const I low_bits = S::load_u8(unit + low + 16 * kb + row0);
        I upper = S::load_u8(unit + high + 16 * (kb / 2) + row0);
        if (kb % 2 == 1) upper = S::template ishr<4>(upper);
        const I first = S::ior(S::iand(low_bits, S::iset1(15)), S::iand(S::template ishl<4>(upper), S::iset1(48)));
        const I second = S::ior(S::template ishr<4>(low_bits), S::iand(S::template ishl<2>(upper), S::iset1(48)));
        const typename S::F d = half_at<S>(unit, row0);
        ws[0] = S::mul(d, S::cvt(S::isub(first, S::iset1(32))));
        ws[1] = S::mul(d, S::cvt(S::isub(second, S::iset1(32))));
    }
};

// Header: d, then a signed byte per 16 inputs and row.
struct Q6_K : Superblock<raw::Q6_K, 2, 5, 63, false> {
    static constexpr int header_bytes = 32 + 256, block_bytes = Nibbles::bytes + TwoBitPlanes::bytes;
    static_assert(header_bytes + 8 * block_bytes == unit_bytes);

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 2 * row, &b.d, 2);
        for (int j = 0; j < 16; ++j) unit[32 + 16 * j + row] = (uint8_t)b.scales[j];
        uint8_t* dst = unit + header_bytes;
        for (int run = 0; run < 4; ++run) {  // of 32 bytes: k blocks 0 and 2, 1 and 3, then the same of the second half
            const int kb = 4 * (run / 2) + run % 2;
            Nibbles::pack_two(dst + kb * block_bytes, dst + (kb + 2) * block_bytes, row, b.ql + 32 * run);
        }
        TwoBitPlanes::pack_eight(dst + Nibbles::bytes, block_bytes, row, b.qh);
    }
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int kb, int row0, typename S::B w[8]) {
        const uint8_t* p = unit + header_bytes + kb * block_bytes + 4 * row0;
        Nibbles::load<S>(p, w);
        TwoBitPlanes::add<S, 4>(p + Nibbles::bytes, w);
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int kb, int row0, typename S::F ws[2], typename S::F*) {
        const typename S::F d = half_at<S>(unit, row0);
        const int8_t* p = (const int8_t*)unit + 32 + 32 * kb + row0;
        ws[0] = S::mul(d, S::cvt(S::load_i8(p)));
        ws[1] = S::mul(d, S::cvt(S::load_i8(p + 16)));
    }
};

// Header: d, then per pair of k blocks and row a byte with the low nibbles of their scales, then per four k blocks and
// row a byte with the upper two bits. The codes are the file's nibbles.
struct IQ4_XS : Superblock<raw::IQ4_XS, 1, 7, 241, false> {
    static constexpr int low = 32, high = low + 64, header_bytes = high + 32, block_bytes = Nibbles::bytes;
    static_assert(header_bytes + 8 * block_bytes == unit_bytes);

    static void pack(uint8_t* unit, int row, const Block& b) {
        std::memcpy(unit + 2 * row, &b.d, 2);
        for (int pair = 0; pair < 4; ++pair) unit[low + 16 * pair + row] = b.scales_l[pair];
        for (int half = 0; half < 2; ++half) unit[high + 16 * half + row] = b.scales_h[half];
        for (int kb = 0; kb < 8; ++kb) {
            Nibbles::pack(unit + header_bytes + kb * block_bytes, row, b.qs + 16 * kb);
        }
    }
    template <class S>
    NYBBLE_SIMD void codes(const uint8_t* unit, int kb, int row0, typename S::B w[8]) {
        Nibbles::load<S>(unit + header_bytes + kb * block_bytes + 4 * row0, w);
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) w[v] = S::lut16(w[v], kIq4Codes);
    }
    template <class S>
    NYBBLE_SIMD void scales(const uint8_t* unit, int kb, int row0, typename S::F ws[2], typename S::F*) {
        using I = typename S::I;
        I nibble = S::load_u8(unit + low + 16 * (kb / 2) + row0);
        nibble = kb % 2 == 1 ? S::template ishr<4>(nibble) : S::iand(nibble, S::iset1(15));
        I upper = S::template ishl<4>(S::load_u8(unit + high + 16 * (kb / 4) + row0));
        switch (kb % 4) {  // kb is a constant once the caller's loop is unrolled
            case 1: upper = S::template ishr<2>(upper); break;
            case 2: upper = S::template ishr<4>(upper); break;
            case 3: upper = S::template ishr<6>(upper); break;
            default: break;
        }
        const I scale = S::ior(nibble, S::iand(upper, S::iset1(48)));
        ws[0] = S::mul(half_at<S>(unit, row0), S::cvt(S::isub(scale, S::iset1(32))));
    }
};

}  // namespace nybble::packed
