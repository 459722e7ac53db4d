// Thin products in floats, for adapters: a packed group of 16 rows of a low-rank factor, F32 or F16.
//
// A step often has one token for an adapter, and 16 rows are one register, so a single chain of sums would wait for
// itself. Four chains do not: input i goes to chain i % 4, whatever the tile, so every result is the same for any
// number of tokens.
#pragma once

#include "kernels/ops/gemm_f32.h"

namespace nybble::ops {

inline constexpr int kLowRankChains = 4;

template <class S>
inline constexpr int kLowRankTile = S::max_tile >= 16 ? 4 : 2;

template <class S, class W, bool add, int T>
[[gnu::noinline]] void low_rank_tile(const uint8_t* w_group, const float* x, ptrdiff_t ldx, int k, float* out,
                                     ptrdiff_t ldo) {
    using F = typename S::F;
    using Element = typename W::Element;
    for (int row0 = 0; row0 < kGroupRows; row0 += S::lanes) {
        F acc[T][kLowRankChains];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int c = 0; c < kLowRankChains; ++c) acc[t][c] = S::zero();
        }
        const Element* w = reinterpret_cast<const Element*>(w_group) + row0;
        int i = 0;
        for (; i + kLowRankChains <= k; i += kLowRankChains) {
            __builtin_prefetch(reinterpret_cast<const char*>(w) + 2048);
#pragma GCC unroll 4
            for (int c = 0; c < kLowRankChains; ++c, w += kGroupRows) {
                const F value = W::template load<S>(w);
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) acc[t][c] = S::fma(value, S::set1(x[t * ldx + i + c]), acc[t][c]);
            }
        }
#pragma GCC unroll 3
        for (int c = 0; c < kLowRankChains - 1; ++c, w += kGroupRows) {
            if (i + c >= k) break;
            const F value = W::template load<S>(w);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) acc[t][c] = S::fma(value, S::set1(x[t * ldx + i + c]), acc[t][c]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            const F sum = S::add(S::add(acc[t][0], acc[t][1]), S::add(acc[t][2], acc[t][3]));
            float* to = out + t * ldo + row0;
            S::store(to, add ? S::add(S::load(to), sum) : sum);
        }
    }
}

// out[t][0..15] = w x[t], or += with `add`, for all tokens of x[tokens][ldx].
template <class S, class W, bool add>
void low_rank(const uint8_t* w_group, const float* x, int ldx, int tokens, int k, float* out, int ldo) {
    int t = 0;
    for (; t + kLowRankTile<S> <= tokens; t += kLowRankTile<S>) {
        low_rank_tile<S, W, add, kLowRankTile<S>>(w_group, x + (ptrdiff_t)t * ldx, ldx, k, out + (ptrdiff_t)t * ldo,
                                                  ldo);
    }
    if (kLowRankTile<S> > 2 && t + 2 <= tokens) {
        low_rank_tile<S, W, add, 2>(w_group, x + (ptrdiff_t)t * ldx, ldx, k, out + (ptrdiff_t)t * ldo, ldo);
        t += 2;
    }
    if (t < tokens) {
        low_rank_tile<S, W, add, 1>(w_group, x + (ptrdiff_t)t * ldx, ldx, k, out + (ptrdiff_t)t * ldo, ldo);
    }
}

}  // namespace nybble::ops
