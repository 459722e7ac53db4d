#include "model/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace nybble {
namespace {

constexpr float kGreedyBelow = 1e-5f;
constexpr int kLanes = 16;  // independent partial results, so that the compiler can use vectors

// e^x for x <= 0 to 2e-7, in plain arithmetic that the compiler turns into vector code; 0 below -87, NaN stays.
inline float exp_not_positive(float argument) {
    const float x = argument < -87.0f ? -87.0f : argument;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float n = (x * 1.44269504f + magic) - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 0.00019882773f;
    p = p * r + 0.00139262508f;
    p = p * r + 0.00833332084f;
    p = p * r + 0.0416665542f;
    p = p * r + 0.166666667f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const std::int32_t bits = std::bit_cast<std::int32_t>(n + magic) - 0x4b400000;
    const float result = p * std::bit_cast<float>((bits + 127) << 23);
    return argument < -87.0f ? 0.0f : result;
}

// The index of the largest value, the first one of equals; -1 if there is a NaN or the largest is not finite.
std::int32_t argmax(const float* x, int n) {
    float lanes[kLanes];
    std::int32_t bad[kLanes] = {};
    std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) {
            lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
            bad[j] |= x[i + j] != x[i + j] ? 1 : 0;
        }
    }
    float largest = *std::max_element(lanes, lanes + kLanes);
    bool any_bad = std::find(bad, bad + kLanes, 1) != bad + kLanes;
    for (; i < n; ++i) {
        largest = x[i] > largest ? x[i] : largest;
        any_bad |= std::isnan(x[i]);
    }
    if (any_bad || !std::isfinite(largest)) return -1;
    return static_cast<std::int32_t>(std::find(x, x + n, largest) - x);
}

// weights[i] = exp((x[i] - max) * factor) where `weights` is not null; returns their sum.
template <bool keep>
double sum_exp(const float* x, int n, float max, float factor, float* weights) {
    constexpr int kChunk = 1024;  // floats are added in float within a chunk, and in double beyond it
    double total = 0.0;
    int i = 0;
    while (i + kLanes <= n) {
        float lanes[kLanes] = {};
        const int end = std::min(i + kChunk, n);
        for (; i + kLanes <= end; i += kLanes) {
            for (int j = 0; j < kLanes; ++j) {
                const float weight = exp_not_positive((x[i + j] - max) * factor);
                if constexpr (keep) weights[i + j] = weight;
                lanes[j] += weight;
            }
        }
        for (const float lane : lanes) total += lane;
    }
    for (; i < n; ++i) {
        const float weight = exp_not_positive((x[i] - max) * factor);
        if constexpr (keep) weights[i] = weight;
        total += weight;
    }
    return total;
}

std::uint64_t mix(std::uint64_t x) {  // the finaliser of splitmix64
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Uniform in [0, 1). A hash of a counter rather than a generator with state: a draw depends on nothing else.
double uniform(std::uint64_t seed, std::uint64_t position) {
    const std::uint64_t golden = 0x9e3779b97f4a7c15u;
    return static_cast<double>(mix(mix(seed + golden) + (position + 1) * golden) >> 11) * 0x1p-53;
}

}  // namespace

void Sampler::select_largest(Candidate* candidates, std::int64_t count, std::int64_t keep) {
    const auto before = [](const Candidate& a, const Candidate& b) {
        return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
    };
    if (keep < count) std::nth_element(candidates, candidates + keep, candidates + count, before);
    std::sort(candidates, candidates + std::min(keep, count), before);
}

