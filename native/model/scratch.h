// The memory of a step, allocated outside of the parallel region and kept for the next one.
#pragma once

#include <cstdint>
#include <vector>

#include "base/memory.h"
#include "kernels/act_block.h"
#include "model/config.h"
#include "model/weights.h"

namespace nybble {

// What a worker needs for itself.
struct WorkerScratch {
    Buffer<float> rows;       // [2][hidden]: a token between two operations
    Buffer<float> results;    // [2][kMaxTaskTokens][32]: outputs of a GEMM task
    Buffer<float> attention;  // attention_scratch_floats of the widest layer
    Buffer<float> ordered;    // a token's inputs in the order of the widest matrix that wants one
};

struct ActBuffer {
    Buffer<ActBlock> blocks;
    Buffer<ActBlock> fine;
    Buffer<std::uint8_t> refined;

    void reserve_discarding(std::size_t count) {
        blocks.reserve_discarding(count);
        fine.reserve_discarding(count);
        refined.reserve_discarding(count);
    }
    Acts acts() { return {blocks.data(), fine.data(), refined.data()}; }
};

// Positions of a rotary table that layers share.
struct RopeTable {
    const LayerConfig* layer = nullptr;  // any of the layers that use it
    Buffer<float> cos;                   // [token][rotary_dim / 2]
    Buffer<float> sin;
};

struct Scratch {
    Scratch(const ModelConfig& config, const Weights& weights, bool act_f32, int workers);

    // Makes room for steps of this many tokens.
    void reserve(int tokens);
    // The same for steps with adapters, which read floats and keep `width` numbers per token between two products.
    void reserve_low_rank(int tokens, int width);

    Buffer<float> x;    // [token][hidden], the residual stream
    Buffer<float> y;    // [token][hidden], a sub-layer's output that a post-norm still has to see
    Buffer<float> qkv;  // [token][q heads, k heads, v heads]
    // Operands: `wide` is hidden_size wide (q, k, v, gate, up, head), `inner` as wide as o or down read.
    ActBuffer wide_blocks;
    Buffer<float> wide_floats;
    ActBuffer inner_blocks;
    Buffer<float> inner_floats;
    Buffer<float> low_rank;  // [token][width], what an adapter's first factor gave
    std::vector<RopeTable> ropes;
    std::vector<int> rope_of_layer;
    std::vector<WorkerScratch> workers;
    std::vector<std::int32_t> sequence_of;  // per token
    std::vector<std::int32_t> position_of;

private:
    struct Widths {  // per token
        std::size_t x = 0, y = 0, qkv = 0, wide_blocks = 0, wide_floats = 0, inner_blocks = 0, inner_floats = 0;
    };
    Widths widths_;
    std::size_t hidden_;
};

}  // namespace nybble
