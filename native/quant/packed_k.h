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
        for (int pair = 0; pair < 4; ++pair) {
            uint8_t upper = 0;
            for (int i = 0; i < 2; ++i) {
                uint8_t scale, min;
                raw::scale_min(b.scales, 2 * pair + i, scale, min);
                unit[low + 16 * (2 * pair + i) + row] = (uint8_t)((scale & 15) | (min & 15) << 4);
                upper |= (uint8_t)((scale >> 4 | (min >> 4) << 2) << 4 * i);
            }
            unit[high + 16 * pair + row] = upper;
        }
        for (int kb = 0; kb < 8; ++kb) {
            raw::Words w;
            raw::codes(b, kb, w);
            uint8_t* dst = unit + header_bytes + kb * block_bytes;
            Nibbles::pack(dst, row, w);
            if constexpr (fifth) BitPlane::pack<4>(dst + Nibbles::bytes, row, w);
        }
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
        for (int kb = 0; kb < 8; ++kb) {
            raw::Words w;
            raw::codes(b, kb, w);
            TwoBitPlanes::pack<0>(unit + header_bytes + kb * block_bytes, row, w);
        }
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
        for (int kb = 0; kb < 8; ++kb) {
            int first = raw::q3_scale(b, 2 * kb), second = raw::q3_scale(b, 2 * kb + 1);
            unit[low + 16 * kb + row] = (uint8_t)((first & 15) | (second & 15) << 4);
            uint8_t& upper = unit[high + 16 * (kb / 2) + row];
            if (kb % 2 == 0) upper = 0;
            upper |= (uint8_t)((first >> 4 | (second >> 4) << 2) << 4 * (kb % 2));
            raw::Words w;
            raw::codes(b, kb, w);
            uint8_t* dst = unit + header_bytes + kb * block_bytes;
            TwoBitPlanes::pack<0>(dst, row, w);
            BitPlane::pack<2>(dst + TwoBitPlanes::bytes, row, w);
        }
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
        for (int kb = 0; kb < 8; ++kb) {
            raw::Words w;
            raw::codes(b, kb, w);
            uint8_t* dst = unit + header_bytes + kb * block_bytes;
            Nibbles::pack(dst, row, w);
            TwoBitPlanes::pack<4>(dst + Nibbles::bytes, row, w);
        }
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
            raw::Words w;
            raw::split_nibbles(b.qs + 16 * kb, w);
            Nibbles::pack(unit + header_bytes + kb * block_bytes, row, w);
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
