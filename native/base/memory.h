// Page-aligned buffers that know their size.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

namespace nybble {

// Products and sums of sizes come from files and arguments, so they are checked: bad_alloc instead of a short buffer.
inline std::size_t checked_mul(std::size_t a, std::size_t b) {
    std::size_t product = 0;
    if (__builtin_mul_overflow(a, b, &product)) throw std::bad_alloc();
    return product;
}

inline std::size_t checked_add(std::size_t a, std::size_t b) {
    std::size_t sum = 0;
    if (__builtin_add_overflow(a, b, &sum)) throw std::bad_alloc();
    return sum;
}

// An owned array of plain values straight from mmap: zero-filled, pages appear when first touched.
// Buffers of 4 MiB and more start at a 2 MiB border and ask for huge pages, which saves a third of the
// TLB misses of a weight stream.
template <class T>
class Buffer {
    static_assert(std::is_trivially_copyable_v<T>);

public:
    Buffer() = default;
    explicit Buffer(std::size_t count) : count_(count) {
        if (count == 0) return;
        const std::size_t bytes = checked_mul(count, sizeof(T));
        const bool huge = bytes >= 2 * kHugePage;
        mapped_ = huge ? checked_add(bytes, kHugePage) : bytes;
        void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        base_ = base;
        auto address = reinterpret_cast<std::uintptr_t>(base);
        if (huge) {
            address = (address + kHugePage - 1) / kHugePage * kHugePage;
#ifdef MADV_HUGEPAGE
            madvise(reinterpret_cast<void*>(address), bytes, MADV_HUGEPAGE);  // only a wish: failing is fine
#endif
        }
        data_ = reinterpret_cast<T*>(address);
    }
    ~Buffer() {
        if (base_ != nullptr) munmap(base_, mapped_);
    }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* data() { return data_; }
    const T* data() const { return data_; }
    std::size_t size() const { return count_; }
    std::size_t bytes() const { return count_ * sizeof(T); }
    bool empty() const { return count_ == 0; }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }
    std::span<const T> span() const { return {data_, count_}; }

    // Makes room for at least `count` values; what was in the buffer is lost when it has to grow.
    void reserve_discarding(std::size_t count) {
        if (count <= count_) return;
        *this = Buffer();  // give the old pages back first, so that the peak is one buffer
        *this = Buffer(count);
    }

private:
    static constexpr std::size_t kHugePage = std::size_t{2} << 20;

    void swap(Buffer& other) noexcept {
        std::swap(base_, other.base_);
        std::swap(mapped_, other.mapped_);
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
    }

    void* base_ = nullptr;
    std::size_t mapped_ = 0;
    T* data_ = nullptr;
    std::size_t count_ = 0;
};

}  // namespace nybble
