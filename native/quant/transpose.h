// Bit transposes in 32-bit words, by exchanging bits in pairs: what turns the file's planes into the packed ones at
// load without taking the codes apart one by one. Words are four bytes that never mix, except in delta_swap.
#pragma once

#include <bit>
#include <cstdint>

namespace nybble {

// The packers shift bits across bytes of words that are read as they lie in the file.
static_assert(std::endian::native == std::endian::little, "file blocks are little endian");

// Eight words: bit k of every byte of word i goes to bit i of word k.
inline void transpose_bits(uint32_t w[8]) {
    constexpr uint32_t masks[3] = {0x55555555, 0x33333333, 0x0f0f0f0f};
    for (int stage = 0; stage < 3; ++stage) {
        const int s = 1 << stage;
        for (int i = 0; i < 8; ++i) {
            if (i & s) continue;
            const uint32_t t = (w[i] >> s ^ w[i + s]) & masks[stage];
            w[i + s] ^= t;
            w[i] ^= t << s;
        }
    }
}

// Four words: bits 2k, 2k + 1 of every byte of word i go to bits 2i, 2i + 1 of word k.
inline void transpose_pairs(uint32_t w[4]) {
    constexpr uint32_t masks[2] = {0x33333333, 0x0f0f0f0f};
    for (int stage = 0; stage < 2; ++stage) {
        const int s = 1 << stage;
        for (int i = 0; i < 4; ++i) {
            if (i & s) continue;
            const uint32_t t = (w[i] >> 2 * s ^ w[i + s]) & masks[stage];
            w[i + s] ^= t;
            w[i] ^= t << 2 * s;
        }
    }
}

// Moves every bit of x to the place whose index has bits `high` and `low` exchanged.
template <int high, int low>
inline uint32_t delta_swap(uint32_t x) {
    constexpr int shift = (1 << high) - (1 << low);
    constexpr uint32_t mask = [] {
        uint32_t m = 0;
        for (int i = 0; i < 32; ++i) {
            if ((i >> low & 1) && !(i >> high & 1)) m |= 1u << i;
        }
        return m;
    }();
    const uint32_t t = (x ^ x >> shift) & mask;
    return x ^ t ^ t << shift;
}

// Bit 4v + j goes to bit 8j + v: from one bit per weight in order to bit v of byte j.
inline uint32_t nibbles_to_bytes(uint32_t x) {
    return delta_swap<1, 0>(delta_swap<2, 1>(delta_swap<3, 0>(delta_swap<4, 1>(x))));
}

// Bits 2p, 2p + 1 of byte q go to bits 2q, 2q + 1 of byte p.
inline uint32_t transpose_pairs_of_word(uint32_t x) { return delta_swap<3, 1>(delta_swap<4, 2>(x)); }

}  // namespace nybble
