// One ragged step: pieces of many sequences, one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/attention_args.h"
#include "model/adapter.h"

namespace nybble {

// Checked by the bindings: ids and blocks in range, cu_seqlens ascending from 0 to the number of tokens.
struct Step {
    std::span<const std::int32_t> token_ids;
    std::span<const std::int32_t> cu_seqlens;    // num_seqs + 1
    std::span<const std::int32_t> context_lens;  // tokens of each sequence that are in the cache already
    const std::int32_t* block_tables = nullptr;  // [num_seqs][max_blocks]
    std::ptrdiff_t max_blocks = 0;
    std::span<const std::int32_t> logit_rows;   // for which tokens of the step logits are wanted
    std::span<const std::int32_t> hidden_rows;  // and for which the final-normed hidden states
    std::span<const Adapter* const> adapters;   // those that the step needs, none twice
    std::span<const std::int32_t> adapter_of;   // per sequence, -1: none; empty if no sequence has one

    int tokens() const { return static_cast<int>(token_ids.size()); }
    int sequences() const { return static_cast<int>(context_lens.size()); }
    const std::int32_t* block_table(int sequence) const { return block_tables + sequence * max_blocks; }
};

}  // namespace nybble
