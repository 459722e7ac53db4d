// Activations quantised to int8, 32 inputs of one token at a time. See docs/interfaces.md for the tile layout.
#pragma once

#include <cstdint>

namespace nybble {

inline constexpr int kBlockInputs = 32;  // inputs per k block
inline constexpr int kGroupRows = 16;    // output rows per packed weight group
inline constexpr int kTokenTile = 16;    // tokens per activation tile

struct alignas(64) ActBlock {
    int8_t q[kBlockInputs];  // round(x / scale), within +-127
    float scale;
    int32_t neg_sum;       // -sum(q): shifted, it undoes the offset of unsigned weight codes
    int32_t neg_sum16[2];  // the same of each half, for types with 16-input scales
    float sum;             // float(sum(q)): multiplies the minima
    float sum16[2];
    float pad;
};
static_assert(sizeof(ActBlock) == 64);

}  // namespace nybble
