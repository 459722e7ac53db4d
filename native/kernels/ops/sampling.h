// What the sampler does to a whole row of logits.
#pragma once

#include <cstdint>

#include "kernels/sampling_sizes.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

// maxima[b] = the largest of x[64b..64b+63]; returns the largest of all, or NaN if there is one in x.
template <class S>
float block_maxima(const float* x, int n, float* maxima) {
    using F = typename S::F;
    constexpr int vectors = kMaximaBlock / S::lanes;
    const F lowest = S::set1(-__builtin_inff());
    F largest = lowest;
    F poison = S::zero();  // sums of what is not positive: NaN if and only if a NaN was added
    int block = 0, i = 0;
    for (; i + kMaximaBlock <= n; i += kMaximaBlock, ++block) {
        F lanes = lowest;
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            const F values = S::load(x + i + v * S::lanes);
            lanes = S::max(values, lanes);
            poison = S::add(poison, S::min(S::zero(), values));
        }
        largest = S::max(lanes, largest);
        maxima[block] = S::reduce_max(lanes);
    }
    float result = S::reduce_max(largest);
    bool is_bad = __builtin_isnan(S::reduce_add(poison));
    if (i < n) {
        float last = x[i];
        for (; i < n; ++i) {
            is_bad |= __builtin_isnan(x[i]);
            last = x[i] > last ? x[i] : last;
        }
        maxima[block] = last;
        result = last > result ? last : result;
    }
    return is_bad ? __builtin_nanf("") : result;
}

// Exactly 0 for tokens that are ruled out (-inf), and for others below e^-86: the arguments never get where results
// are subnormal, which many machines compute a hundred times slower.
template <class S>
NYBBLE_INLINE typename S::F exp_weight(const float* x, typename S::F max, typename S::F factor) {
    const typename S::F argument = S::mul(S::sub(S::load(x), max), factor);
    const typename S::F weight = S::exp(S::max(S::set1(-86.5f), argument));  // at least 2.7e-38
    return S::max(S::zero(), S::sub(weight, S::set1(3e-38f)));
}

// exp_weight of the `count` < lanes values at x; 0 in the other lanes.
template <class S>
NYBBLE_INLINE typename S::F exp_weight_part(const float* x, int count, typename S::F max, typename S::F factor) {
    float lanes[S::lanes];
    for (int j = 0; j < S::lanes; ++j) lanes[j] = j < count ? x[j] : -__builtin_inff();
    return exp_weight<S>(lanes, max, factor);
}

// out[i] = exp((x[i] - max) * factor). `out` may be `x`. Every value is the same wherever it stands.
template <class S>
void exp_weights(const float* x, int n, float max, float factor, float* out) {
    using F = typename S::F;
    const F maxs = S::set1(max), factors = S::set1(factor);
    int i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(out + i, exp_weight<S>(x + i, maxs, factors));
    if (i < n) {
        float lanes[S::lanes];
        S::store(lanes, exp_weight_part<S>(x + i, n - i, maxs, factors));
        for (int j = 0; i < n; ++i, ++j) out[i] = lanes[j];
    }
}

// sums[c] = the sum of exp((x[i] - max) * factor) over the chunk x[1024c..1024c+1023].
template <class S>
void exp_sums(const float* x, int n, float max, float factor, float* sums) {
    using F = typename S::F;
    const F maxs = S::set1(max), factors = S::set1(factor);
    for (int begin = 0; begin < n; begin += kExpChunk, ++sums) {
        const int end = begin + kExpChunk < n ? begin + kExpChunk : n;
        F parts[4] = {S::zero(), S::zero(), S::zero(), S::zero()};  // four, so that their latencies overlap
        int i = begin;
        for (; i + 4 * S::lanes <= end; i += 4 * S::lanes) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                parts[j] = S::add(parts[j], exp_weight<S>(x + i + j * S::lanes, maxs, factors));
            }
        }
        for (; i + S::lanes <= end; i += S::lanes) parts[0] = S::add(parts[0], exp_weight<S>(x + i, maxs, factors));
        if (i < end) parts[1] = S::add(parts[1], exp_weight_part<S>(x + i, end - i, maxs, factors));
        *sums = S::reduce_add(S::add(S::add(parts[0], parts[1]), S::add(parts[2], parts[3])));
    }
}

// out[i] = x[i] where bit i % 32 of allowed[i / 32] is set, else -inf; NaN stays. `out` may be `x`.
template <class S>
void mask_logits(const float* x, const uint32_t* allowed, int n, float* out) {
    using I = typename S::I;
    int32_t lane_bits[S::lanes];
    for (int j = 0; j < S::lanes; ++j) lane_bits[j] = 1 << j;
    const I bit = S::iload(lane_bits), one = S::iset1(1);
    const I sign = S::iset1((int32_t)0x80000000u), infinity = S::iset1(0x7f800000);
    int i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        const I bits = S::iand(S::iset1((int32_t)(allowed[i / 32] >> (i % 32))), bit);
        // bits - 1 is negative where the bit is clear: the limit is -inf there, and inf elsewhere.
        const I limit = S::ior(S::iand(S::isub(bits, one), sign), infinity);
        S::store(out + i, S::min(S::as_float(limit), S::load(x + i)));
    }
    for (; i < n; ++i) {
        const bool keep = (allowed[i / 32] >> (i % 32) & 1) != 0 || __builtin_isnan(x[i]);
        out[i] = keep ? x[i] : -__builtin_inff();
    }
}

}  // namespace nybble::ops
