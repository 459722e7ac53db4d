// One row of logits and what can be done with it.
#pragma once

#include <cstdint>

#include "base/memory.h"
#include "dispatch/kernels.h"
#include "kernels/sampling_sizes.h"
#include "model/sampler_edits.h"

namespace nybble {

// The logits and the maxima of their blocks, which tell where the large ones are.
struct LogitRow {
    const float* logits;
    int vocab;
    const float* maxima;
    float max;  // finite

    int blocks() const { return (vocab + kMaximaBlock - 1) / kMaximaBlock; }
};

struct Candidate {
    float logit;
    std::int32_t id;
};

// How a distribution is cut down.
struct Cuts {
    float floor;  // the lowest logit that stays
    std::int64_t top_k;
    float top_p;
};

// The memory of one worker.
struct SampleScratch {
    Buffer<float> edited;          // [vocab]
    Buffer<float> maxima;          // [blocks] of the row that is drawn from
    Buffer<float> raw_maxima;      // [blocks] of the row that is reported
    Buffer<float> order;           // [blocks]
    Buffer<float> sums;            // [chunks]
    Buffer<float> weights;         // [vocab], of candidates or of a chunk
    Buffer<Candidate> candidates;  // [vocab]
    PenaltyScratch penalties;

    void reserve(int vocab);
};

// The first of the likeliest tokens.
std::int32_t argmax(const LogitRow& row);

// The sum of exp((logit - max) * factor); the sums of chunks stay in `scratch`.
double exp_total(const Kernels& kernels, const LogitRow& row, float factor, SampleScratch& scratch);

// Makes candidates of all tokens whose logit is at least `floor`, by id; returns how many.
std::int64_t collect(const LogitRow& row, float floor, SampleScratch& scratch);

// Makes candidates of the `keep` likeliest tokens, or fewer if others are below `floor`, in order; returns how many.
std::int64_t select_largest(const LogitRow& row, std::int64_t keep, float floor, SampleScratch& scratch);

// The sum of `count` weights, in an order that depends on nothing but their number.
double sum_weights(const float* weights, std::int64_t count);

// Gives each candidate its weight exp((logit - max) * factor); returns their sum.
double weigh(const Kernels& kernels, float max, float factor, std::int64_t count, SampleScratch& scratch);

// The candidate at the share `u` of the total weight.
std::int32_t pick(const SampleScratch& scratch, std::int64_t count, double total, double u);

// For cuts that keep thousands of tokens; takes the same time for any number. `u` in [0, 1) decides.
std::int32_t draw_from_many(const Kernels& kernels, const LogitRow& row, float factor, const Cuts& cuts, double u,
                            SampleScratch& scratch);

}  // namespace nybble
