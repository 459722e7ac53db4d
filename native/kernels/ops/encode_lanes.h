// Vectors for the encoders: `S::lanes` groups of weights side by side, one per lane.
//
// Plain vector types of the compiler do here, because an encoder needs only exactly rounded arithmetic, comparisons and
// blends, and those are the same everywhere. S keeps the instances of different instruction sets apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "quant/encode.h"

namespace nybble::ops {

// Spelled out, because GCC does not take a vector's size from a template's argument.
template <int lanes>
struct Vectors;
template <>
struct Vectors<4> {
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint8_t B __attribute__((vector_size(4)));
};
template <>
struct Vectors<8> {
    typedef float F __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    typedef uint8_t B __attribute__((vector_size(8)));
};
template <>
struct Vectors<16> {
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    typedef uint8_t B __attribute__((vector_size(16)));
};

template <class S>
struct Lanes {
    static constexpr int n = S::lanes;
    using F = typename Vectors<n>::F;
    using I = typename Vectors<n>::I;

    [[gnu::always_inline]] static inline F set(float x) { return F{} + x; }
    [[gnu::always_inline]] static inline F load(const float* p) {
        F x;
        std::memcpy(&x, p, sizeof(x));
        return x;
    }
    [[gnu::always_inline]] static inline void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
    [[gnu::always_inline]] static inline F abs(F x) { return reinterpret_cast<F>(reinterpret_cast<I>(x) & 0x7fffffff); }
    [[gnu::always_inline]] static inline F cvt(I x) { return __builtin_convertvector(x, F); }
    [[gnu::always_inline]] static inline I truncate(F x) { return __builtin_convertvector(x, I); }
    [[gnu::always_inline]] static inline I clamp(I x, int low, int high) {
        const I l = I{} + low, h = I{} + high;
        x = x < l ? l : x;
        return x > h ? h : x;
    }
    // The low bytes.
    [[gnu::always_inline]] static inline void store_bytes(uint8_t* out, I x) {
        const auto bytes = __builtin_convertvector(x, typename Vectors<n>::B);
        std::memcpy(out, &bytes, sizeof(bytes));
    }
    // Nearest even up to 2^22; beyond it wraps in the way that the file format's reference encoder does.
    [[gnu::always_inline]] static inline I nearest(F x) {
        return (reinterpret_cast<I>(x + 12582912.0f) & 0x007fffff) - 0x00400000;
    }
    [[gnu::always_inline]] static inline I round_clamp(F x, int low, int high) { return clamp(nearest(x), low, high); }
};

// The same as Lanes::nearest for one value.
[[gnu::always_inline]] inline int nearest_int(float x) {
    const float shifted = x + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    return (bits & 0x007fffff) - 0x00400000;
}

// Weight i of groups first .. first + lanes - 1 becomes vector i; groups from `count` on are zeros.
template <class S, int size>
void load_groups(const float* x, int64_t first, int64_t count, typename Lanes<S>::F out[size]) {
    constexpr int n = Lanes<S>::n;
    float* flat = reinterpret_cast<float*>(out);
    const int present = static_cast<int>(std::min<int64_t>(n, count - first));
    if (present < n) std::memset(flat, 0, sizeof(float) * n * size);
    for (int lane = 0; lane < present; ++lane) {
        const float* group = x + (first + lane) * size;
        for (int i = 0; i < size; ++i) flat[i * n + lane] = group[i];
    }
}

// Lanes of existing groups into a row's array.
template <class S>
void store_lanes(float* out, int64_t first, int64_t count, typename Lanes<S>::F x) {
    const auto present = static_cast<std::size_t>(std::min<int64_t>(Lanes<S>::n, count - first));
    std::memcpy(out + first, &x, present * sizeof(float));
}

}  // namespace nybble::ops
