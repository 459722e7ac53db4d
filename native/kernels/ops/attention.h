// Causal attention over the paged KV cache for one tile of query rows. Positions are walked in fixed chunks of 256
// tokens from position 0 and merged in ascending order, so each row's result depends only on its own position: not on
// the rows beside it, nor on how a prefill was cut.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/ops/attention_int8.h"
#include "kernels/ops/attention_parts.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

// The running state of all rows of the call, in the caller's scratch.
struct AttentionState {
    float* queries;       // [row tile][head_dim][rows of the tile], so that a tile's rows are read at fixed offsets;
                          // with int8 [row tile][head_dim / 2][rows of the tile] pairs of codes instead
    float* query_scales;  // [padded row], of the codes
    float* sums;          // [row][head_dim], weighted sum of V
    float* maxima;        // [row]
    float* totals;        // [row], sum of the weights
    float* scores;        // [kAttentionRowTile][kAttentionChunk]
    float* chunk_sums;    // [kAttentionRowTile][head_dim]
};

NYBBLE_INLINE AttentionState carve_scratch(float* scratch, int rows, int head_dim) {
    AttentionState state;
    state.queries = scratch;
    state.sums = state.queries + (ptrdiff_t)attention_padded_rows(rows) * head_dim;
    state.scores = state.sums + (ptrdiff_t)rows * head_dim;
    state.chunk_sums = state.scores + kAttentionRowTile * kAttentionChunk;
    state.maxima = state.chunk_sums + kAttentionRowTile * (ptrdiff_t)head_dim;
    state.totals = state.maxima + rows;
    state.query_scales = state.totals + rows;
    return state;
}

NYBBLE_INLINE RowRange visible(const AttentionArgs& args, int row) {
    const int position = args.first_position + row / args.heads;
    const int begin = args.window > 0 && position + 1 > args.window ? position + 1 - args.window : 0;
    return {begin, position + 1};
}

// Adds chunk [chunk, chunk + 256) to rows row0 .. row0 + R - 1.
template <class S, class KV, int R>
[[gnu::noinline]] void attend_chunk(const AttentionArgs& args, const AttentionState& state, int row0, int chunk) {
    const int dim = args.head_dim, rows = args.tokens * args.heads;
    RowRange ranges[R];
    int begin = kAttentionChunk, end = 0;  // what any row of the tile sees, relative to the chunk
    for (int r = 0; r < R; ++r) {
        RowRange range = visible(args, row0 + r);
        range.begin = range.begin > chunk ? range.begin - chunk : 0;
        range.end = range.end - chunk < kAttentionChunk ? range.end - chunk : kAttentionChunk;
        if (range.begin >= range.end || row0 + r >= rows) range = {0, 0};  // out of sight, or padding
        ranges[r] = range;
        if (range.begin == range.end) continue;
        if (range.begin < begin) begin = range.begin;
        if (range.end > end) end = range.end;
    }
    if (begin >= end) return;
    const int first_block = begin / kKvBlockTokens;
    const int last_block = (end + kKvBlockTokens - 1) / kKvBlockTokens;
    const int32_t* blocks = args.block_table + chunk / kKvBlockTokens;

    // The first rows bring the KV in for all.
    const int blocks_left =
        row0 > 0 ? 0 : (args.first_position + args.tokens + kKvBlockTokens - 1 - chunk) / kKvBlockTokens;
    const float* queries = state.queries + (ptrdiff_t)row0 * dim;
    for_blocks<S, R>(blocks, first_block, last_block, blocks_left,
                     [&]<int n>(int block, const int32_t* ahead) NYBBLE_LAMBDA {
                         float* scores = state.scores + block * kKvBlockTokens;
                         if constexpr (KV::scaled) {
                             score_some_blocks_int8<S, R, n>(args, reinterpret_cast<const int32_t*>(queries),
                                                             state.query_scales + row0, blocks + block, ahead, scores);
                         } else {
                             score_some_blocks<S, KV, R, n>(args, queries, blocks + block, ahead, scores);
                         }
                     });
    float chunk_max[R], chunk_total[R];
    for (int r = 0; r < R; ++r) {
        if (ranges[r].begin == ranges[r].end) continue;  // what its scores become is never used
        softmax_row<S>(state.scores + r * kAttentionChunk, first_block * kKvBlockTokens, last_block * kKvBlockTokens,
                       ranges[r], args.softcap, &chunk_max[r], &chunk_total[r]);
    }
    if constexpr (KV::scaled) {
        float value_scales[kAttentionChunk], scales[R];
        int16_t codes[R * kAttentionChunk];
        load_value_scales<S>(args, blocks, begin, end, value_scales);
        for (int r = 0; r < R; ++r) {
            scales[r] =
                quantize_weights<S>(state.scores + r * kAttentionChunk, value_scales, first_block * kKvBlockTokens,
                                    last_block * kKvBlockTokens, codes + r * kAttentionChunk);
        }
        for_columns<S, R>(dim, [&]<int n>(int column) NYBBLE_LAMBDA {
            weigh_columns_int8<S, R, n>(args, blocks, begin, end, codes, scales, column, state.chunk_sums);
        });
    } else {
        for_columns<S, R>(dim, [&]<int n>(int column) NYBBLE_LAMBDA {
            weigh_columns<S, KV, R, n>(args, blocks, begin, end, state.scores, column, state.chunk_sums);
        });
    }
    for (int r = 0; r < R; ++r) {
        if (ranges[r].begin == ranges[r].end) continue;  // this row saw nothing here: its state must not move
        const int row = row0 + r;
        merge_row<S>(state.chunk_sums + (ptrdiff_t)r * dim, chunk_max[r], chunk_total[r],
                     state.sums + (ptrdiff_t)row * dim, &state.maxima[row], &state.totals[row], dim);
    }
}

