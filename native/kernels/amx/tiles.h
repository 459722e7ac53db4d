// The tile registers: eight of 16 rows of 64 bytes, whose shapes are set before use.
#pragma once

#include <cstdint>

#include "kernels/act_block.h"

namespace nybble::amx {

inline constexpr int kVectorBytes = 64;  // four inputs of each of 16 rows

// Shapes of the registers in use: 0 sums, 1 activations of a tile of tokens, 2 codes of a group. The intrinsics want
// plain digits. `inputs`: that one instruction sums over.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    constexpr explicit TileConfig(int inputs) {
        row_bytes[0] = row_bytes[2] = kVectorBytes;
        row_bytes[1] = (uint16_t)inputs;
        rows[0] = rows[1] = kTokenTile;
        rows[2] = (uint8_t)(inputs / 4);
    }
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace nybble::amx
