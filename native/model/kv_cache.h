// The paged KV cache of one model: per layer, blocks of 16 tokens for every kv head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/attention_args.h"
#include "model/config.h"

namespace nybble {

// Block ids, laid out as the rows of an int32 array [pairs][2].
struct BlockCopy {
    std::int32_t from;
    std::int32_t to;
};

class KvCache {
public:
    // The memory is zero and appears when it is written.
    KvCache(const ModelConfig& config, int num_blocks, KvType type) : num_blocks_(num_blocks), type_(type) {
        layers_.reserve(config.layers.size());
        for (const LayerConfig& layer : config.layers) {
            Layer one;
            one.head_bytes = kv_head_bytes(layer.head_dim, type);
            one.block_bytes = one.head_bytes * static_cast<std::size_t>(layer.kv_heads);
            one.data = Buffer<std::uint8_t>(checked_mul(one.block_bytes, static_cast<std::size_t>(num_blocks)));
            layers_.push_back(std::move(one));
        }
    }

    KvCache(const KvCache&) = delete;
    KvCache& operator=(const KvCache&) = delete;

    int num_blocks() const { return num_blocks_; }
    KvType type() const { return type_; }
    std::ptrdiff_t block_stride(int layer) const { return static_cast<std::ptrdiff_t>(at(layer).block_bytes); }
    // Block 0 of a layer, at one kv head.
    std::uint8_t* head(int layer, int kv_head) {
        Layer& one = layers_[static_cast<std::size_t>(layer)];
        return one.data.data() + one.head_bytes * static_cast<std::size_t>(kv_head);
    }
    // Copies whole blocks of all layers, one pair after the other: a block that was copied to may be copied from.
    void copy_blocks(std::span<const BlockCopy> pairs, ThreadPool& pool);
    // A block in one piece, layer after layer: bytes_per_block bytes. Another thread may read a block that no step
    // writes.
    void read_block(int block, std::uint8_t* out) const;
    void write_block(int block, const std::uint8_t* from);
    // What one more block takes in all layers.
    static std::size_t bytes_per_block(const ModelConfig& config, KvType type);
    std::size_t bytes() const {
        std::size_t total = 0;
        for (const Layer& layer : layers_) total += layer.data.bytes();
        return total;
    }

private:
    struct Layer {
        std::size_t head_bytes = 0;
        std::size_t block_bytes = 0;
        Buffer<std::uint8_t> data;
    };
    const Layer& at(int layer) const { return layers_[static_cast<std::size_t>(layer)]; }

    int num_blocks_;
    KvType type_;
    std::vector<Layer> layers_;
};

}  // namespace nybble
