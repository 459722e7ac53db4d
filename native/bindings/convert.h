// From Python arguments to checked spans. Every failure is a ValueError that names the argument.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "base/spare_buffer.h"

namespace nybble {

namespace nb = nanobind;

using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

[[noreturn]] inline void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

// Builds the message even if all is well: where it is put together many times over, test first and call fail().
inline void require(bool ok, const std::string& message) {
    if (!ok) fail(message);
}

template <class T>
std::string type_name() {
    const std::string bits = std::to_string(8 * sizeof(T));
    if constexpr (std::is_floating_point_v<T>) return "float" + bits;
    return (std::is_signed_v<T> ? "int" : "uint") + bits;
}

// A C-contiguous array of `dims` dimensions as a flat span.
template <class T>
std::span<const T> flat(const AnyArray& array, const char* name, std::size_t dims = 1) {
    require(array.dtype() == nb::dtype<T>(), std::string(name) + " must be an array of " + type_name<T>());
    require(array.ndim() == dims, std::string(name) + " must have " + std::to_string(dims) + " dimensions, not " +
                                      std::to_string(array.ndim()));
    std::int64_t stride = 1;
    for (std::size_t d = dims; d-- > 0;) {
        require(array.shape(d) <= 1 || array.stride(d) == stride, std::string(name) + " must be contiguous");
        stride *= static_cast<std::int64_t>(array.shape(d));
    }
    return {static_cast<const T*>(array.data()), array.size()};
}

// The bytes of any object with a contiguous buffer: bytes, memoryview, numpy array.
class Bytes {
public:
    explicit Bytes(nb::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    std::span<const std::uint8_t> span() const {
        return {static_cast<const std::uint8_t*>(view_.buf), static_cast<std::size_t>(view_.len)};
    }

private:
    Py_buffer view_{};
};

// A new numpy array [rows, cols] whose memory, not initialised, goes back to `spare` when nobody uses it any more.
template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<2>> as_numpy(Buffer<T> buffer, std::size_t rows, std::size_t cols,
                                                std::shared_ptr<SpareBuffer<T>> spare) {
    struct Owner {
        Buffer<T> buffer;
        std::shared_ptr<SpareBuffer<T>> spare;
    };
    auto owner = std::make_unique<Owner>(Owner{std::move(buffer), std::move(spare)});
    T* data = owner->buffer.data();
    nb::capsule capsule(owner.get(), [](void* p) noexcept {
        const std::unique_ptr<Owner> owned(static_cast<Owner*>(p));
        owned->spare->give_back(std::move(owned->buffer));
    });
    owner.release();  // the capsule has it
    return nb::ndarray<nb::numpy, T, nb::ndim<2>>(data, {rows, cols}, capsule);
}

// A new numpy array that owns its memory, not initialised.
template <class T>
struct OwnedArray {
    OwnedArray(std::size_t rows, std::size_t cols) : rows(rows), cols(cols), data(new T[rows * cols]) {}

    nb::ndarray<nb::numpy, T, nb::ndim<2>> release() {
        T* owned = data;
        data = nullptr;
        nb::capsule owner(owned, [](void* p) noexcept { delete[] static_cast<T*>(p); });
        return nb::ndarray<nb::numpy, T, nb::ndim<2>>(owned, {rows, cols}, owner);
    }
    ~OwnedArray() { delete[] data; }
    OwnedArray(const OwnedArray&) = delete;
    OwnedArray& operator=(const OwnedArray&) = delete;

    std::size_t rows;
    std::size_t cols;
    T* data;
};
using FloatArray = OwnedArray<float>;
using ByteArray = OwnedArray<std::uint8_t>;

}  // namespace nybble
