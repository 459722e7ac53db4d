// Gated activations: out = act(gate) * up.
#pragma once

#include <cstddef>
#include <cstring>

#include "kernels/simd/common.h"

namespace nybble::ops {

struct Silu {
    template <class S>
    NYBBLE_SIMD typename S::F apply(typename S::F x) {
        typename S::F e = S::exp(S::sub(S::zero(), x));
        return S::div(x, S::add(S::set1(1.0f), e));
    }
};

struct GeluTanh {
    // x/2 (1 + tanh y) = x / (1 + e^-2y), which has no cancellation; y = sqrt(2/pi) (x + 0.044715 x^3).
    template <class S>
    NYBBLE_SIMD typename S::F apply(typename S::F x) {
        typename S::F cubic = S::fma(S::mul(S::mul(x, x), S::set1(0.044715f)), x, x);
        typename S::F e = S::exp(S::mul(cubic, S::set1(-1.5957691216f)));
        return S::div(x, S::add(S::set1(1.0f), e));
    }
};

// `out` may be `gate` or `up`.
template <class S, class Act>
void act_mul(const float* gate, const float* up, int n, float* out) {
    int i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        S::store(out + i, S::mul(Act::template apply<S>(S::load(gate + i)), S::load(up + i)));
    }
    if (i < n) {  // the tail, through one padded vector
        float g[S::lanes] = {}, u[S::lanes] = {}, result[S::lanes];
        const size_t bytes = (size_t)(n - i) * sizeof(float);
        std::memcpy(g, gate + i, bytes);
        std::memcpy(u, up + i, bytes);
        S::store(result, S::mul(Act::template apply<S>(S::load(g)), S::load(u)));
        std::memcpy(out + i, result, bytes);
    }
}

}  // namespace nybble::ops
