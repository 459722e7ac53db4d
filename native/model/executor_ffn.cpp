// The gated feed-forward half of a layer, up to the input of its down matrix.
#include <cstring>

#include "model/executor.h"

namespace nybble {

// A task is some blocks of 32 columns: their two row groups of gate and of up, then the activation, so that gate and up
// never leave the worker's cache.
void Executor::feed_forward(Worker& worker, const LayerRun& layer, const Operand& in, const Operand& to) {
    const LayerWeights& w = layer.weights;
    const int tile_tokens = task_tokens(machine_, in);
    const int token_tiles = (in.tokens + tile_tokens - 1) / tile_tokens;
    const int blocks = (layer.config.ffn_size + kBlockInputs - 1) / kBlockInputs;
    const std::size_t block_bytes = 2 * (w.gate.group_bytes() + w.up.group_bytes());
    const int per_task = items_per_task(blocks, block_bytes, token_tiles, worker.size());
    const int tasks_per_tile = (blocks + per_task - 1) / per_task;
    float* results = memory(worker).results.data();
    worker.parallel_for(static_cast<std::int64_t>(tasks_per_tile) * token_tiles, 1,
                        [&](std::int64_t begin, std::int64_t end) {
                            for (int task = static_cast<int>(begin); task < end; ++task) {
                                const int token0 = task / tasks_per_tile * tile_tokens;
                                const int tokens = std::min(tile_tokens, in.tokens - token0);
                                const int first = task % tasks_per_tile * per_task;
                                for (int block = first; block < std::min(first + per_task, blocks); ++block) {
                                    feed_forward_columns(layer, block, in, token0, tokens, results, to);
                                }
                            }
                        });
    finish_rows(worker, to, {layer.index, Site::down});
}

void Executor::feed_forward_columns(const LayerRun& layer, int block, const Operand& in, int token0, int tokens,
                                    float* memory, const Operand& to) {
    constexpr int groups_per_block = kBlockInputs / kGroupRows;
    const LayerWeights& w = layer.weights;
    float* gate = memory;
    float* up = memory + kMaxTaskTokens * kBlockInputs;
    for (int part = 0; part < groups_per_block; ++part) {
        const int group = block * groups_per_block + part;
        if (group >= w.gate.groups()) {  // ffn_size may end inside a block; what is not computed is not kept either
            for (int t = 0; t < tokens; ++t) {
                std::memset(gate + t * kBlockInputs + part * kGroupRows, 0, kGroupRows * sizeof(float));
                std::memset(up + t * kBlockInputs + part * kGroupRows, 0, kGroupRows * sizeof(float));
            }
            continue;
        }
        multiply_group(machine_, w.gate, group, in, token0, tokens, gate + part * kGroupRows, kBlockInputs);
        multiply_group(machine_, w.up, group, in, token0, tokens, up + part * kGroupRows, kBlockInputs);
        if (has_adapters()) {
            const SiteRef site{layer.index, Site::gate_up};
            add_second_factors(site, 0, group, token0, tokens, gate + part * kGroupRows, kBlockInputs);
            add_second_factors(site, 1, group, token0, tokens, up + part * kGroupRows, kBlockInputs);
        }
    }
    const auto act_mul = layer.config.activation == Activation::silu ? kernels_.silu_mul : kernels_.gelu_tanh_mul;
    act_mul(gate, up, tokens * kBlockInputs, gate);
    const int column = block * kBlockInputs;
    const int columns = std::min(kBlockInputs, layer.config.ffn_size - column);
    for (int t = 0; t < tokens; ++t) {
        std::memcpy(to.row(token0 + t) + column, gate + t * kBlockInputs,
                    static_cast<std::size_t>(columns) * sizeof(float));
    }
}

}  // namespace nybble
