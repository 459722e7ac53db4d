// The inner steps of attention: scores, softmax weights, weighted values, and the merge of a chunk.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/ops/kv_store.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

struct RowRange {
    int begin, end;
};

// scores[r][token in chunk] for whole blocks [first_block, last_block) of the chunk. Each score is one chain of sums
// over the head dimension in ascending order; `blocks_at_once` only gives the machine enough independent chains.
// Meanwhile the K and V of the blocks `ahead` are fetched: a step of d covers its share of them.
template <class S, class KV, int R, int blocks_at_once>
NYBBLE_INLINE void score_some_blocks(const AttentionArgs& args, const float* queries, const int32_t* blocks,
                                     const int32_t* ahead, float* scores) {
    using F = typename S::F;
    using Element = typename KV::Element;
    constexpr int bytes_per_step = 2 * kKvBlockTokens * (int)sizeof(Element);
    const Element* keys[blocks_at_once];
    const uint8_t* next[blocks_at_once];
    for (int b = 0; b < blocks_at_once; ++b) {
        keys[b] = reinterpret_cast<const Element*>(args.kv + blocks[b] * args.kv_block_stride);
        next[b] = args.kv + ahead[b] * args.kv_block_stride;
    }
    for (int part = 0; part < kKvBlockTokens; part += S::lanes) {
        F acc[R][blocks_at_once];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int b = 0; b < blocks_at_once; ++b) acc[r][b] = S::zero();
        }
        for (int d = 0; d < args.head_dim; ++d) {
#pragma GCC unroll 8
            for (int b = 0; b < blocks_at_once; ++b) {
                if (part == 0) {
                    __builtin_prefetch(next[b] + d * bytes_per_step);
                    if (bytes_per_step > 64) __builtin_prefetch(next[b] + d * bytes_per_step + 64);
                }
                F key = KV::template load<S>(keys[b] + d * kKvBlockTokens + part);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][b] = S::fma(key, S::set1(queries[d * R + r]), acc[r][b]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int b = 0; b < blocks_at_once; ++b) {
                S::store(scores + r * kAttentionChunk + b * kKvBlockTokens + part, acc[r][b]);
            }
        }
    }
}

// Calls score.template operator()<n>(block, ahead) for n blocks at a time, of [first_block, last_block). `blocks` has
// blocks_left entries that may be fetched ahead; 0 turns that off.
template <class S, int R, class Score>
NYBBLE_INLINE void for_blocks(const int32_t* blocks, int first_block, int last_block, int blocks_left, Score score) {
    constexpr int at_once = S::max_tile >= 16 ? (R >= 8 ? 2 : 4) : (R >= 8 ? 1 : R >= 4 ? 2 : 4);
    // What to fetch while `count` blocks are worked on: the blocks after them, or nothing new at the table's end.
    auto ahead = [&](int block, int count)
                     NYBBLE_LAMBDA { return blocks + (block + 2 * count <= blocks_left ? block + count : block); };
    int block = first_block;
    for (; block + at_once <= last_block; block += at_once) {
        score.template operator()<at_once>(block, ahead(block, at_once));
    }
    for (; block < last_block; ++block) score.template operator()<1>(block, ahead(block, 1));
}

// Turns scores [begin, end) (whole blocks) into weights exp(score - max over the visible range). What is outside the
// range (never empty) gets weight 0, which adds nothing to any sum: so extra masked blocks cannot change a result.
template <class S>
[[gnu::noinline]] void softmax_row(float* scores, int begin, int end, RowRange range, float softcap, float* max_out,
                                   float* total_out) {
    using F = typename S::F;
    if (softcap > 0.0f) {
        const F cap = S::set1(softcap), inverse = S::set1(1.0f / softcap);
        for (int i = begin; i < end; i += S::lanes) {
            F capped = S::mul(cap, simd_tanh<S>(S::mul(S::load(scores + i), inverse)));
            S::store(scores + i, capped);
        }
    }
    for (int i = begin; i < range.begin; ++i) scores[i] = -__builtin_inff();
    for (int i = range.end; i < end; ++i) scores[i] = -__builtin_inff();
    F largest = S::set1(-__builtin_inff());
    for (int i = begin; i < end; i += S::lanes) largest = S::max(S::load(scores + i), largest);
    const float max = S::reduce_max(largest);
    *max_out = max;
    const F maxima = S::set1(max);
    F total = S::zero();
    for (int i = begin; i < end; i += S::lanes) {
        F weight = S::exp(S::sub(S::load(scores + i), maxima));
        S::store(scores + i, weight);
        total = S::add(total, weight);
    }
    *total_out = S::reduce_add(total);
}

// sums[r][column ...] = sum over tokens [begin, end) of weight * V, in ascending order.
template <class S, class KV, int R, int vectors>
NYBBLE_INLINE void weigh_columns(const AttentionArgs& args, const int32_t* blocks, int begin, int end,
                                 const float* weights, int column, float* sums) {
    using F = typename S::F;
    using Element = typename KV::Element;
    const int dim = args.head_dim;
    F acc[R][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] = S::zero();
    }
    for (int token = begin; token < end;) {
        const Element* keys =
            reinterpret_cast<const Element*>(args.kv + blocks[token / kKvBlockTokens] * args.kv_block_stride);
        const Element* value =
            keys + (ptrdiff_t)dim * kKvBlockTokens + (ptrdiff_t)(token % kKvBlockTokens) * dim + column;
        int stop = (token / kKvBlockTokens + 1) * kKvBlockTokens;
        if (stop > end) stop = end;
        for (; token < stop; ++token, value += dim) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                F x = KV::template load<S>(value + v * S::lanes);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    acc[r][v] = S::fma(x, S::set1(weights[r * kAttentionChunk + token]), acc[r][v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) S::store(sums + (ptrdiff_t)r * dim + column + v * S::lanes, acc[r][v]);
    }
}

// Calls weigh.template operator()<n>(column) for n vectors of columns at a time, until head_dim is covered.
template <class S, int R, class Weigh>
NYBBLE_INLINE void for_columns(int head_dim, Weigh weigh) {
    constexpr int vectors = S::max_tile >= 16 ? (R >= 8 ? 2 : R >= 4 ? 4 : 8) : (R >= 8 ? 1 : R >= 4 ? 2 : 4);
    int column = 0;
    for (; column + vectors * S::lanes <= head_dim; column += vectors * S::lanes) {
        weigh.template operator()<vectors>(column);
    }
    for (; column < head_dim; column += S::lanes) weigh.template operator()<1>(column);
}

// Joins a chunk's maximum, total and weighted values to the row's running ones.
template <class S>
[[gnu::noinline]] void merge_row(const float* chunk_sums, float chunk_max, float chunk_total, float* sums,
                                 float* running_max, float* running_total, int head_dim) {
    using F = typename S::F;
    const float max = *running_max > chunk_max ? *running_max : chunk_max;
    const F keep = S::exp(S::set1(*running_max - max));
    const F join = S::exp(S::set1(chunk_max - max));
    for (int d = 0; d < head_dim; d += S::lanes) {
        F joined = S::mul(S::load(chunk_sums + d), join);
        S::store(sums + d, S::fma(S::load(sums + d), keep, joined));
    }
    float scale[2 * S::lanes];
    S::store(scale, keep);
    S::store(scale + S::lanes, join);
    *running_total = *running_total * scale[0] + chunk_total * scale[S::lanes];
    *running_max = max;
}

}  // namespace nybble::ops
