// Causal attention over the paged KV cache for one tile of query rows. Positions are walked in fixed chunks of 256
// tokens from position 0 and merged in ascending order, so each row's result depends only on its own position: not on
// the rows beside it, nor on how a prefill was cut.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/ops/attention_parts.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

// The running state of all rows of the call, in the caller's scratch.
struct AttentionState {
    float* queries;     // [row tile][head_dim][rows of the tile], so that a tile's rows are read at fixed offsets
    float* sums;        // [row][head_dim], weighted sum of V
    float* maxima;      // [row]
    float* totals;      // [row], sum of the weights
    float* scores;      // [kAttentionRowTile][kAttentionChunk]
    float* chunk_sums;  // [kAttentionRowTile][head_dim]
};

NYBBLE_INLINE AttentionState carve_scratch(float* scratch, int rows, int head_dim) {
    AttentionState state;
    state.queries = scratch;
    state.sums = state.queries + (ptrdiff_t)attention_padded_rows(rows) * head_dim;
    state.scores = state.sums + (ptrdiff_t)rows * head_dim;
    state.chunk_sums = state.scores + kAttentionRowTile * kAttentionChunk;
    state.maxima = state.chunk_sums + kAttentionRowTile * (ptrdiff_t)head_dim;
    state.totals = state.maxima + rows;
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
    score_blocks<S, KV, R>(args, state.queries + (ptrdiff_t)row0 * dim, blocks, first_block, last_block, blocks_left,
                           state.scores);
    float chunk_max[R], chunk_total[R];
    for (int r = 0; r < R; ++r) {
        if (ranges[r].begin == ranges[r].end) continue;  // what its scores become is never used
        softmax_row<S>(state.scores + r * kAttentionChunk, first_block * kKvBlockTokens, last_block * kKvBlockTokens,
                       ranges[r], args.softcap, &chunk_max[r], &chunk_total[r]);
    }
    if constexpr (KV::scaled) scale_weights<S, R>(args, blocks, first_block, last_block, state.scores);
    weigh_values<S, KV, R>(args, blocks, begin, end, state.scores, state.chunk_sums);
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

template <class S, class KV>
[[gnu::noinline]] void attention_typed(const AttentionArgs& args) {
    const int rows = args.tokens * args.heads, dim = args.head_dim;
    const AttentionState state = carve_scratch(args.scratch, rows, dim);
    for_row_tiles(rows, [&]<int R>(int row0) NYBBLE_LAMBDA {
        float* packed = state.queries + (ptrdiff_t)row0 * dim;
        for (int r = 0; r < R; ++r) {
            if (row0 + r >= rows) {
                for (int d = 0; d < dim; ++d) packed[d * R + r] = 0.0f;
                continue;
            }
            const int token = (row0 + r) / args.heads, head = (row0 + r) % args.heads;
            const float* q = args.q + token * args.q_stride + (ptrdiff_t)head * dim;
            for (int d = 0; d < dim; ++d) packed[d * R + r] = q[d];
        }
    });
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
