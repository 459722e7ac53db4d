// One packed weight matrix [rows, cols]: groups of 16 rows, as docs/interfaces.md describes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/act_block.h"
#include "quant/formats.h"

namespace nybble {

class Matrix {
public:
    Matrix() = default;

    // Packs `rows` rows of file blocks in parallel. `data` holds rows * row bytes; cols is a multiple of the format's
    // block size (both checked by the caller).
    static Matrix pack(Format format, int rows, int cols, const std::uint8_t* data, ThreadPool& pool);

    // Decodes one row to floats, exactly as the reference decoder does.
    void decode_row(int row, float* out) const;

    bool empty() const { return data_.empty(); }
    Format format() const { return format_; }
    int rows() const { return rows_; }
    int cols() const { return cols_; }
    int groups() const { return (rows_ + kGroupRows - 1) / kGroupRows; }
    std::size_t group_bytes() const { return group_bytes_; }
    std::size_t bytes() const { return data_.bytes(); }
    const std::uint8_t* group(int g) const { return data_.data() + static_cast<std::size_t>(g) * group_bytes_; }

private:
    Format format_ = Format::F32;
    int rows_ = 0;
    int cols_ = 0;
    std::size_t group_bytes_ = 0;
    Buffer<std::uint8_t> data_;
};

// Weights that are floats, of 8 bits too, are multiplied with float activations, all others with int8 ones.
inline bool is_float_format(Format format) {
    return format == Format::F32 || format == Format::F16 || format == Format::BF16 || format == Format::F8_32 ||
           format == Format::F8_128;
}

}  // namespace nybble
