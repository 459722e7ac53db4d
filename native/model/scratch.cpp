#include "model/scratch.h"

#include <algorithm>
#include <utility>

#include "model/gemm.h"
#include "model/operand.h"

namespace nybble {
namespace {

std::size_t size(int n) { return static_cast<std::size_t>(n); }

void raise_to(std::size_t& width, std::size_t wanted) { width = std::max(width, wanted); }

bool same_rope(const LayerConfig& a, const LayerConfig& b) {
    return a.inv_freq == b.inv_freq && a.rope_scale == b.rope_scale;
}

}  // namespace

Scratch::Scratch(const ModelConfig& config, const Weights& weights, bool act_f32, int workers_count)
    : workers(size(workers_count)), hidden_(size(config.hidden_size)) {
    const std::size_t hidden = hidden_;
    Forms wide;
    wide.include(weights.head(), act_f32);
    std::size_t attention = 0;
    std::size_t ordered = 0;
    for (std::size_t i = 0; i < config.layers.size(); ++i) {
        const LayerConfig& layer = config.layers[i];
        const LayerWeights& w = weights.layers[i];
        for (const Matrix* matrix : {&w.q, &w.k, &w.v, &w.gate, &w.up}) wide.include(*matrix, act_f32);
        for (const auto& [matrix, width] : {std::pair{&w.o, layer.q_size()}, std::pair{&w.down, layer.ffn_size}}) {
            raise_to(widths_.inner_floats, size(width));
            if (Forms().include(*matrix, act_f32).blocks) raise_to(widths_.inner_blocks, size(width) / kBlockInputs);
        }
        for (const InputOrder& order : w.orders) raise_to(ordered, order.inputs.size());
        raise_to(widths_.qkv, size(layer.qkv_size()));
        if (layer.post_norms) widths_.y = hidden;
        raise_to(attention, attention_scratch_floats(kAttentionMaxTokens * layer.group(), layer.head_dim));

        const auto same = std::find_if(ropes.begin(), ropes.end(),
                                       [&](const RopeTable& rope) { return same_rope(*rope.layer, layer); });
        rope_of_layer.push_back(static_cast<int>(same - ropes.begin()));
        if (same == ropes.end()) {
            ropes.emplace_back();
            ropes.back().layer = &layer;
        }
    }
    widths_.x = hidden;
    widths_.wide_blocks = wide.blocks ? hidden / kBlockInputs : 0;
    widths_.wide_floats = wide.floats ? hidden : 0;
    for (WorkerScratch& worker : workers) {
        worker.rows = Buffer<float>(2 * hidden);
        worker.results = Buffer<float>(size(2 * kMaxTaskTokens * kBlockInputs));
        worker.attention = Buffer<float>(attention);
        worker.ordered = Buffer<float>(ordered);
    }
}

void Scratch::reserve(int tokens) {
    const std::size_t count = size(tokens);
    x.reserve_discarding(checked_mul(count, widths_.x));
    y.reserve_discarding(checked_mul(count, widths_.y));
    qkv.reserve_discarding(checked_mul(count, widths_.qkv));
    wide_blocks.reserve_discarding(checked_mul(count, widths_.wide_blocks));
    wide_floats.reserve_discarding(checked_mul(count, widths_.wide_floats));
    inner_blocks.reserve_discarding(checked_mul(count, widths_.inner_blocks));
    inner_floats.reserve_discarding(checked_mul(count, widths_.inner_floats));
    for (RopeTable& rope : ropes) {
        rope.cos.reserve_discarding(checked_mul(count, rope.layer->inv_freq.size()));
        rope.sin.reserve_discarding(checked_mul(count, rope.layer->inv_freq.size()));
    }
    sequence_of.resize(count);
    position_of.resize(count);
}

void Scratch::reserve_low_rank(int tokens, int width) {
    wide_floats.reserve_discarding(checked_mul(size(tokens), hidden_));
    low_rank.reserve_discarding(checked_mul(size(tokens), size(width)));
}

}  // namespace nybble
