// Keeps the last large array that was given back, for the next one of its kind: fresh pages cost as much as a tenth of
// a decode step with many sequences and a large vocabulary.
#pragma once

#include <cstddef>
#include <mutex>
#include <utility>

#include "base/memory.h"

namespace nybble {

// Safe on any thread. Holds at most one buffer, and none that is larger than kMostBytes.
template <class T>
class SpareBuffer {
public:
    // Room for `count` values, which may hold anything.
    Buffer<T> take(std::size_t count) {
        {
            const std::lock_guard lock(mutex_);
            if (count <= kept_.size()) return std::exchange(kept_, Buffer<T>());
        }
        return Buffer<T>(count);
    }
    // The larger of this one and what is kept already stays.
    void give_back(Buffer<T> buffer) {
        if (buffer.bytes() > kMostBytes) return;
        const std::lock_guard lock(mutex_);
        if (buffer.size() > kept_.size()) std::swap(buffer, kept_);
    }

private:
    static constexpr std::size_t kMostBytes = std::size_t{128} << 20;

    std::mutex mutex_;
    Buffer<T> kept_;
};

}  // namespace nybble
