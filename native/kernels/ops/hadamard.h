// The Hadamard rotation of one head: products of rotated queries and keys are those of the heads themselves, but a key
// has no outliers any more, which would take the 8-bit codes of its other numbers away. After Ashkboos et al. 2024,
// "QuaRot", arXiv 2404.00456.
#pragma once

#include "kernels/simd/common.h"

namespace nybble::ops {

// In place, on a power of two of numbers.
template <class S>
NYBBLE_INLINE void rotate_power_of_two(float* x, int n) {
    for (int half = 1; half < n; half *= 2) {
        for (int start = 0; start < n; start += 2 * half) {
            float *low = x + start, *high = x + start + half;
            int i = 0;
            for (; i + S::lanes <= half; i += S::lanes) {
                const typename S::F a = S::load(low + i), b = S::load(high + i);
                S::store(low + i, S::add(a, b));
                S::store(high + i, S::sub(a, b));
            }
            for (; i < half; ++i) {
                const float a = low[i], b = high[i];
                low[i] = a + b;
                high[i] = a - b;
            }
        }
    }
    const float norm = 1.0f / __builtin_sqrtf((float)n);
    for (int i = 0; i < n; ++i) x[i] *= norm;
}

// Any length: cut into powers of two, the largest first.
template <class S>
void hadamard(float* x, int n) {
    while (n > 0) {
        int part = 1;
        while (2 * part <= n) part *= 2;
        rotate_power_of_two<S>(x, part);
        x += part;
        n -= part;
    }
}

}  // namespace nybble::ops
