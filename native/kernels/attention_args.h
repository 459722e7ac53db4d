// Arguments of the attention and store_kv kernels, and the layout of one KV block. See docs/interfaces.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

inline constexpr int kKvBlockTokens = 16;
inline constexpr int kAttentionChunk = 256;     // tokens between two merges of the running softmax
inline constexpr int kAttentionRowTile = 8;     // most query rows that share one K or V load
inline constexpr int kAttentionMaxTokens = 16;  // query tokens per call

// How keys and values are kept: in floats of 16 or 32 bits, or in 8 bits with a scale per token and head.
enum class KvType { f16, f32, int8 };

// Bytes of one (block, kv head): K [head_dim][16 tokens], then V [16 tokens][head_dim]. With int8, two numbers that are
// multiplied in one go lie side by side, K [head_dim / 2][16 tokens][2], V [8 pairs of tokens][head_dim][2], and behind
// them the scales, f16, of the 16 keys and of the 16 values.
constexpr size_t kv_head_bytes(int head_dim, KvType type) {
    const size_t numbers = (size_t)2 * (size_t)head_dim * kKvBlockTokens;
    if (type == KvType::int8) return numbers + (size_t)2 * kKvBlockTokens * 2;
    return numbers * (type == KvType::f32 ? 4 : 2);
}

// One (sequence, kv head, tile of query tokens). The query heads of the kv head lie side by side, head_dim apart.
struct AttentionArgs {
    const float* q;      // first token, first query head of the kv head; already scaled by sm_scale
    ptrdiff_t q_stride;  // floats from one query token to the next
    float* out;
    ptrdiff_t out_stride;
    const uint8_t* kv;          // this layer's block 0, at this kv head
    ptrdiff_t kv_block_stride;  // bytes from one block to the next
    const int32_t* block_table;
    int tokens;          // query tokens in the tile, at most kAttentionMaxTokens
    int heads;           // query heads per kv head
    int head_dim;        // a multiple of 16
    int first_position;  // of the first query token; its own K and V are already stored
    int window;          // how many tokens a query sees, itself included; 0 = all
    float softcap;       // scores become softcap * tanh(score / softcap); 0 = off
    KvType kv_type;
    float* scratch;  // attention_scratch_floats(tokens * heads, head_dim)
};

constexpr int attention_padded_rows(int rows) {
    return (rows + kAttentionRowTile - 1) / kAttentionRowTile * kAttentionRowTile;
}

constexpr size_t attention_scratch_floats(int rows, int head_dim) {
    return (size_t)(attention_padded_rows(rows) + rows) * (size_t)head_dim +
           (size_t)(attention_padded_rows(rows) + rows * 2) +
           (size_t)kAttentionRowTile * (kAttentionChunk + (size_t)head_dim);
}

}  // namespace nybble
