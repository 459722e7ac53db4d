// Rotary position embedding of one head, in place.
#pragma once

#include "kernels/simd/common.h"

namespace nybble::ops {

// Rotates the first `rotary` elements by the angles of cos and sin [rotary / 2]; the rest stay. Pair i is
// (x[i], x[i + rotary/2]), or (x[2i], x[2i+1]) when interleaved.
template <class S>
void rope(float* x, const float* cos, const float* sin, int rotary, bool interleaved) {
    const int half = rotary / 2;
    if (interleaved) {
        for (int i = 0; i < half; ++i) {
            float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    int i = 0;
    for (; i + S::lanes <= half; i += S::lanes) {
        typename S::F a = S::load(x + i), b = S::load(x + half + i), c = S::load(cos + i), s = S::load(sin + i);
        S::store(x + i, S::sub(S::mul(a, c), S::mul(b, s)));
        S::store(x + half + i, S::add(S::mul(b, c), S::mul(a, s)));
    }
    for (; i < half; ++i) {
        float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

}  // namespace nybble::ops
