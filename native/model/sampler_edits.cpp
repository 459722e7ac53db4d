#include "model/sampler_edits.h"

#include <bit>
#include <cstring>
#include <limits>

namespace nybble {
namespace {

std::size_t at(std::int32_t id) { return static_cast<std::size_t>(id); }

// Goes through the tokens in ascending order, each once, however often they come and wherever.
void penalise_repetition(const LogitEdits& edits, Buffer<std::uint64_t>& seen, float* x) {
    for (const std::span<const std::int32_t> ids : {edits.prompt_ids, edits.output_ids}) {
        for (const std::int32_t id : ids) seen[at(id) / 64] |= std::uint64_t{1} << (at(id) % 64);
    }
    const float penalty = edits.repetition;
    for (std::size_t word = 0; word < seen.size(); ++word) {
        for (std::uint64_t bits = seen[word]; bits != 0; bits &= bits - 1) {
            float& logit = x[word * 64 + static_cast<std::size_t>(std::countr_zero(bits))];
            const float divided = logit / penalty;  // both, because the sign is hard to predict
            const float multiplied = logit * penalty;
            logit = logit > 0.0f ? divided : multiplied;
        }
        seen[word] = 0;
    }
}

void penalise_output(const LogitEdits& edits, Buffer<std::int32_t>& counts, float* x) {
    for (const std::int32_t id : edits.output_ids) ++counts[at(id)];
    for (const std::int32_t id : edits.output_ids) {
        const std::int32_t count = counts[at(id)];
        if (count == 0) continue;
        x[at(id)] -= edits.frequency * static_cast<float>(count);
        x[at(id)] -= edits.presence;
        counts[at(id)] = 0;
    }
}

}  // namespace

void PenaltyScratch::reserve(int vocab) {
    seen = Buffer<std::uint64_t>((at(vocab) + 63) / 64);
    counts = Buffer<std::int32_t>(at(vocab));
}

void apply(const LogitEdits& edits, const Kernels& kernels, const float* logits, int vocab, PenaltyScratch& scratch,
           float* out) {
    if (edits.allowed.empty()) {
        std::memcpy(out, logits, at(vocab) * sizeof(float));
    } else {
        kernels.mask_logits(logits, edits.allowed.data(), vocab, out);
    }
    for (const std::int32_t id : edits.banned) out[at(id)] = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < edits.bias_ids.size(); ++i) out[at(edits.bias_ids[i])] += edits.bias[i];
    if (edits.repetition != 1.0f) penalise_repetition(edits, scratch.seen, out);
    if (edits.frequency != 0.0f || edits.presence != 0.0f) penalise_output(edits, scratch.counts, out);
}

}  // namespace nybble
