// Repacks rows of file blocks into the layout that the kernels read, and decodes rows of either.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/decode.h"  // so that who packs can also decode
#include "quant/formats.h"

namespace nybble {

// Bytes of one packed group of 16 rows. The file's own size, for rows in multiples of 16.
constexpr std::size_t packed_group_bytes(Format format, std::size_t cols) { return 16 * row_bytes(format, cols); }
constexpr std::size_t packed_bytes(Format format, std::size_t rows, std::size_t cols) {
    return (rows + 15) / 16 * packed_group_bytes(format, cols);
}

// Packs the row groups [group_begin, group_end) of a matrix of file blocks at `src` into `dst`, where the whole packed
// matrix starts. Rows past the end become zero rows. cols must be a multiple of the block size.
void pack_rows(Format format, const uint8_t* src, std::size_t rows, std::size_t cols, std::size_t group_begin,
               std::size_t group_end, uint8_t* dst);

// One row of a packed matrix as floats, bit for bit what dequantize() gives for the file's row.
void unpack_row(Format format, const uint8_t* packed, std::size_t cols, std::size_t row, float* dst);

}  // namespace nybble
