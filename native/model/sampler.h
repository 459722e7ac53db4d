// Draws one token from each row of logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"

namespace nybble {

// How one row is drawn. The order is that of vLLM and of llama.cpp's usual chain: the logits are divided by the
// temperature; min_p drops tokens less likely than min_p times the likeliest; top_k keeps the k likeliest; top_p keeps
// the fewest of these whose share of the remaining probability reaches top_p; one of them is drawn.
// Of equally likely tokens the one with the lower id comes first.
struct SampleRow {
    float temperature = 1.0f;  // below 1e-5: greedy, the likeliest token
    int top_k = 0;             // 0: off
    float top_p = 1.0f;        // 1: off
    float min_p = 0.0f;        // 0: off
    std::uint64_t seed = 0;    // with `position` decides the draw, whatever else is in the batch
    std::uint64_t position = 0;
    int top_logprobs = -1;  // how many alternatives to report; -1: not even the drawn token's logprob
};

struct TokenLogprob {
    std::int32_t id = 0;
    float logprob = 0.0f;
};

struct Sampled {
    TokenLogprob token;  // log-probability under the raw logits: before temperature and cuts; NaN if not asked for
    std::vector<TokenLogprob> top;  // the likeliest tokens in descending order
};

class Sampler {
public:
    // Rows are shared out over the pool. Throws std::invalid_argument if a row has no finite maximum or holds NaN.
    std::vector<Sampled> sample(ThreadPool& pool, const float* logits, int vocab, std::span<const SampleRow> rows);

private:
    struct Candidate {
        float weight;  // exp((logit - max) / temperature), or the logit itself
        std::int32_t id;
    };
    struct Scratch {
        Buffer<float> weights;
        Buffer<Candidate> candidates;
    };

    static bool sample_row(const float* logits, int vocab, const SampleRow& row, Scratch& scratch, Sampled& out);
    static std::int32_t draw(const float* logits, int vocab, float max, const SampleRow& row, Scratch& scratch);
    static void fill_top(const float* logits, int vocab, double log_norm, Scratch& scratch, Sampled& out);
    static void select_largest(Candidate* candidates, std::int64_t count, std::int64_t keep);

    std::vector<Scratch> scratch_;  // one per worker
};

}  // namespace nybble
