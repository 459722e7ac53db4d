// Quantises one token's activations to int8 blocks of 32. Input that is not finite gives defined, meaningless codes.
#pragma once

#include <cstddef>

#include "kernels/act_block.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

// k is a multiple of 32; block b goes to first[b * stride].
template <class S>
void quantize(const float* x, int k, ActBlock* first, int stride) {
    using F = typename S::F;
    constexpr int vectors = kBlockInputs / S::lanes;
    for (int i = 0; i < k; i += kBlockInputs, first += stride, x += kBlockInputs) {
        F v[vectors];
        F largest = S::zero();
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) {
            v[j] = S::load(x + j * S::lanes);
            largest = S::max(S::abs(v[j]), largest);
        }
        float scale = S::reduce_max(largest) / 127.0f;
        // Where 1 / scale would overflow the block is as good as zero.
        bool tiny = !(scale > 1e-37f);
        F inverse = S::set1(tiny ? 0.0f : 1.0f / scale);
        typename S::I sums[2] = {S::iset1(0), S::iset1(0)};
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) {
            // The bounds come second in max and min, so that NaN becomes a bound.
            F q = S::min(S::max(S::mul(v[j], inverse), S::set1(-127.0f)), S::set1(127.0f));
            typename S::I codes = S::cvt_round(q);
            S::store_i8(first->q + j * S::lanes, codes);
            sums[j * 2 / vectors] = S::iadd(sums[j * 2 / vectors], codes);
        }
        int sum0 = S::ireduce_add(sums[0]);
        int sum1 = S::ireduce_add(sums[1]);
        first->scale = tiny ? 0.0f : scale;
        first->neg_sum = -(sum0 + sum1);
        first->neg_sum16[0] = -sum0;
        first->neg_sum16[1] = -sum1;
        first->sum = (float)(sum0 + sum1);
        first->sum16[0] = (float)sum0;
        first->sum16[1] = (float)sum1;
        first->pad = 0.0f;
    }
}

}  // namespace nybble::ops
