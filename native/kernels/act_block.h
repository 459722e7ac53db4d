// Activations quantised to int8, 32 inputs of one token at a time. See docs/architecture.md for the tile layout.
#pragma once

#include <cstddef>
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

// A few channels of every decoder are far larger than the rest, and nearly all of the rounding error of a row comes
// from their blocks. A block whose largest value is above this many times the row's root mean square is refined: what
// rounding left over is quantised once more, with a scale 254 times finer. Measured on SmolLM2-135M: one block in nine
// is refined, and the KL divergence from float activations falls to a fifth.
inline constexpr float kRefineAbove = 5.0f;

// Where the blocks of some tokens lie, or shall be put. The three arrays are indexed alike.
struct Acts {
    ActBlock* blocks = nullptr;
    ActBlock* fine = nullptr;    // valid only where `refined` is set
    uint8_t* refined = nullptr;  // 0 or 1

    Acts at(ptrdiff_t index) const { return {blocks + index, fine + index, refined + index}; }
};

}  // namespace nybble
