// Integer GEMM of one packed group of 16 output rows with int8 activations: the hot path of every quantised layer.
// A tile of T tokens keeps its accumulators in registers; each k block's codes and scales are unpacked once for all of
// them. Per token and k block the operations are the same for every T, so results do not depend on the batch. Then
// comes a second pass over the few blocks that are refined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/act_block.h"
#include "kernels/ops/prefetch.h"
#include "kernels/simd/common.h"
#include "quant/packed_codebook.h"

namespace nybble::ops {

template <class S, class Q, int sub>
NYBBLE_INLINE typename S::I plane_dot(const typename S::B* codes, const ActBlock& act) {
    constexpr int span = 8 / Q::subs;
    typename S::I dot;
    if constexpr (Q::shift == 7 && S::has_offset_dot) {
        dot = S::template offset_dot<span>(codes + sub * span, act.q + 4 * sub * span);
    } else {
        if constexpr (Q::shift < 0) {
            dot = S::iset1(0);
        } else {
            dot = S::template start<Q::shift>(Q::subs == 1 ? &act.neg_sum : &act.neg_sum16[sub]);
        }
        dot = S::template dot<Q::max_code, span>(dot, codes + sub * span, act.q + 4 * sub * span);
    }
    return dot;
}

template <class S, class Q, int sub>
NYBBLE_INLINE typename S::F block_dot(const typename S::B* codes, const ActBlock& act) {
    typename S::I dot = plane_dot<S, Q, sub>(codes, act);
    if constexpr (packed::kTwoPlanes<Q>) {
        dot = S::iadd(S::template ishl<8>(dot), plane_dot<S, Q, sub>(codes + 8, act));
    }
    return S::cvt(dot);
}

// The minima of the rows, times the sums of one token's codes.
template <class S, class Q>
NYBBLE_INLINE typename S::F add_minima(typename S::F sum, const typename S::F* wm, const ActBlock& act) {
    if constexpr (Q::has_min) {
        if constexpr (Q::subs == 1) {
            sum = S::fma(wm[0], S::set1(act.sum), sum);
        } else {
            sum = S::fma(wm[0], S::set1(act.sum16[0]), sum);
            sum = S::fma(wm[1], S::set1(act.sum16[1]), sum);
        }
    }
    return sum;
}

// What one token's k block adds to the accumulator.
template <class S, class Q>
NYBBLE_INLINE typename S::F add_block(typename S::F acc, const typename S::B* codes, const typename S::F* ws,
                                      const typename S::F* wm, const ActBlock& act) {
    typename S::F sum = S::mul(block_dot<S, Q, 0>(codes, act), ws[0]);
    if constexpr (Q::subs == 2) sum = S::fma(block_dot<S, Q, 1>(codes, act), ws[1], sum);
    return S::fma(add_minima<S, Q>(sum, wm, act), S::set1(act.scale), acc);
}

template <class S, class Q, int T>
[[gnu::noinline]] void gemm_q8_tile(const uint8_t* w_group, const ActBlock* acts, ptrdiff_t act_stride, int k_blocks,
                                    float* out, ptrdiff_t ldo) {
    using F = typename S::F;
    constexpr int blocks_per_unit = Q::unit_k / kBlockInputs;
    constexpr int bytes_per_block = Q::unit_bytes / blocks_per_unit;
    for (int row0 = 0; row0 < kGroupRows; row0 += S::lanes) {
        F acc[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) acc[t] = S::zero();
        const uint8_t* unit = w_group;
        const ActBlock* act = acts;
        for (int done = 0; done < k_blocks; done += blocks_per_unit, unit += Q::unit_bytes) {
            for (int kb = 0; kb < blocks_per_unit; ++kb, act += act_stride) {
                if (row0 == 0) prefetch_weights<S, T, bytes_per_block>(unit + kb * bytes_per_block);
                typename S::B codes[packed::kNumCodes<Q>];
                F ws[2], wm[2];
                Q::template codes<S>(unit, kb, row0, codes);
                Q::template scales<S>(unit, kb, row0, ws, wm);
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                    // The tile's activations stream from the second-level cache: ask for the next block's.
                    if (T == kTokenTile) __builtin_prefetch(act + act_stride + t);
                    acc[t] = add_block<S, Q>(acc[t], codes, ws, wm, act[t]);
                }
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) S::store(out + t * ldo + row0, acc[t]);
    }
}

// The bytes of T flags, or'd together. Read in powers of two: three bytes would go through memory.
template <int T>
NYBBLE_INLINE uint64_t any_set(const uint8_t* flags) {
    constexpr int first = T >= 8 ? 8 : T >= 4 ? 4 : T >= 2 ? 2 : 1;
    uint64_t all = 0;
    std::memcpy(&all, flags, first);
    if constexpr (T > first) all |= any_set<T - first>(flags + first);
    return all;
}

// Adds what the fine blocks contribute. `acts` starts at the first of the T tokens, in a tile of `act_stride` tokens.
template <class S, class Q, int T>
[[gnu::noinline]] void gemm_q8_refine(const uint8_t* w_group, Acts acts, ptrdiff_t act_stride, int k_blocks, float* out,
                                      ptrdiff_t ldo) {
    using F = typename S::F;
    constexpr int blocks_per_unit = Q::unit_k / kBlockInputs;
    for (int row0 = 0; row0 < kGroupRows; row0 += S::lanes) {
        F acc[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) acc[t] = S::load(out + t * ldo + row0);
        const uint8_t* refined = acts.refined;
        for (int block = 0; block < k_blocks; ++block, refined += act_stride) {
            if (!any_set<T>(refined)) continue;
            const uint8_t* unit = w_group + (ptrdiff_t)(block / blocks_per_unit) * Q::unit_bytes;
            const ActBlock* fine = acts.fine + block * act_stride;
            typename S::B codes[packed::kNumCodes<Q>];
            F ws[2], wm[2];
            Q::template codes<S>(unit, block % blocks_per_unit, row0, codes);
            Q::template scales<S>(unit, block % blocks_per_unit, row0, ws, wm);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                if (refined[t]) acc[t] = add_block<S, Q>(acc[t], codes, ws, wm, fine[t]);
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) S::store(out + t * ldo + row0, acc[t]);
    }
}

// Adds what the fine blocks of some tiles contribute: a k block at a time, unpacked once for all of them. `acts` in
// tile layout.
template <class S, class Q>
[[gnu::noinline]] void gemm_q8_refine_tiles(const uint8_t* w_group, Acts acts, int tokens, int k_blocks, float* out,
                                            ptrdiff_t ldo) {
    constexpr int blocks_per_unit = Q::unit_k / kBlockInputs;
    typename S::B codes[packed::kNumCodes<Q>];
    typename S::F ws[2], wm[2];
    for (int row0 = 0; row0 < kGroupRows; row0 += S::lanes) {
        for (int block = 0; block < k_blocks; ++block) {
            bool unpacked = false;
            for (int tile0 = 0; tile0 < tokens; tile0 += kTokenTile) {
                const int in_tile = tokens - tile0 < kTokenTile ? tokens - tile0 : kTokenTile;
                const Acts at = acts.at((ptrdiff_t)tile0 * k_blocks + (ptrdiff_t)block * in_tile);
                uint64_t flags[kTokenTile / 8] = {};
                std::memcpy(flags, at.refined, (size_t)in_tile);
                if ((flags[0] | flags[1]) == 0) continue;
                if (!unpacked) {
                    const uint8_t* unit = w_group + (ptrdiff_t)(block / blocks_per_unit) * Q::unit_bytes;
                    Q::template codes<S>(unit, block % blocks_per_unit, row0, codes);
                    Q::template scales<S>(unit, block % blocks_per_unit, row0, ws, wm);
                    unpacked = true;
                }
                for (int half = 0; half < 2; ++half) {
                    for (uint64_t set = flags[half]; set != 0; set &= set - 1) {
                        const int t = 8 * half + __builtin_ctzll(set) / 8;
                        float* to = out + (tile0 + t) * ldo + row0;
                        S::store(to, add_block<S, Q>(S::load(to), codes, ws, wm, at.fine[t]));
                    }
                }
            }
        }
    }
}

template <class S, class Q, int T>
NYBBLE_INLINE void gemm_q8_tokens(const uint8_t* w_group, Acts acts, ptrdiff_t act_stride, int k_blocks, float* out,
                                  ptrdiff_t ldo) {
    gemm_q8_tile<S, Q, T>(w_group, acts.blocks, act_stride, k_blocks, out, ldo);
    gemm_q8_refine<S, Q, T>(w_group, acts, act_stride, k_blocks, out, ldo);
}

// The sizes into which tokens are cut: 16, then 8 and every smaller one, because a step of 3 or 7 tokens must not read
// the weights two or three times. With 16 registers a tile has 4 tokens at most, with two planes of codes 8.
template <class S, class Q>
inline constexpr int kLargestTile = S::max_tile < 16        ? 4
                                    : packed::kTwoPlanes<Q> ? 8
                                                            : 16;

// Tokens `t` to `in_tile` of one tile, in tiles of T tokens while they fit, then in smaller ones.
template <class S, class Q, int T>
NYBBLE_INLINE void gemm_q8_from(int t, int in_tile, const uint8_t* w_group, Acts tile, int k_blocks, float* out,
                                ptrdiff_t ldo) {
    for (; t + T <= in_tile; t += T) {
        gemm_q8_tokens<S, Q, T>(w_group, tile.at(t), in_tile, k_blocks, out + t * ldo, ldo);
    }
    if constexpr (T > 1) {
        gemm_q8_from<S, Q, (T > 8 ? 8 : T - 1)>(t, in_tile, w_group, tile, k_blocks, out, ldo);
    }
}

// out[t][0..15] for all tokens; acts in tile layout.
template <class S, class Q>
void gemm_q8(const uint8_t* w_group, Acts acts, int tokens, int k_blocks, float* out, int ldo) {
    for (int tile0 = 0; tile0 < tokens; tile0 += kTokenTile) {
        const int in_tile = tokens - tile0 < kTokenTile ? tokens - tile0 : kTokenTile;
        gemm_q8_from<S, Q, kLargestTile<S, Q>>(0, in_tile, w_group, acts.at((ptrdiff_t)tile0 * k_blocks), k_blocks,
                                               out + (ptrdiff_t)tile0 * ldo, ldo);
    }
}

}  // namespace nybble::ops
