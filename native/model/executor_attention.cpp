// The attention half of a layer.
#include "model/executor.h"

namespace nybble {

void Executor::project_qkv(Worker& worker, const LayerRun& layer, const Operand& in) {
    const LayerWeights& w = layer.weights;
    const int starts[3] = {0, layer.config.q_size(), layer.config.q_size() + layer.config.kv_size()};
    const Vector* biases[3] = {&w.q_bias, &w.k_bias, &w.v_bias};
    const SiteRef site{layer.index, Site::qkv};
    const GemmList list(machine_, in, {&w.q, &w.k, &w.v}, worker.size());
    list.run(worker, memory(worker).results.data(),
             [&](int which, int row0, int rows, int token0, int tokens, float* out) {
                 if (has_adapters())
                     add_second_factors(site, which, row0 / kGroupRows, token0, tokens, out, kGroupRows);
                 const Vector& bias = *biases[which];
                 for (int t = 0; t < tokens; ++t, out += kGroupRows) {
                     float* to = qkv_row(token0 + t, layer.config) + starts[which] + row0;
                     for (int r = 0; r < rows; ++r) {
                         to[r] = bias.empty() ? out[r] : out[r] + bias[static_cast<std::size_t>(row0 + r)];
                     }
                 }
             });
}

// Per token and kv head: norms and rotates its query heads and its key, and puts key and value into the cache.
void Executor::rotate_and_store(Worker& worker, const LayerRun& layer) {
    const LayerConfig& config = layer.config;
    const LayerWeights& w = layer.weights;
    const int dim = config.head_dim;
    const int rotary = config.rotary_dim();
    const RopeTable& rope =
        scratch_.ropes[static_cast<std::size_t>(scratch_.rope_of_layer[static_cast<std::size_t>(layer.index)])];
    const bool in_int8 = layer.cache.type() == KvType::int8;
    const auto finish = [&](float* head, const Vector& norm, std::size_t angles) {
        if (config.qk_norm) kernels_.rms_norm(head, norm.data(), config_.norm_eps, dim, head);
        if (rotary != 0) {
            kernels_.rope(head, rope.cos.data() + angles, rope.sin.data() + angles, rotary, config.rope_interleaved);
        }
        if (in_int8) kernels_.hadamard(head, dim);
    };
    const std::int64_t total = static_cast<std::int64_t>(tokens_) * config.kv_heads;
    worker.parallel_for(total, grain(worker, total), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const int token = static_cast<int>(item / config.kv_heads);
            const int kv_head = static_cast<int>(item % config.kv_heads);
            const std::size_t angles = static_cast<std::size_t>(token) * config.inv_freq.size();
            float* row = qkv_row(token, config);
            float* q = row + kv_head * config.group() * dim;
            for (int g = 0; g < config.group(); ++g) finish(q + g * dim, w.q_norm, angles);
            kernels_.scale(q, config.sm_scale, config.group() * dim);
            float* k = row + config.q_size() + kv_head * dim;
            finish(k, w.k_norm, angles);

            const int position = scratch_.position_of[static_cast<std::size_t>(token)];
            const int sequence = scratch_.sequence_of[static_cast<std::size_t>(token)];
            const std::int32_t block = layer.step.block_table(sequence)[position / kKvBlockTokens];
            kernels_.store_kv(k, k + config.kv_size(), dim, layer.cache.type(),
                              layer.cache.head(layer.index, kv_head) + block * layer.cache.block_stride(layer.index),
                              position % kKvBlockTokens);
        }
    });
}

void Executor::attend(Worker& worker, const LayerRun& layer, const Operand& to) {
    const int kv_heads = layer.config.kv_heads;
    const auto total = static_cast<std::int64_t>(tiles_.size()) * kv_heads;
    float* attention = memory(worker).attention.data();
    worker.parallel_for(total, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const AttentionTile& tile = tiles_[static_cast<std::size_t>(item / kv_heads)];
            attend_tile(layer, tile, static_cast<int>(item % kv_heads), attention, to);
        }
    });
    finish_rows(worker, to, {layer.index, Site::o});
}

void Executor::attend_tile(const LayerRun& layer, const AttentionTile& tile, int kv_head, float* memory,
                           const Operand& to) {
    const LayerConfig& config = layer.config;
    const int width = config.group() * config.head_dim;
    const int column = kv_head * width;
    AttentionArgs args;
    args.q = qkv_row(tile.token0, config) + column;
    args.q_stride = config.qkv_size();
    args.out = to.row(tile.token0) + column;
    args.out_stride = to.k;
    args.kv = layer.cache.head(layer.index, kv_head);
    args.kv_block_stride = layer.cache.block_stride(layer.index);
    args.block_table = layer.step.block_table(tile.sequence);
    args.tokens = tile.tokens;
    args.heads = config.group();
    args.head_dim = config.head_dim;
    args.first_position = scratch_.position_of[static_cast<std::size_t>(tile.token0)];
    args.window = config.window;
    args.softcap = config.attn_softcap;
    args.kv_type = layer.cache.type();
    args.scratch = memory;
    kernels_.attention(args);
}

}  // namespace nybble
