// How the codes of 16 rows x 32 inputs lie in a packed unit, per number of bits: written at load, read by the kernels.
// Vector v holds inputs 4v..4v+3 of every row, byte [row * 4 + j]. See docs/interfaces.md.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/simd/common.h"
#include "quant/raw_codes.h"
#include "quant/transpose.h"

namespace nybble::packed {

inline void put(uint8_t* p, uint32_t w) { std::memcpy(p, &w, 4); }

// Four 64-byte vectors, two codes a byte: vector i low, vector i + 4 high.
struct Nibbles {
    static constexpr int bytes = 256;
    // 16 bytes with weights 0-15 in the low nibbles and 16-31 in the high ones: vector for vector what is wanted.
    static void pack(uint8_t* dst, int row, const uint8_t* qs) {
        for (int i = 0; i < 4; ++i) put(dst + 64 * i + 4 * row, raw::word(qs + 4 * i));
    }
    // 32 bytes with the weights of one k block in the low nibbles and those of another in the high ones.
    static void pack_two(uint8_t* low, uint8_t* high, int row, const uint8_t* qs) {
        for (int i = 0; i < 4; ++i) {
            const uint32_t first = raw::word(qs + 4 * i), second = raw::word(qs + 16 + 4 * i);
            put(low + 64 * i + 4 * row, (first & 0x0f0f0f0f) | (second & 0x0f0f0f0f) << 4);
            put(high + 64 * i + 4 * row, (first >> 4 & 0x0f0f0f0f) | (second & 0xf0f0f0f0));
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
    // From 32 bits, one per weight in order.
    static void pack(uint8_t* dst, int row, const uint8_t* bits) {
        put(dst + 4 * row, nibbles_to_bytes(raw::word(bits)));
    }
    // The planes of eight k blocks, `stride` apart, from 32 bytes: bit kb of byte i belongs to weight i of k block kb.
    static void pack_eight(uint8_t* dst, int stride, int row, const uint8_t* bits) {
        raw::Words w;
        std::memcpy(w, bits, sizeof w);
        transpose_bits(w);
        for (int kb = 0; kb < 8; ++kb) put(dst + kb * stride + 4 * row, w[kb]);
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
    // The planes of eight k blocks, `stride` apart, from two runs of 32 bytes: bits 2i, 2i + 1 of byte j of run h
    // belong to weight j of k block 4h + i.
    static void pack_eight(uint8_t* dst, int stride, int row, const uint8_t* bits) {
        for (int run = 0; run < 2; ++run) {
            for (int half = 0; half < 2; ++half) {
                uint32_t w[4];
                std::memcpy(w, bits + 32 * run + 16 * half, sizeof w);
                transpose_pairs(w);
                for (int i = 0; i < 4; ++i) put(dst + (4 * run + i) * stride + 64 * half + 4 * row, w[i]);
            }
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

// Whole bytes: signed in the file, offset by 128 here.
struct Bytes {
    static constexpr int bytes = 512;
    static void pack(uint8_t* dst, int row, const int8_t* qs) {
        for (int v = 0; v < 8; ++v) put(dst + 64 * v + 4 * row, raw::word(qs + 4 * v) ^ 0x80808080);
    }
    template <class S>
    NYBBLE_SIMD void load(const uint8_t* src, typename S::B codes[8]) {
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) codes[v] = S::bload(src + 64 * v);
    }
};

}  // namespace nybble::packed
