#include "bindings/check_step.h"

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/convert.h"

namespace nybble {
namespace {

std::string text(std::int64_t value) { return std::to_string(value); }

void check_lengths(const Step& step) {
    require(step.cu_seqlens.size() == step.context_lens.size() + 1,
            "cu_seqlens_q must have one entry more than context_lens");
    require(step.sequences() >= 1, "a step needs at least one sequence");
    require(step.cu_seqlens.front() == 0 && step.cu_seqlens.back() == step.tokens(),
            "cu_seqlens_q must go from 0 to the number of tokens, " + text(step.tokens()));
    const std::int64_t room = step.max_blocks * kKvBlockTokens;
    for (std::size_t s = 0; s < step.context_lens.size(); ++s) {
        const std::string where = "sequence " + text(static_cast<std::int64_t>(s));
        const std::int64_t length = static_cast<std::int64_t>(step.cu_seqlens[s + 1]) - step.cu_seqlens[s];
        require(length >= 0, "cu_seqlens_q must not descend");
        require(step.context_lens[s] >= 0, "context_lens must not be negative");
        require(step.context_lens[s] + length <= room,
                where + " has " + text(step.context_lens[s] + length) + " tokens, its block table holds " + text(room));
    }
}

// Blocks of a common prefix may be shared as long as nobody writes into them.
void check_blocks(const KvCache& cache, const Step& step) {
    constexpr int kNobody = -1;
    std::vector<int> writer(static_cast<std::size_t>(cache.num_blocks()), kNobody);
    const auto used = [&](int s) {
        const auto index = static_cast<std::size_t>(s);
        const int length = step.cu_seqlens[index + 1] - step.cu_seqlens[index];
        return length == 0 ? 0 : (step.context_lens[index] + length + kKvBlockTokens - 1) / kKvBlockTokens;
    };
    for (int s = 0; s < step.sequences(); ++s) {
        const int first_written = step.context_lens[static_cast<std::size_t>(s)] / kKvBlockTokens;
        for (int i = 0; i < used(s); ++i) {
            const int block = step.block_table(s)[i];
            if (block < 0 || block >= cache.num_blocks()) {
                fail("block_tables[" + text(s) + ", " + text(i) + "] is " + text(block) + ", the cache has " +
                     text(cache.num_blocks()) + " blocks");
            }
            if (i < first_written) continue;
            int& owner = writer[static_cast<std::size_t>(block)];
            if (owner != kNobody) fail("block " + text(block) + " is written twice in this step");
            owner = s;
        }
    }
    for (int s = 0; s < step.sequences(); ++s) {
        const int first_written = step.context_lens[static_cast<std::size_t>(s)] / kKvBlockTokens;
        for (int i = 0; i < std::min(first_written, used(s)); ++i) {
            const int block = step.block_table(s)[i];
            if (writer[static_cast<std::size_t>(block)] != kNobody) {
                fail("block " + text(block) + " is written in this step while sequence " + text(s) + " reads it");
            }
        }
    }
}

}  // namespace

void check_ids(std::span<const std::int32_t> values, int limit, const char* what) {
    const auto is_good = [&](std::int32_t value) { return value >= 0 && value < limit; };
    if (std::all_of(values.begin(), values.end(), is_good)) return;
    const auto bad = std::find_if_not(values.begin(), values.end(), is_good);
    fail(std::string(what) + "[" + text(bad - values.begin()) + "] is " + text(*bad) + ", which is not between 0 and " +
         text(limit - 1));
}

void check_step(const Model& model, const KvCache& cache, const Step& step) {
    require(step.tokens() >= 1, "a step needs at least one token");
    check_ids(step.token_ids, model.config().vocab_size, "token_ids");
    check_lengths(step);
    check_blocks(cache, step);
    check_ids(step.logit_rows, step.tokens(), "logit_rows");
    check_ids(step.hidden_rows, step.tokens(), "hidden_rows");
    require(step.adapter_of.empty() || step.adapter_of.size() == step.context_lens.size(),
            "adapter_of must have one entry for each sequence");
    for (const std::int32_t index : step.adapter_of) {
        if (index < -1 || index >= static_cast<std::int64_t>(step.adapters.size())) {
            fail("adapter_of names adapter " + text(index) + " of " +
                 text(static_cast<std::int64_t>(step.adapters.size())));
        }
    }
}

}  // namespace nybble
