// Cuts that keep thousands of tokens: a radix select finds the border without sorting anything.
#include <array>
#include <bit>

#include "model/sampler_row.h"

namespace nybble {
namespace {

constexpr int kDigitBits = 11;
constexpr std::uint32_t kDigitMask = (1u << kDigitBits) - 1;
constexpr std::array<int, 3> kShifts = {21, 10, 0};  // the last digit overlaps with the second

// Ascends with the logit; equal logits (0 and -0 too) have equal keys.
std::uint32_t key_of(float logit) {
    const auto bits = std::bit_cast<std::uint32_t>(logit + 0.0f);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Keeps the fewest of the likeliest candidates whose amounts add up to `wanted`; amount(weight) is what one adds.
// The order of candidates stays, and of equals the first are kept. Returns how many.
template <class Amount>
std::int64_t keep_likeliest(std::int64_t count, double wanted, SampleScratch& scratch, Amount&& amount) {
    Candidate* candidates = scratch.candidates.data();
    float* weights = scratch.weights.data();
    std::uint32_t border = 0, known = 0;  // the key where the cut is, as far as it is known: the bits of `known`
    double above = 0.0;                   // the amounts over the border
    for (const int shift : kShifts) {
        // Neighbours often share a digit; with two tables, no addition waits for the one before.
        std::array<std::array<double, 1 << kDigitBits>, 2> tables{};
        for (std::int64_t i = 0; i < count; ++i) {
            const std::uint32_t key = key_of(candidates[i].logit);
            const double counted = (key & known) == border ? amount(weights[i]) : 0.0;  // hard to predict: no branch
            tables[static_cast<std::size_t>(i % 2)][(key >> shift) & kDigitMask] += counted;
        }
        std::array<double, 1 << kDigitBits>& amounts = tables[0];
        for (std::size_t digit = 0; digit < amounts.size(); ++digit) amounts[digit] += tables[1][digit];
        std::size_t digit = amounts.size() - 1;
        while (digit > 0 && above + amounts[digit] < wanted) above += amounts[digit--];
        border |= static_cast<std::uint32_t>(digit) << shift;
        known |= kDigitMask << shift;
    }
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t key = key_of(candidates[i].logit);
        const float weight = weights[i];
        candidates[kept] = candidates[i];
        weights[kept] = weight;
        if (key == border) {
            kept += above < wanted ? 1 : 0;
            above += amount(weight);
        } else {
            kept += key > border ? 1 : 0;
        }
    }
    return kept;
}

}  // namespace

std::int32_t draw_from_many(const Kernels& kernels, const LogitRow& row, float factor, const Cuts& cuts, double u,
                            SampleScratch& scratch) {
    std::int64_t count = collect(row, cuts.floor, scratch);
    double total = weigh(kernels, row.max, factor, count, scratch);
    if (cuts.top_k < count) {
        count = keep_likeliest(count, static_cast<double>(cuts.top_k), scratch, [](float) { return 1.0; });
        total = sum_weights(scratch.weights.data(), count);
    }
    if (cuts.top_p < 1.0f) {
        count = keep_likeliest(count, cuts.top_p * total, scratch, [](float weight) { return double{weight}; });
        total = sum_weights(scratch.weights.data(), count);
    }
    return pick(scratch, count, total, u);
}

}  // namespace nybble
