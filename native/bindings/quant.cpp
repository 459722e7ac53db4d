#include <nanobind/stl/string.h>

#include "base/cpu_count.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "model/matrix.h"
#include "quant/pack.h"

namespace nybble {

Format format_argument(const std::string& name) {
    const std::optional<Format> format = format_by_name(name);
    require(format.has_value(), "unknown weight format '" + name + "'");
    return *format;
}

namespace {

nb::ndarray<nb::numpy, float, nb::ndim<1>> dequantize_bytes(const std::string& name, nb::handle object) {
    const Format format = format_argument(name);
    const Bytes bytes(object);
    const auto block_bytes = static_cast<std::size_t>(info(format).block_bytes);
    require(bytes.span().size() % block_bytes == 0,
            std::to_string(bytes.span().size()) + " bytes are not whole blocks of " + name);
    const std::size_t count = bytes.span().size() / block_bytes * static_cast<std::size_t>(info(format).block_size);
    FloatArray out(1, count);
    {
        const nb::gil_scoped_release free_gil;
        dequantize(format, bytes.span().data(), out.data, count);
    }
    float* owned = out.data;
    out.data = nullptr;
    nb::capsule owner(owned, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return nb::ndarray<nb::numpy, float, nb::ndim<1>>(owned, {count}, owner);
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> pack_roundtrip(const std::string& name, nb::handle object, int rows,
                                                          int cols) {
    const Format format = format_argument(name);
    const Bytes bytes(object);
    require(rows >= 1 && cols >= 1 && cols % info(format).block_size == 0,
            "rows must be at least 1 and cols whole blocks of " + name);
    require(bytes.span().size() == static_cast<std::size_t>(rows) * row_bytes(format, static_cast<std::size_t>(cols)),
            "the bytes do not fit the shape");
    FloatArray out(static_cast<std::size_t>(rows), static_cast<std::size_t>(cols));
    {
        const nb::gil_scoped_release free_gil;
        ThreadPool pool(default_threads());
        const Matrix matrix = Matrix::pack(format, rows, cols, bytes.span().data(), pool);
        for (int row = 0; row < rows; ++row) matrix.decode_row(row, out.data + static_cast<std::ptrdiff_t>(row) * cols);
    }
    return out.release();
}

}  // namespace

void bind_quant(nb::module_& m) {
    m.def("dequantize", &dequantize_bytes, nb::arg("format"), nb::arg("data"), "The weights of file blocks as floats.");
    m.def("pack_roundtrip", &pack_roundtrip, nb::arg("format"), nb::arg("data"), nb::arg("rows"), nb::arg("cols"),
          "Packs a matrix for the kernels and decodes it again.");
}

}  // namespace nybble
