// Draws one token from each row of logits, and scores tokens that are given.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "dispatch/kernels.h"
#include "model/sampler_edits.h"
#include "model/sampler_row.h"

namespace nybble {

// How one row is drawn. The order is that of vLLM and of llama.cpp's usual chain: edits change the logits; these are
// divided by the temperature; min_p drops tokens less likely than min_p times the likeliest; top_k keeps the k
// likeliest; top_p keeps the fewest of these whose share of the remaining probability reaches top_p; one is drawn.
// Of equally likely tokens the one with the lower id comes first.
struct SampleRow {
    float temperature = 1.0f;  // below 1e-5: greedy, the likeliest token
    int top_k = 0;             // 0: off
    float top_p = 1.0f;        // 1: off
    float min_p = 0.0f;        // 0: off
    std::uint64_t seed = 0;    // with `position` decides the draw, whatever else is in the batch
    std::uint64_t position = 0;
    int top_logprobs = -1;  // how many alternatives to report; -1: not even the drawn token's logprob
    LogitEdits edits;
};

struct TokenLogprob {
    std::int32_t id = 0;
    float logprob = 0.0f;
};

struct Sampled {
    bool ok = false;     // false: the row holds NaN or has no finite maximum, and the rest means nothing
    TokenLogprob token;  // log-probability under the raw logits: before edits, temperature and cuts; NaN if not asked
    int rank = 0;        // of the token under the raw logits, from 1; 0 if no logprob was asked for
    std::vector<TokenLogprob> top;  // the likeliest tokens in descending order
};

class Sampler {
public:
    // `kernels` and `pool` must outlive the sampler. One caller at a time.
    Sampler(const Kernels& kernels, ThreadPool& pool, int vocab);

    // Rows are shared out over the pool; each depends on nothing but itself. The ids in the edits must be in range.
    std::vector<Sampled> sample(const float* logits, std::span<const SampleRow> rows);

    // What a model that gives these logits thinks of targets[row]; `top` alternatives for each.
    std::vector<Sampled> score(const float* logits, std::span<const std::int32_t> targets, int top);

private:
    template <class Body>
    void for_each_row(std::size_t rows, Body&& body);
    void sample_row(const float* logits, const SampleRow& row, SampleScratch& scratch, Sampled& out) const;
    bool view(const float* logits, float* maxima, LogitRow& out) const;
    void report(const LogitRow& raw, SampleScratch& scratch, Sampled& out) const;

    const Kernels& kernels_;
    ThreadPool& pool_;
    int vocab_;
    std::vector<SampleScratch> scratch_;  // one per worker
};

// The token that a row's parameters choose, for temperatures above 0. Edits have been applied.
std::int32_t draw(const Kernels& kernels, const LogitRow& logits, const SampleRow& row, SampleScratch& scratch);

}  // namespace nybble
