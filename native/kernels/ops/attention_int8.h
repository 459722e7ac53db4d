// The inner steps of attention over keys and values in 8 bits, in integers: products of 16 bits, two at a time, summed
// exactly in 32. Queries get codes of 14 bits with a scale of their own, weights codes of 15 bits with a scale for each
// row and chunk, so that both are far finer than the codes they meet and depend on their own row alone.
#pragma once

#include <cstring>

#include "kernels/attention_args.h"
#include "kernels/ops/attention_parts.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

inline constexpr float kQueryCodes = 16383.0f;   // times 127 times 1024 inputs of a head: below 2^31
inline constexpr float kWeightCodes = 32767.0f;  // times 127 times 256 tokens of a chunk

// Codes of one query, as pairs `stride` apart; returns their scale, NaN if the query holds anything that is not finite.
template <class S>
float quantize_query(const float* q, int dim, int32_t* pairs, int stride) {
    using F = typename S::F;
    F largest = S::zero(), probe = S::zero();
    for (int d = 0; d < dim; d += S::lanes) {
        const F x = S::load(q + d);
        largest = S::max(S::abs(x), largest);
        probe = S::fma(x, S::zero(), probe);
    }
    const float most = S::reduce_max(largest);
    const F inverse = S::set1(most > 0.0f ? kQueryCodes / most : 0.0f);
    for (int d = 0; d < dim; d += S::lanes) {
        int16_t codes[S::lanes];
        S::store_i16(codes, S::cvt_round(S::mul(S::load(q + d), inverse)));
        for (int i = 0; i < S::lanes; i += 2) std::memcpy(pairs + (d + i) / 2 * stride, codes + i, 4);
    }
    return most / kQueryCodes + S::reduce_add(probe);
}

// As score_some_blocks of attention_parts.h.
template <class S, int R, int blocks_at_once>
NYBBLE_INLINE void score_some_blocks_int8(const AttentionArgs& args, const int32_t* queries, const float* query_scales,
                                          const int32_t* blocks, const int32_t* ahead, float* scores) {
    using F = typename S::F;
    using I = typename S::I;
    const int8_t* keys[blocks_at_once];
    const uint8_t* next[blocks_at_once];
    for (int b = 0; b < blocks_at_once; ++b) {
        keys[b] = reinterpret_cast<const int8_t*>(args.kv + blocks[b] * args.kv_block_stride);
        next[b] = args.kv + ahead[b] * args.kv_block_stride;
    }
    for (int part = 0; part < kKvBlockTokens; part += S::lanes) {
        I acc[R][blocks_at_once];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int b = 0; b < blocks_at_once; ++b) acc[r][b] = S::iset1(0);
        }
        for (int pair = 0; pair < args.head_dim / 2; ++pair) {
#pragma GCC unroll 8
            for (int b = 0; b < blocks_at_once; ++b) {
                if (part == 0) __builtin_prefetch(next[b] + pair * 4 * kKvBlockTokens);  // a share of K and V
                const I key = S::load_i8_pairs(keys[b] + 2 * (pair * kKvBlockTokens + part));
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r][b] = S::dot2(acc[r][b], key, S::iset1(queries[pair * R + r]));
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < blocks_at_once; ++b) {
            const F scale = S::load_f16(KvInt8::key_scales(keys[b], args.head_dim) + part);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const F score = S::mul(S::mul(S::cvt(acc[r][b]), scale), S::set1(query_scales[r]));
                S::store(scores + r * kAttentionChunk + b * kKvBlockTokens + part, score);
            }
        }
    }
}

// The scales of the values of a chunk's tokens [begin, end), 0 in the rest of their blocks, whose cells may hold
// anything.
template <class S>
NYBBLE_INLINE void load_value_scales(const AttentionArgs& args, const int32_t* blocks, int begin, int end, float* out) {
    const int first = begin / kKvBlockTokens, last = (end + kKvBlockTokens - 1) / kKvBlockTokens;
    for (int block = first; block < last; ++block) {
        const uint16_t* scales = KvInt8::value_scales(args.kv + blocks[block] * args.kv_block_stride, args.head_dim);
        for (int part = 0; part < kKvBlockTokens; part += S::lanes) {
            S::store(out + block * kKvBlockTokens + part, S::load_f16(scales + part));
        }
    }
    for (int i = first * kKvBlockTokens; i < begin; ++i) out[i] = 0.0f;
    for (int i = end; i < last * kKvBlockTokens; ++i) out[i] = 0.0f;
}

// Codes of one row's weights times the scales of their values, for the tokens [begin, end) of whole blocks; returns the
// scale of the codes, NaN if a weight or a scale is NaN.
template <class S>
NYBBLE_INLINE float quantize_weights(float* weights, const float* value_scales, int begin, int end, int16_t* codes) {
    using F = typename S::F;
    F largest = S::zero(), probe = S::zero();
    for (int i = begin; i < end; i += S::lanes) {
        const F weight = S::mul(S::load(weights + i), S::load(value_scales + i));
        S::store(weights + i, weight);
        largest = S::max(weight, largest);
        probe = S::fma(weight, S::zero(), probe);
    }
    const float most = S::reduce_max(largest);
    const F inverse = S::set1(most > 0.0f ? kWeightCodes / most : 0.0f);
    for (int i = begin; i < end; i += S::lanes) {
        S::store_i16(codes + i, S::cvt_round(S::mul(S::load(weights + i), inverse)));
    }
    return most / kWeightCodes + S::reduce_add(probe);
}

template <class S, int R, int vectors>
NYBBLE_INLINE void weigh_columns_int8(const AttentionArgs& args, const int32_t* blocks, int begin, int end,
                                      const int16_t* codes, const float* scales, int column, float* sums) {
    using I = typename S::I;
    const int dim = args.head_dim;
    I acc[R][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] = S::iset1(0);
    }
    for (int token = begin / 2 * 2; token < end;) {  // the other one of a pair has a code of 0
        const auto* keys =
            reinterpret_cast<const int8_t*>(args.kv + blocks[token / kKvBlockTokens] * args.kv_block_stride);
        const int8_t* values = keys + (ptrdiff_t)(kKvBlockTokens + token % kKvBlockTokens) * dim + 2 * column;
        int stop = (token / kKvBlockTokens + 1) * kKvBlockTokens;
        if (stop > end) stop = end;
        for (; token < stop; token += 2, values += 2 * dim) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                const I x = S::load_i8_pairs(values + 2 * v * S::lanes);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    int32_t pair;
                    std::memcpy(&pair, codes + r * kAttentionChunk + token, 4);
                    acc[r][v] = S::dot2(acc[r][v], x, S::iset1(pair));
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const typename S::F scale = S::set1(scales[r]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            S::store(sums + (ptrdiff_t)r * dim + column + v * S::lanes, S::mul(S::cvt(acc[r][v]), scale));
        }
    }
}

}  // namespace nybble::ops
