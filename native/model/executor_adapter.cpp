// What adapters add to a layer's products.
//
// A token is multiplied by a first factor in the phase that writes the product's input, and by a second one where the
// product itself has just been computed, so adapters need no phase of their own. Neighbours with the same adapter go
// together, which changes no result (see kernels/ops/low_rank.h).
#include <algorithm>

#include "model/executor.h"

namespace nybble {
namespace {

// Calls body(run, first token, tokens) for the runs within [begin, end).
template <class Run, class Body>
void for_runs(const std::vector<Run>& runs, int begin, int end, Body&& body) {
    auto run =
        std::partition_point(runs.begin(), runs.end(), [&](const Run& r) { return r.token0 + r.tokens <= begin; });
    for (; run != runs.end() && run->token0 < end; ++run) {
        const int first = std::max(run->token0, begin);
        body(*run, first, std::min(run->token0 + run->tokens, end) - first);
    }
}

}  // namespace

void Executor::plan_adapters(const Step& step) {
    runs_.clear();
    low_rank_width_ = 0;
    for (int s = 0; s < static_cast<int>(step.adapter_of.size()); ++s) {
        const auto index = static_cast<std::size_t>(s);
        const int token0 = step.cu_seqlens[index];
        const int tokens = step.cu_seqlens[index + 1] - token0;
        if (step.adapter_of[index] < 0 || tokens == 0) continue;
        const Adapter* adapter = step.adapters[static_cast<std::size_t>(step.adapter_of[index])];
        if (adapter->width() == 0) continue;
        low_rank_width_ = std::max(low_rank_width_, adapter->width());
        if (!runs_.empty() && runs_.back().adapter == adapter && runs_.back().token0 + runs_.back().tokens == token0) {
            runs_.back().tokens += tokens;
        } else {
            runs_.push_back({adapter, token0, tokens});
        }
    }
    if (!runs_.empty()) scratch_.reserve_low_rank(tokens_, low_rank_width_);
}

void Executor::multiply_first_factors(SiteRef where, const Operand& in, int begin, int end) {
    for_runs(runs_, begin, end, [&](const AdapterRun& run, int token0, int tokens) {
        const Adapter::SiteWeights& site = run.adapter->site(where.layer, where.site);
        const auto multiply = kernels_.low_rank[static_cast<int>(run.adapter->format())];
        float* out = low_rank_row(token0);
        for (int group = 0; group < site.a.groups(); ++group) {
            multiply(site.a.group(group), in.row(token0), in.k, tokens, in.k, out + group * kGroupRows,
                     low_rank_width_);
        }
        const auto width = static_cast<int>(site.factors.size());
        for (int t = 0; t < tokens; ++t, out += low_rank_width_) {
            for (int r = 0; r < width; ++r) out[r] *= site.factors[static_cast<std::size_t>(r)];
        }
    });
}

void Executor::add_second_factors(SiteRef where, int part, int group, int token0, int tokens, float* out, int ldo) {
    for_runs(runs_, token0, token0 + tokens, [&](const AdapterRun& run, int first, int count) {
        const Adapter::Part& weights = run.adapter->site(where.layer, where.site).parts[static_cast<std::size_t>(part)];
        if (weights.b.empty()) return;
        const auto multiply_add = kernels_.low_rank_add[static_cast<int>(run.adapter->format())];
        multiply_add(weights.b.group(group), low_rank_row(first) + weights.offset, low_rank_width_, count,
                     weights.b.cols(), out + static_cast<std::ptrdiff_t>(first - token0) * ldo, ldo);
    });
}

}  // namespace nybble