std::int32_t Sampler::draw(const float* logits, int vocab, float max, const SampleRow& row, Scratch& scratch) {
    float* weights = scratch.weights.data();
    double total = sum_exp<true>(logits, vocab, max, 1.0f / row.temperature, weights);
    const double u = uniform(row.seed, row.position);
    const bool cut_k = row.top_k > 0 && row.top_k < vocab;
    if (!cut_k && row.top_p >= 1.0f && row.min_p <= 0.0f) {
        double left = u * total;
        std::int32_t last = 0;
        for (int i = 0; i < vocab; ++i) {
            left -= weights[i];
            if (left < 0.0) return i;
            if (logits[i] == max) last = i;
        }
        return last;  // only reached when rounding used up the whole sum
    }

    Candidate* candidates = scratch.candidates.data();
    std::int64_t count = 0;
    total = 0.0;
    for (int i = 0; i < vocab; ++i) {
        if (weights[i] < row.min_p) continue;  // the likeliest token has weight 1, so it stays
        candidates[count++] = {weights[i], i};
        total += weights[i];
    }
    if (cut_k && row.top_k < count) {
        select_largest(candidates, count, row.top_k);
        count = row.top_k;
        total = 0.0;
        for (std::int64_t i = 0; i < count; ++i) total += candidates[i].weight;
    }
    if (row.top_p < 1.0f) {
        // Sorting the vocabulary would cost more than a decode step; a few hundred tokens nearly always suffice.
        const double wanted = row.top_p * total;
        for (std::int64_t sorted = std::min<std::int64_t>(256, count);; sorted = std::min(sorted * 8, count)) {
            select_largest(candidates, count, sorted);
            double reached = 0.0;
            std::int64_t kept = 0;
            while (kept < sorted && (kept == 0 || reached < wanted)) reached += candidates[kept++].weight;
            if (reached < wanted && sorted < count) continue;
            count = kept;
            total = reached;
            break;
        }
    }
    double left = u * total;
    for (std::int64_t i = 0; i < count; ++i) {
        left -= candidates[i].weight;
        if (left < 0.0) return candidates[i].id;
    }
    return candidates[0].id;
}

void Sampler::fill_top(const float* logits, int vocab, double log_norm, Scratch& scratch, Sampled& out) {
    Candidate* candidates = scratch.candidates.data();
    for (int i = 0; i < vocab; ++i) candidates[i] = {logits[i], i};
    const auto count = static_cast<std::int64_t>(out.top.size());
    select_largest(candidates, vocab, count);
    for (std::int64_t i = 0; i < count; ++i) {
        const Candidate& c = candidates[i];
        out.top[static_cast<std::size_t>(i)] = {c.id, static_cast<float>(c.weight - log_norm)};
    }
}

bool Sampler::sample_row(const float* logits, int vocab, const SampleRow& row, Scratch& scratch, Sampled& out) {
    const std::int32_t best = argmax(logits, vocab);
    if (best < 0) return false;
    const float max = logits[best];
    out.token.id = row.temperature < kGreedyBelow ? best : draw(logits, vocab, max, row, scratch);
    out.token.logprob = std::numeric_limits<float>::quiet_NaN();
    if (row.top_logprobs < 0) return true;
    const double log_norm = max + std::log(sum_exp<false>(logits, vocab, max, 1.0f, nullptr));
    out.token.logprob = static_cast<float>(logits[out.token.id] - log_norm);
    if (!out.top.empty()) fill_top(logits, vocab, log_norm, scratch, out);
    return true;
}

std::vector<Sampled> Sampler::sample(ThreadPool& pool, const float* logits, int vocab,
                                     std::span<const SampleRow> rows) {
    std::vector<Sampled> out(rows.size());
    std::vector<char> ok(rows.size(), 1);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        out[i].top.resize(static_cast<std::size_t>(std::clamp(rows[i].top_logprobs, 0, vocab)));
    }
    scratch_.resize(static_cast<std::size_t>(pool.size()));
    for (Scratch& scratch : scratch_) {  // address space only: pages come when a worker writes to them
        scratch.weights.reserve_discarding(static_cast<std::size_t>(vocab));
        scratch.candidates.reserve_discarding(static_cast<std::size_t>(vocab));
    }
    const auto total = static_cast<std::int64_t>(rows.size());
    const auto row_loop = [&](Scratch& scratch, std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const auto r = static_cast<std::size_t>(i);
            ok[r] = sample_row(logits + i * vocab, vocab, rows[r], scratch, out[r]) ? 1 : 0;
        }
    };
    if (total == 1) {
        row_loop(scratch_[0], 0, 1);  // not worth waking anybody
    } else {
        pool.run([&](Worker& worker) {
            Scratch& scratch = scratch_[static_cast<std::size_t>(worker.index())];
            worker.parallel_for(total, 1, [&](std::int64_t begin, std::int64_t end) { row_loop(scratch, begin, end); });
        });
    }
    for (std::size_t i = 0; i < ok.size(); ++i) {
        if (ok[i] == 0) {
            throw std::invalid_argument("logit row " + std::to_string(i) +
                                        " holds NaN or an infinite maximum, so no token can be drawn from it");
        }
    }
    return out;
}

}  // namespace nybble
