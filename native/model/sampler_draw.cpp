// Drawing without sorting the vocabulary, or even looking at all of it twice.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "model/sampler.h"

namespace nybble {
namespace {

constexpr std::int64_t kFirstCandidates = 32;   // what top_p looks at first; nearly always enough
constexpr std::int64_t kMostCandidates = 2048;  // sorting more takes longer than draw_from_many

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

// Finds the chunk first, so that only its weights have to be kept.
std::int32_t draw_from_all(const Kernels& kernels, const LogitRow& row, float factor, double u,
                           SampleScratch& scratch) {
    double left = u * exp_total(kernels, row, factor, scratch);
    for (int begin = 0; begin < row.vocab; begin += kExpChunk) {
        const float sum = scratch.sums[static_cast<std::size_t>(begin / kExpChunk)];
        if (left >= sum) {
            left -= sum;
            continue;
        }
        const int count = std::min(kExpChunk, row.vocab - begin);
        float* weights = scratch.weights.data();
        kernels.exp_weights(row.logits + begin, count, row.max, factor, weights);
        int last = 0;
        for (int i = 0; i < count; ++i) {
            left -= weights[i];
            if (left < 0.0) return begin + i;
            if (weights[i] > 0.0f) last = i;
        }
        return begin + last;  // only reached when rounding used up the chunk
    }
    return argmax(row);  // only reached when rounding used up the whole sum
}

}  // namespace

std::int32_t argmax(const LogitRow& row) {
    const auto block = static_cast<int>(std::find(row.maxima, row.maxima + row.blocks(), row.max) - row.maxima);
    const float* begin = row.logits + static_cast<std::ptrdiff_t>(block) * kMaximaBlock;
    return static_cast<std::int32_t>(std::find(begin, row.logits + row.vocab, row.max) - row.logits);
}

std::int64_t collect(const LogitRow& row, float floor, SampleScratch& scratch) {
    Candidate* candidates = scratch.candidates.data();
    std::int64_t count = 0;
    for (int b = 0; b < row.blocks(); ++b) {
        if (row.maxima[b] < floor) continue;
        const int end = std::min(row.vocab, (b + 1) * kMaximaBlock);
        for (int i = b * kMaximaBlock; i < end; ++i) {
            candidates[count] = {row.logits[i], i};  // there is room, as count <= i
            count += row.logits[i] >= floor ? 1 : 0;
        }
    }
    return count;
}

double sum_weights(const float* weights, std::int64_t count) {
    double parts[4] = {};  // so that no addition waits for the one before
    const std::int64_t whole = count / 4 * 4;
    for (std::int64_t i = 0; i < whole; i += 4) {
        for (int j = 0; j < 4; ++j) parts[j] += weights[i + j];
    }
    for (std::int64_t i = whole; i < count; ++i) parts[0] += weights[i];
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

double weigh(const Kernels& kernels, float max, float factor, std::int64_t count, SampleScratch& scratch) {
    float* weights = scratch.weights.data();
    for (std::int64_t i = 0; i < count; ++i) weights[i] = scratch.candidates[static_cast<std::size_t>(i)].logit;
    kernels.exp_weights(weights, static_cast<int>(count), max, factor, weights);
    return sum_weights(weights, count);
}

std::int32_t pick(const SampleScratch& scratch, std::int64_t count, double total, double u) {
    constexpr std::int64_t stride = 256;  // whole strides are skipped by their sums
    const float* weights = scratch.weights.data();
    double left = u * total;
    std::int64_t i = 0;
    for (; i + stride < count; i += stride) {
        const double sum = sum_weights(weights + i, stride);
        if (left < sum) break;
        left -= sum;
    }
    std::int64_t last = 0;
    for (const std::int64_t end = std::min(i + stride, count); i < end; ++i) {
        left -= weights[i];
        if (weights[i] > 0.0f) last = i;
        if (left < 0.0) break;
    }
    return scratch.candidates[static_cast<std::size_t>(last)].id;
}

std::int64_t select_largest(const LogitRow& row, std::int64_t keep, float floor, SampleScratch& scratch) {
    if (keep < row.blocks()) {  // as many blocks reach the keep-th largest maximum, so as many tokens do
        float* order = scratch.order.data();
        std::copy_n(row.maxima, row.blocks(), order);
        std::nth_element(order, order + keep - 1, order + row.blocks(), std::greater<>());
        floor = std::max(floor, order[keep - 1]);
    }
    Candidate* candidates = scratch.candidates.data();
    const std::int64_t count = collect(row, floor, scratch);
    const auto before = [](const Candidate& a, const Candidate& b) {
        return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
    };
    if (keep < count) std::nth_element(candidates, candidates + keep, candidates + count, before);
    std::sort(candidates, candidates + std::min(keep, count), before);
    return std::min(keep, count);
}

double exp_total(const Kernels& kernels, const LogitRow& row, float factor, SampleScratch& scratch) {
    kernels.exp_sums(row.logits, row.vocab, row.max, factor, scratch.sums.data());
    double total = 0.0;
    for (int c = 0; c * kExpChunk < row.vocab; ++c) total += scratch.sums[static_cast<std::size_t>(c)];
    return total;
}

std::int32_t draw(const Kernels& kernels, const LogitRow& logits, const SampleRow& row, SampleScratch& scratch) {
    const float factor = 1.0f / row.temperature;
    const double u = uniform(row.seed, row.position);
    const bool cut_k = row.top_k > 0 && row.top_k < logits.vocab;
    if (!cut_k && row.top_p >= 1.0f && row.min_p <= 0.0f) return draw_from_all(kernels, logits, factor, u, scratch);

    Cuts cuts{std::numeric_limits<float>::lowest(), cut_k ? row.top_k : logits.vocab, row.top_p};  // leaves out -inf
    if (row.min_p > 0.0f) {  // exp((floor - max) / temperature) = min_p
        const double floor = logits.max + row.temperature * std::log(double{row.min_p});
        cuts.floor = std::max(cuts.floor, static_cast<float>(floor));
    }
    if (cut_k && row.top_k > kMostCandidates) return draw_from_many(kernels, logits, factor, cuts, u, scratch);
    std::int64_t count = 0;
    double total = 0.0;
    if (cut_k) {
        count = select_largest(logits, row.top_k, cuts.floor, scratch);
        total = weigh(kernels, logits.max, factor, count, scratch);
    } else if (row.min_p > 0.0f) {
        count = collect(logits, cuts.floor, scratch);
        total = weigh(kernels, logits.max, factor, count, scratch);
    } else {
        total = exp_total(kernels, logits, factor, scratch);
    }
    if (row.top_p < 1.0f) {
        const double wanted = row.top_p * total;
        for (std::int64_t keep = kFirstCandidates;; keep *= 8) {
            if (!cut_k && keep <= kMostCandidates && static_cast<double>(keep) < wanted) continue;  // weights are <= 1
            if (keep > kMostCandidates) return draw_from_many(kernels, logits, factor, cuts, u, scratch);
            if (!cut_k) {
                count = select_largest(logits, keep, cuts.floor, scratch);
                weigh(kernels, logits.max, factor, count, scratch);
            }
            double reached = 0.0;
            std::int64_t kept = 0;
            while (kept < count && (kept == 0 || reached < wanted)) {
                reached += scratch.weights[static_cast<std::size_t>(kept++)];
            }
            if (reached < wanted && !cut_k && count == keep) continue;
            count = kept;
            total = reached;
            break;
        }
    }
    return pick(scratch, count, total, u);
}

}  // namespace nybble
