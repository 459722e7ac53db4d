// Unsigned codes of 32 weights of a file block, as eight 32-bit words of four codes each (weight 4i + j is byte j of
// word i), and the integer scales of the K-quants: one weight at a time as the format describes them, for decoding.
// Packing moves whole planes instead, for speed, and is tested against this.
#pragma once

#include <cstdint>
#include <cstring>

#include "quant/blocks.h"

namespace nybble {

inline constexpr uint8_t kIq4Codes[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                          129, 141, 153, 166, 181, 197, 217, 241};  // the IQ4 values plus 128
inline constexpr uint8_t kMxfp4Codes[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                            16, 15, 14, 13, 12, 10, 8,  4};  // twice the E2M1 values plus 16

// The 4-bit codebooks of bitsandbytes in integers of 16 bits, so that they are multiplied as two planes of eight. Unit
// 1 / 31908 leaves NF4's values within 8e-6 of where they belong, the best of all units; FP4's are exact multiples of
// 1 / 32448. nybble.quant.codebook has the same tables.
inline constexpr int16_t kNf4Values[16] = {-31908, -22214, -16754, -12601, -9076, -5896, -2905, 0,
                                           2539,   5135,   7853,   10782,  14062, 17952, 23068, 31908};
inline constexpr int16_t kFp4Values[16] = {0, 169,  21632,  32448,  10816,  16224,  5408,  8112,
                                           0, -169, -21632, -32448, -10816, -16224, -5408, -8112};

template <Format format>
constexpr int16_t codebook_value(int code) {
    return format == Format::NF4_64 ? kNf4Values[code] : kFp4Values[code];
}

namespace raw {

using Words = uint32_t[8];

inline uint32_t word(const void* p) {
    uint32_t w;
    std::memcpy(&w, p, 4);
    return w;
}

// Low nibbles are weights 0-15, high nibbles weights 16-31.
inline void split_nibbles(const uint8_t* qs, Words& w) {
    for (int i = 0; i < 4; ++i) {
        w[i] = word(qs + 4 * i) & 0x0f0f0f0f;
        w[i + 4] = word(qs + 4 * i) >> 4 & 0x0f0f0f0f;
    }
}

// Bits 0-3 of `bits` into bit 4 of the four bytes.
inline uint32_t spread_fifth(uint32_t bits) { return ((bits & 15) * 0x00204081u & 0x01010101) << 4; }

inline void add_fifth_bits(const uint8_t* qh, Words& w) {
    uint32_t high = word(qh);
    for (int i = 0; i < 8; ++i) w[i] |= spread_fifth(high >> 4 * i);
}

inline void table(const uint8_t* values, Words& w) {
    for (auto& four : w) {
        four = (uint32_t)values[four & 15] | (uint32_t)values[four >> 8 & 15] << 8 |
               (uint32_t)values[four >> 16 & 15] << 16 | (uint32_t)values[four >> 24 & 15] << 24;
    }
}

inline void codes(const Q4_0& b, int, Words& w) { split_nibbles(b.qs, w); }
inline void codes(const Q4_1& b, int, Words& w) { split_nibbles(b.qs, w); }
inline void codes(const Q5_0& b, int, Words& w) {
    split_nibbles(b.qs, w);
    add_fifth_bits(b.qh, w);
}
inline void codes(const Q5_1& b, int, Words& w) {
    split_nibbles(b.qs, w);
    add_fifth_bits(b.qh, w);
}
inline void codes(const Q8_0& b, int, Words& w) {
    for (int i = 0; i < 8; ++i) w[i] = word(b.qs + 4 * i) ^ 0x80808080;
}
inline void codes(const IQ4_NL& b, int, Words& w) {
    split_nibbles(b.qs, w);
    table(kIq4Codes, w);
}
inline void codes(const IQ4_XS& b, int kb, Words& w) {
    split_nibbles(b.qs + 16 * kb, w);
    table(kIq4Codes, w);
}
inline void codes(const MXFP4& b, int, Words& w) {
    split_nibbles(b.qs, w);
    table(kMxfp4Codes, w);
}
inline void codes(const Q2_K& b, int kb, Words& w) {
    for (int i = 0; i < 8; ++i) w[i] = word(b.qs + 32 * (kb / 4) + 4 * i) >> 2 * (kb % 4) & 0x03030303;
}
// A set bit of hmask means that nothing is subtracted: it is the third bit of an unsigned code around 4.
inline void codes(const Q3_K& b, int kb, Words& w) {
    for (int i = 0; i < 8; ++i) {
        w[i] = (word(b.qs + 32 * (kb / 4) + 4 * i) >> 2 * (kb % 4) & 0x03030303) |
               (word(b.hmask + 4 * i) >> kb & 0x01010101) << 2;
    }
}
inline void codes(const Q4_K& b, int kb, Words& w) {
    for (int i = 0; i < 8; ++i) w[i] = word(b.qs + 32 * (kb / 2) + 4 * i) >> 4 * (kb % 2) & 0x0f0f0f0f;
}
inline void codes(const Q5_K& b, int kb, Words& w) {
    for (int i = 0; i < 8; ++i) {
        w[i] = (word(b.qs + 32 * (kb / 2) + 4 * i) >> 4 * (kb % 2) & 0x0f0f0f0f) |
               (word(b.qh + 4 * i) >> kb & 0x01010101) << 4;
    }
}
inline void codes(const Q6_K& b, int kb, Words& w) {
    int half = kb / 4, quarter = kb % 4;
    for (int i = 0; i < 8; ++i) {
        uint32_t low = word(b.ql + 64 * half + 32 * (quarter % 2) + 4 * i) >> 4 * (quarter / 2) & 0x0f0f0f0f;
        w[i] = low | (word(b.qh + 32 * half + 4 * i) >> 2 * quarter & 0x03030303) << 4;
    }
}

template <int bits, int group>
inline void codes(const Grouped<bits, group>& b, int kb, Words& w) {
    uint8_t four[32];
    for (int i = 0; i < 32; ++i) {
        const int bit = (32 * kb + i) * bits;
        unsigned value = b.codes[bit / 8];
        if (bit % 8 + bits > 8) value |= (unsigned)b.codes[bit / 8 + 1] << 8;
        four[i] = (uint8_t)(value >> bit % 8 & ((1u << bits) - 1));
    }
    std::memcpy(w, four, sizeof four);
}

template <Format format>
inline void codes(const Codebook<format>& b, int kb, Words& w) {
    uint8_t four[32];
    for (int i = 0; i < 32; ++i) four[i] = b.codes[16 * kb + i / 2] >> 4 * (i % 2) & 15;
    std::memcpy(w, four, sizeof four);
}

// Six-bit scale and min of sub-block j of Q4_K and Q5_K.
inline void scale_min(const uint8_t* q, int j, uint8_t& scale, uint8_t& min) {
    if (j < 4) {
        scale = q[j] & 63;
        min = q[j + 4] & 63;
    } else {
        scale = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
        min = (q[j + 4] >> 4) | (q[j] >> 6) << 4;
    }
}

// Six-bit scale of 16 weights of Q3_K (to be lowered by 32).
inline int q3_scale(const Q3_K& b, int j) {
    int low = j < 8 ? b.scales[j] & 15 : b.scales[j - 8] >> 4;
    return low | (b.scales[8 + j % 4] >> 2 * (j / 4) & 3) << 4;
}

// Six-bit scale of 32 weights of IQ4_XS (to be lowered by 32).
inline int iq4_scale(const IQ4_XS& b, int kb) {
    int low = b.scales_l[kb / 2] >> 4 * (kb % 2) & 15;
    int high = (b.scales_h[0] | b.scales_h[1] << 8) >> 2 * kb & 3;
    return low | high << 4;
}

}  // namespace raw
}  // namespace nybble
