#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace nybble {
namespace {

constexpr float kGreedyBelow = 1e-5f;

// One more than how many tokens come before this one.
int rank_of(const LogitRow& row, std::int32_t id) {
    const float value = row.logits[id];
    int before = 0;
    for (int b = 0; b < row.blocks(); ++b) {
        if (row.maxima[b] < value) continue;
        const int begin = b * kMaximaBlock, end = std::min(row.vocab, begin + kMaximaBlock);
        for (int i = begin; i < end; ++i) before += row.logits[i] > value ? 1 : 0;
        for (int i = begin; i < std::min(end, id); ++i) before += row.logits[i] == value ? 1 : 0;
    }
    return before + 1;
}

}  // namespace

void SampleScratch::reserve(int vocab) {
    const auto count = static_cast<std::size_t>(vocab);
    const auto blocks = static_cast<std::size_t>((vocab + kMaximaBlock - 1) / kMaximaBlock);
    for (Buffer<float>* buffer : {&maxima, &raw_maxima, &order}) *buffer = Buffer<float>(blocks);
    sums = Buffer<float>(static_cast<std::size_t>((vocab + kExpChunk - 1) / kExpChunk));
    edited = Buffer<float>(count);
    weights = Buffer<float>(count);
    candidates = Buffer<Candidate>(count);
    penalties.reserve(vocab);
}

Sampler::Sampler(const Kernels& kernels, ThreadPool& pool, int vocab)
    : kernels_(kernels), pool_(pool), vocab_(vocab), scratch_(static_cast<std::size_t>(pool.size())) {
    // Address space only: pages come when a worker writes to them.
    for (SampleScratch& scratch : scratch_) scratch.reserve(vocab);
}

bool Sampler::view(const float* logits, float* maxima, LogitRow& out) const {
    out = {logits, vocab_, maxima, kernels_.block_maxima(logits, vocab_, maxima)};
    return std::isfinite(out.max);
}

void Sampler::report(const LogitRow& raw, SampleScratch& scratch, Sampled& out) const {
    const double log_norm = raw.max + std::log(exp_total(kernels_, raw, 1.0f, scratch));
    out.token.logprob = static_cast<float>(raw.logits[out.token.id] - log_norm);
    out.rank = rank_of(raw, out.token.id);
    if (out.top.empty()) return;
    constexpr float everything = -std::numeric_limits<float>::infinity();
    select_largest(raw, static_cast<std::int64_t>(out.top.size()), everything, scratch);
    for (std::size_t i = 0; i < out.top.size(); ++i) {
        const Candidate& candidate = scratch.candidates[i];
        out.top[i] = {candidate.id, static_cast<float>(candidate.logit - log_norm)};
    }
}

void Sampler::sample_row(const float* logits, const SampleRow& row, SampleScratch& scratch, Sampled& out) const {
    const float* edited = logits;
    if (row.edits.any()) {
        apply(row.edits, kernels_, logits, vocab_, scratch.penalties, scratch.edited.data());
        edited = scratch.edited.data();
    }
    LogitRow view_of_edited{};
    if (!view(edited, scratch.maxima.data(), view_of_edited)) return;
    out.token.id =
        row.temperature < kGreedyBelow ? argmax(view_of_edited) : draw(kernels_, view_of_edited, row, scratch);
    out.token.logprob = std::numeric_limits<float>::quiet_NaN();
    out.ok = true;
    if (row.top_logprobs < 0) return;
    LogitRow raw = view_of_edited;
    if (edited != logits) out.ok = view(logits, scratch.raw_maxima.data(), raw);
    if (out.ok) report(raw, scratch, out);
}

template <class Body>
void Sampler::for_each_row(std::size_t rows, Body&& body) {
    if (rows == 1) {
        body(std::size_t{0}, scratch_[0]);  // not worth waking anybody
        return;
    }
    pool_.run([&](Worker& worker) {
        SampleScratch& scratch = scratch_[static_cast<std::size_t>(worker.index())];
        worker.parallel_for(static_cast<std::int64_t>(rows), 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) body(static_cast<std::size_t>(i), scratch);
        });
    });
}

std::vector<Sampled> Sampler::sample(const float* logits, std::span<const SampleRow> rows) {
    std::vector<Sampled> out(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        out[i].top.resize(static_cast<std::size_t>(std::clamp(rows[i].top_logprobs, 0, vocab_)));
    }
    for_each_row(rows.size(), [&](std::size_t i, SampleScratch& scratch) {
        sample_row(logits + i * static_cast<std::size_t>(vocab_), rows[i], scratch, out[i]);
    });
    return out;
}

std::vector<Sampled> Sampler::score(const float* logits, std::span<const std::int32_t> targets, int top) {
    std::vector<Sampled> out(targets.size());
    for (Sampled& one : out) one.top.resize(static_cast<std::size_t>(std::clamp(top, 0, vocab_)));
    for_each_row(targets.size(), [&](std::size_t i, SampleScratch& scratch) {
        LogitRow row{};
        out[i].token.id = targets[i];
        out[i].ok = view(logits + i * static_cast<std::size_t>(vocab_), scratch.maxima.data(), row);
        if (out[i].ok) report(row, scratch, out[i]);
    });
    return out;
}

}  // namespace nybble
