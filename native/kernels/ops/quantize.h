// Quantises one token's activations to int8 blocks of 32. Input that is not finite gives defined, meaningless codes.
#pragma once

#include <cstddef>

#include "kernels/act_block.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

template <class S>
inline constexpr int kBlockVectors = kBlockInputs / S::lanes;

template <class S>
NYBBLE_INLINE float largest_magnitude(const typename S::F* v) {
    typename S::F largest = S::zero();
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVectors<S>; ++j) largest = S::max(S::abs(v[j]), largest);
    return S::reduce_max(largest);
}

// Codes of v with this scale; v becomes what rounding left over.
template <class S>
NYBBLE_INLINE void quantize_block(typename S::F* v, float scale, ActBlock& block) {
    using F = typename S::F;
    // Where 1 / scale would overflow the block is as good as zero.
    const bool tiny = !(scale > 1e-37f);
    if (tiny) scale = 0.0f;
    const F inverse = S::set1(tiny ? 0.0f : 1.0f / scale);
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVectors<S>; ++j) {
        // The bounds come second in max and min, so that NaN becomes a bound.
        const F q = S::min(S::max(S::mul(v[j], inverse), S::set1(-127.0f)), S::set1(127.0f));
        const typename S::I codes = S::cvt_round(q);
        S::store_i8(block.q + j * S::lanes, codes);
        v[j] = S::fma(S::cvt(codes), S::set1(-scale), v[j]);
    }
    const int sum0 = S::sum16(block.q);
    const int sum1 = S::sum16(block.q + 16);
    block.scale = scale;
    block.neg_sum = -(sum0 + sum1);
    block.neg_sum16[0] = -sum0;
    block.neg_sum16[1] = -sum1;
    block.sum = (float)(sum0 + sum1);
    block.sum16[0] = (float)sum0;
    block.sum16[1] = (float)sum1;
    block.pad = 0.0f;
}

template <class S>
NYBBLE_INLINE float mean_square(const float* x, int k) {
    typename S::F sums[2] = {S::zero(), S::zero()};
    for (int i = 0; i < k; i += 2 * S::lanes) {
        const typename S::F a = S::load(x + i), b = S::load(x + i + S::lanes);
        sums[0] = S::fma(a, a, sums[0]);
        sums[1] = S::fma(b, b, sums[1]);
    }
    return S::reduce_add(S::add(sums[0], sums[1])) / (float)k;
}

// A whole row, k a multiple of 32; block b goes to index b * stride.
template <class S>
void quantize(const float* x, int k, Acts to, int stride) {
    const float limit = kRefineAbove * kRefineAbove * mean_square<S>(x, k);
    for (int i = 0; i < k; i += kBlockInputs, to = to.at(stride)) {
        typename S::F v[kBlockVectors<S>];
#pragma GCC unroll 8
        for (int j = 0; j < kBlockVectors<S>; ++j) v[j] = S::load(x + i + j * S::lanes);
        const float largest = largest_magnitude<S>(v);
        quantize_block<S>(v, largest / 127.0f, *to.blocks);
        *to.refined = largest * largest > limit;
        if (*to.refined) quantize_block<S>(v, largest / (127.0f * 254.0f), *to.fine);
    }
}

}  // namespace nybble::ops
