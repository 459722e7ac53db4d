#include "model/matrix.h"

#include "quant/pack.h"

namespace nybble {

Matrix Matrix::pack(Format format, int rows, int cols, const std::uint8_t* data, ThreadPool& pool) {
    Matrix matrix;
    matrix.format_ = format;
    matrix.rows_ = rows;
    matrix.cols_ = cols;
    const auto width = static_cast<std::size_t>(cols);
    matrix.group_bytes_ = packed_group_bytes(format, width);
    matrix.data_ = Buffer<std::uint8_t>(checked_mul(static_cast<std::size_t>(matrix.groups()), matrix.group_bytes_));
    std::uint8_t* packed = matrix.data_.data();
    pool.run([&](Worker& worker) {
        worker.parallel_for(matrix.groups(), 4, [&](std::int64_t begin, std::int64_t end) {
            pack_rows(format, data, static_cast<std::size_t>(rows), width, static_cast<std::size_t>(begin),
                      static_cast<std::size_t>(end), packed);
        });
    });
    return matrix;
}

void Matrix::decode_row(int row, float* out) const {
    unpack_row(format_, data_.data(), static_cast<std::size_t>(cols_), static_cast<std::size_t>(row), out);
}

}  // namespace nybble
