// RMS norm of one row, and the elementwise add, scale and soft cap.
#pragma once

#include "kernels/simd/common.h"

namespace nybble::ops {

// out = x / sqrt(mean(x^2) + eps) * w. `out` may be `x`.
template <class S>
void rms_norm(const float* x, const float* w, float eps, int n, float* out) {
    using F = typename S::F;
    F sums[4] = {S::zero(), S::zero(), S::zero(), S::zero()};  // four, so that their latencies overlap
    int i = 0;
    for (; i + 4 * S::lanes <= n; i += 4 * S::lanes) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            F v = S::load(x + i + j * S::lanes);
            sums[j] = S::fma(v, v, sums[j]);
        }
    }
    for (; i + S::lanes <= n; i += S::lanes) {
        F v = S::load(x + i);
        sums[0] = S::fma(v, v, sums[0]);
    }
    float total = S::reduce_add(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
    for (; i < n; ++i) total += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(total / (float)n + eps);
    const F factors = S::set1(factor);
    for (i = 0; i + S::lanes <= n; i += S::lanes) {
        S::store(out + i, S::mul(S::mul(S::load(x + i), factors), S::load(w + i)));
    }
    for (; i < n; ++i) out[i] = x[i] * factor * w[i];
}

// out = a + b, of n floats. `out` may be either.
template <class S>
void add(const float* a, const float* b, int n, float* out) {
    int i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(out + i, S::add(S::load(a + i), S::load(b + i)));
    for (; i < n; ++i) out[i] = a[i] + b[i];
}

// x *= factor, in place.
template <class S>
void scale(float* x, float factor, int n) {
    const typename S::F factors = S::set1(factor);
    int i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(x + i, S::mul(S::load(x + i), factors));
    for (; i < n; ++i) x[i] *= factor;
}

// x = cap * tanh(x / cap), in place.
template <class S>
void softcap(float* x, float cap, int n) {
    const typename S::F caps = S::set1(cap), inverse = S::set1(1.0f / cap);
    int i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        S::store(x + i, S::mul(caps, simd_tanh<S>(S::mul(S::load(x + i), inverse))));
    }
    for (; i < n; ++i) {
        float lane[S::lanes];
        S::store(lane, S::mul(caps, simd_tanh<S>(S::mul(S::set1(x[i]), inverse))));
        x[i] = lane[0];
    }
}

}  // namespace nybble::ops
