// The activations that a GEMM reads, in the forms that its weights ask for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/act_block.h"
#include "model/matrix.h"

namespace nybble {

// Which forms some matrices need: quantised weights read int8 blocks unless everything is computed in floats.
struct Forms {
    bool blocks = false;
    bool floats = false;

    Forms& include(const Matrix& matrix, bool act_f32) {
        (act_f32 || is_float_format(matrix.format()) ? floats : blocks) = true;
        return *this;
    }
};

// `tokens` rows of k inputs. Blocks lie in tiles of 16 tokens, [tile][k block][token in tile]; floats row by row.
struct Operand {
    int tokens = 0;
    int k = 0;
    Forms forms;
    Acts blocks;
    float* floats = nullptr;
    const std::int32_t* order = nullptr;  // blocks hold the inputs order[0], order[1], ...; null: as floats do

    int k_blocks() const { return k / kBlockInputs; }
    // Distance between two k blocks of a token: the number of tokens in its tile.
    int stride(int token) const { return std::min(kTokenTile, tokens - token / kTokenTile * kTokenTile); }
    // Where the first block of a token lies; the next ones follow at its stride.
    Acts first_block(int token) const {
        const int tile = token / kTokenTile * kTokenTile;
        return blocks.at(static_cast<std::ptrdiff_t>(tile) * k_blocks() + (token - tile));
    }
    float* row(int token) const { return floats + static_cast<std::ptrdiff_t>(token) * k; }
};

}  // namespace nybble
