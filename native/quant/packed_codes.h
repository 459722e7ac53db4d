// How the codes of 16 rows x 32 inputs lie in a packed unit, per number of bits: written at load, read by the kernels.
// Vector v holds inputs 4v..4v+3 of every row, byte [row * 4 + j]. See docs/interfaces.md.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/simd/common.h"
#include "quant/raw_codes.h"

namespace nybble::packed {

inline void put(uint8_t* p, uint32_t w) { std::memcpy(p, &w, 4); }

// Four 64-byte vectors, two codes a byte: vector i low, vector i + 4 high.
struct Nibbles {
    static constexpr int bytes = 256;
    static void pack(uint8_t* dst, int row, const raw::Words& w) {
        for (int i = 0; i < 4; ++i) {
            put(dst + 64 * i + 4 * row, (w[i] & 0x0f0f0f0f) | (w[i + 4] & 0x0f0f0f0f) << 4);
        }
    }
    template <class S>
    NYBBLE_SIMD void load(const uint8_t* src, typename S::B codes[8]) {
        const typename S::B low = S::bset1(15);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            typename S::B both = S::bload(src + 64 * i);
            codes[i] = S::band(both, low);
            codes[i + 4] = S::template bshr<4>(both);
        }
    }
};

// Bits `mask << from` of every byte, moved so that they start at bit `to`.
template <class S, int mask, int from, int to>
NYBBLE_INLINE typename S::B move_bits(typename S::B plane) {
    const typename S::B keep = S::bset1((uint8_t)(mask << to));
    if constexpr (from > to) return S::band(S::template bshr<from - to>(plane), keep);
    if constexpr (from < to) return S::band(S::template bshl<to - from>(plane), keep);
    return S::band(plane, keep);
}

// One bit of each of the eight vectors in one 64-byte plane: bit v belongs to vector v.
struct BitPlane {
    static constexpr int bytes = 64;
    template <int bit>
    static void pack(uint8_t* dst, int row, const raw::Words& w) {
        uint32_t plane = 0;
        for (int v = 0; v < 8; ++v) plane |= (w[v] >> bit & 0x01010101) << v;
        put(dst + 4 * row, plane);
    }
    template <class S, int bit>
    NYBBLE_SIMD void add(const uint8_t* src, typename S::B codes[8]) {
        const typename S::B plane = S::bload(src);
        [&]<int... v>(std::integer_sequence<int, v...>) NYBBLE_LAMBDA {
            ((codes[v] = S::bor(codes[v], move_bits<S, 1, v, bit>(plane))), ...);
        }(std::make_integer_sequence<int, 8>{});
    }
};

// Two bits of vector v in bits 2 (v % 4) of plane v / 4.
struct TwoBitPlanes {
    static constexpr int bytes = 128;
    template <int bit>
    static void pack(uint8_t* dst, int row, const raw::Words& w) {
        for (int half = 0; half < 2; ++half) {
            uint32_t plane = 0;
            for (int i = 0; i < 4; ++i) plane |= (w[4 * half + i] >> bit & 0x03030303) << 2 * i;
            put(dst + 64 * half + 4 * row, plane);
        }
    }
    // Sets the codes (bit 0) or adds to them (any other bit).
    template <class S, int bit>
    NYBBLE_SIMD void add(const uint8_t* src, typename S::B codes[8]) {
        const typename S::B planes[2] = {S::bload(src), S::bload(src + 64)};
        [&]<int... v>(std::integer_sequence<int, v...>) NYBBLE_LAMBDA {
            if constexpr (bit == 0) {
                ((codes[v] = move_bits<S, 3, 2 * (v % 4), 0>(planes[v / 4])), ...);
            } else {
                ((codes[v] = S::bor(codes[v], move_bits<S, 3, 2 * (v % 4), bit>(planes[v / 4]))), ...);
            }
        }(std::make_integer_sequence<int, 8>{});
    }
};

// Whole bytes.
struct Bytes {
    static constexpr int bytes = 512;
    static void pack(uint8_t* dst, int row, const raw::Words& w) {
        for (int v = 0; v < 8; ++v) put(dst + 64 * v + 4 * row, w[v]);
    }
    template <class S>
    NYBBLE_SIMD void load(const uint8_t* src, typename S::B codes[8]) {
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) codes[v] = S::bload(src + 64 * v);
    }
};

}  // namespace nybble::packed
