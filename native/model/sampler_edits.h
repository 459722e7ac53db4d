// What a request does to its logits before anything is drawn: masks, bias and penalties.
#pragma once

#include <cstdint>
#include <span>

#include "base/memory.h"
#include "dispatch/kernels.h"

namespace nybble {

// In this order. Ids may come twice.
struct LogitEdits {
    std::span<const std::uint32_t> allowed;  // bit id % 32 of word id / 32; empty: every token is allowed
    std::span<const std::int32_t> banned;
    std::span<const std::int32_t> bias_ids;
    std::span<const float> bias;
    // The formulas of vLLM. repetition: a logit above 0 is divided, another multiplied, if its token is in the prompt
    // or the output. Then frequency times how often the token is in the output, and presence if it is, are subtracted.
    float repetition = 1.0f;
    float presence = 0.0f;
    float frequency = 0.0f;
    std::span<const std::int32_t> prompt_ids;
    std::span<const std::int32_t> output_ids;

    bool penalises() const { return repetition != 1.0f || presence != 0.0f || frequency != 0.0f; }
    bool any() const { return !allowed.empty() || !banned.empty() || !bias_ids.empty() || penalises(); }
};

// What penalties remember while they look at one row. All zero, before and after.
struct PenaltyScratch {
    Buffer<std::uint64_t> seen;   // one bit for each token: small enough for the first-level cache
    Buffer<std::int32_t> counts;  // [vocab]

    void reserve(int vocab);
};

// Writes the edited row to `out`.
void apply(const LogitEdits& edits, const Kernels& kernels, const float* logits, int vocab, PenaltyScratch& scratch,
           float* out);

}  // namespace nybble