// Calls f.template operator()<R>(row0) over the rows in tiles of 8; the rest goes into the smallest tile of 1, 2, 4 or
// 8 that holds it, whose last rows may be padding.
template <class Function>
NYBBLE_INLINE void for_row_tiles(int rows, Function f) {
    int row = 0;
    for (; row + 4 < rows; row += 8) f.template operator()<8>(row);
    const int rest = rows - row;
    if (rest > 2) {
        f.template operator()<4>(row);
    } else if (rest == 2) {
        f.template operator()<2>(row);
    } else if (rest == 1) {
        f.template operator()<1>(row);
    }
}

// The queries of a tile, side by side; those of padding are 0.
template <class S, class KV, int R>
NYBBLE_INLINE void pack_queries(const AttentionArgs& args, const AttentionState& state, int row0) {
    const int dim = args.head_dim;
    float* packed = state.queries + (ptrdiff_t)row0 * dim;
    for (int i = 0; i < dim * R; ++i) packed[i] = 0.0f;
    for (int r = 0; r < R; ++r) {
        const int row = row0 + r;
        if constexpr (KV::scaled) state.query_scales[row] = 0.0f;
        if (row >= args.tokens * args.heads) continue;
        const float* q = args.q + row / args.heads * args.q_stride + (ptrdiff_t)(row % args.heads) * dim;
        if constexpr (KV::scaled) {
            state.query_scales[row] = quantize_query<S>(q, dim, reinterpret_cast<int32_t*>(packed) + r, R);
        } else {
            for (int d = 0; d < dim; ++d) packed[d * R + r] = q[d];
        }
    }
}

template <class S, class KV>
[[gnu::noinline]] void attention_typed(const AttentionArgs& args) {
    const int rows = args.tokens * args.heads, dim = args.head_dim;
    const AttentionState state = carve_scratch(args.scratch, rows, dim);
    for_row_tiles(rows, [&]<int R>(int row0) NYBBLE_LAMBDA { pack_queries<S, KV, R>(args, state, row0); });
    for (int row = 0; row < rows; ++row) {
        state.maxima[row] = -__builtin_inff();
        state.totals[row] = 0.0f;
    }
    for (ptrdiff_t i = 0; i < (ptrdiff_t)rows * dim; ++i) state.sums[i] = 0.0f;

    const int end = visible(args, rows - 1).end;
    const int first_chunk = visible(args, 0).begin / kAttentionChunk * kAttentionChunk;
    for (int chunk = first_chunk; chunk < end; chunk += kAttentionChunk) {
        for_row_tiles(rows, [&]<int R>(int row0) NYBBLE_LAMBDA { attend_chunk<S, KV, R>(args, state, row0, chunk); });
    }
    for (int row = 0; row < rows; ++row) {
        const int token = row / args.heads, head = row % args.heads;
        float* out = args.out + token * args.out_stride + (ptrdiff_t)head * dim;
        const typename S::F inverse = S::set1(1.0f / state.totals[row]);
        const float* sums = state.sums + (ptrdiff_t)row * dim;
        for (int d = 0; d < dim; d += S::lanes) S::store(out + d, S::mul(S::load(sums + d), inverse));
    }
}

template <class S>
void attention(const AttentionArgs& args) {
    if (args.kv_type == KvType::int8) {
        attention_typed<S, KvInt8>(args);
    } else if (args.kv_type == KvType::f32) {
        attention_typed<S, KvF32>(args);
    } else {
        attention_typed<S, KvF16>(args);
    }
}

}  // namespace nybble::ops
