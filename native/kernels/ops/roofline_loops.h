// The two loops that measure what a machine can do at best: integer dot products from registers, and reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/simd/common.h"

namespace nybble::ops {

// Runs `iterations` x 12 independent dot4 and returns the operations (a multiply and an add each count as one).
template <class S>
double int8_peak_loop(long iterations) {
    constexpr int chains = 12;
    using I = typename S::I;
    uint8_t bytes[64];
    std::memset(bytes, 3, sizeof bytes);
    typename S::B codes = S::bload(bytes);
    alignas(4) int8_t act[4] = {1, -2, 3, -1};
    I acc[chains];
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) acc[c] = S::iset1(c);
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
        for (int c = 0; c < chains; ++c) {
            S::keep(codes);  // or the product would be taken out of the loop
            acc[c] = S::template dot4<127>(acc[c], codes, act);
            S::keep(acc[c]);
        }
    }
    I total = acc[0];
#pragma GCC unroll 16
    for (int c = 1; c < chains; ++c) total = S::iadd(total, acc[c]);
    volatile int32_t keep = S::ireduce_add(total);
    (void)keep;
    return (double)iterations * chains * S::lanes * 4 * 2;
}

template <class S>
uint64_t read_loop(const uint8_t* data, size_t bytes) {
    using B = typename S::B;
    constexpr size_t width = sizeof(B);
    B sums[4] = {S::bset1(0), S::bset1(0), S::bset1(0), S::bset1(0)};
    for (size_t i = 0; i + 4 * width <= bytes; i += 4 * width) {
        __builtin_prefetch(data + i + 4096);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j) sums[j] = S::bxor(sums[j], S::bload(data + i + j * width));
    }
    const B all = S::bxor(S::bxor(sums[0], sums[1]), S::bxor(sums[2], sums[3]));
    uint64_t words[width / 8], checksum = 0;
    std::memcpy(words, &all, width);
    for (uint64_t word : words) checksum ^= word;
    return checksum;
}

}  // namespace nybble::ops
