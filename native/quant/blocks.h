// The blocks as they lie in a GGUF file, little endian and unpadded.
#pragma once

#include <cstdint>

#include "quant/formats.h"

namespace nybble::raw {

struct Q4_0 {
    uint16_t d;
    uint8_t qs[16];  // weight j in the low nibble, j + 16 in the high one
};
struct Q4_1 {
    uint16_t d, m;
    uint8_t qs[16];
};
struct Q5_0 {
    uint16_t d;
    uint8_t qh[4];  // fifth bits of the 32 weights
    uint8_t qs[16];
};
struct Q5_1 {
    uint16_t d, m;
    uint8_t qh[4];
    uint8_t qs[16];
};
struct Q8_0 {
    uint16_t d;
    int8_t qs[32];
};
struct Q2_K {
    uint8_t scales[16];  // low nibble scale, high nibble min, per 16 weights
    uint8_t qs[64];
    uint16_t d, dmin;
};
struct Q3_K {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];  // 16 six-bit scales
    uint16_t d;
};
struct Q4_K {
    uint16_t d, dmin;
    uint8_t scales[12];  // 8 six-bit scales and minima
    uint8_t qs[128];
};
struct Q5_K {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
};
struct Q6_K {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
};
struct IQ4_NL {
    uint16_t d;
    uint8_t qs[16];
};
struct IQ4_XS {
    uint16_t d;
    uint8_t scales_h[2];
    uint8_t scales_l[4];
    uint8_t qs[128];
};
struct MXFP4 {
    uint8_t e;  // E8M0
    uint8_t qs[16];
};

// The blocks below are of nybble's own: what weights of safetensors dialects are turned into before they are packed.

// value = d * (code - zero): GPTQ, AWQ, compressed-tensors, row-wise int8. `group` weights share d; a scale that holds
// for more of them is repeated.
template <int bits, int group>
struct Grouped {
    uint16_t d;
    uint8_t zero;  // at most 2^bits, because files store it minus one or plus an offset
    uint8_t pad;
    uint8_t codes[group * bits / 8];  // a stream of bits: weight i begins at bit i * bits, lowest bit first
};
template <int group>
struct Grouped<8, group> {
    float d;  // row-wise int8 has float32 scales, and with so many bits they matter
    uint8_t zero;
    uint8_t pad[3];
    uint8_t codes[group];
};

// value = d * table[code]: bitsandbytes' NF4 and FP4, with their tables in integers (raw_codes.h).
template <Format format>
struct Codebook {
    float d;
    uint8_t codes[32];  // 64 weights, the first of two in the low nibble
};

// value = d * the number whose bits a code is: E4M3 with no infinities. A scale that holds for more weights is
// repeated.
template <int group>
struct Float8 {
    float d;
    uint8_t codes[group];
};
static_assert(sizeof(Q4_0) == info(Format::Q4_0).block_bytes);
static_assert(sizeof(Q4_1) == info(Format::Q4_1).block_bytes);
static_assert(sizeof(Q5_0) == info(Format::Q5_0).block_bytes);
static_assert(sizeof(Q5_1) == info(Format::Q5_1).block_bytes);
static_assert(sizeof(Q8_0) == info(Format::Q8_0).block_bytes);
static_assert(sizeof(Q2_K) == info(Format::Q2_K).block_bytes);
static_assert(sizeof(Q3_K) == info(Format::Q3_K).block_bytes);
static_assert(sizeof(Q4_K) == info(Format::Q4_K).block_bytes);
static_assert(sizeof(Q5_K) == info(Format::Q5_K).block_bytes);
static_assert(sizeof(Q6_K) == info(Format::Q6_K).block_bytes);
static_assert(sizeof(IQ4_NL) == info(Format::IQ4_NL).block_bytes);
static_assert(sizeof(IQ4_XS) == info(Format::IQ4_XS).block_bytes);
static_assert(sizeof(MXFP4) == info(Format::MXFP4).block_bytes);
static_assert(sizeof(Grouped<2, 32>) == info(Format::U2_32).block_bytes);
static_assert(sizeof(Grouped<2, 128>) == info(Format::U2_128).block_bytes);
static_assert(sizeof(Grouped<3, 32>) == info(Format::U3_32).block_bytes);
static_assert(sizeof(Grouped<3, 128>) == info(Format::U3_128).block_bytes);
static_assert(sizeof(Grouped<4, 32>) == info(Format::U4_32).block_bytes);
static_assert(sizeof(Grouped<4, 128>) == info(Format::U4_128).block_bytes);
static_assert(sizeof(Grouped<8, 32>) == info(Format::U8_32).block_bytes);
static_assert(sizeof(Grouped<8, 128>) == info(Format::U8_128).block_bytes);
static_assert(sizeof(Codebook<Format::NF4_64>) == info(Format::NF4_64).block_bytes);
static_assert(sizeof(Codebook<Format::FP4_64>) == info(Format::FP4_64).block_bytes);
static_assert(sizeof(Float8<32>) == info(Format::F8_32).block_bytes);
static_assert(sizeof(Float8<128>) == info(Format::F8_128).block_bytes);

}  // namespace nybble::raw
