#include "model/kv_cache.h"

#include <cstring>

namespace nybble {

void KvCache::copy_blocks(std::span<const BlockCopy> pairs, ThreadPool& pool) {
    pool.run([&](Worker& worker) {
        worker.parallel_for(static_cast<std::int64_t>(layers_.size()), 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                Layer& layer = layers_[static_cast<std::size_t>(i)];
                for (const BlockCopy& pair : pairs) {
                    if (pair.from == pair.to) continue;
                    std::memcpy(layer.data.data() + layer.block_bytes * static_cast<std::size_t>(pair.to),
                                layer.data.data() + layer.block_bytes * static_cast<std::size_t>(pair.from),
                                layer.block_bytes);
                }
            }
        });
    });
}

void KvCache::read_block(int block, std::uint8_t* out) const {
    for (const Layer& layer : layers_) {
        std::memcpy(out, layer.data.data() + layer.block_bytes * static_cast<std::size_t>(block), layer.block_bytes);
        out += layer.block_bytes;
    }
}

void KvCache::write_block(int block, const std::uint8_t* from) {
    for (Layer& layer : layers_) {
        std::memcpy(layer.data.data() + layer.block_bytes * static_cast<std::size_t>(block), from, layer.block_bytes);
        from += layer.block_bytes;
    }
}

std::size_t KvCache::bytes_per_block(const ModelConfig& config, KvType type) {
    std::size_t total = 0;
    for (const LayerConfig& layer : config.layers) {
        const std::size_t bytes =
            checked_mul(kv_head_bytes(layer.head_dim, type), static_cast<std::size_t>(layer.kv_heads));
        total = checked_add(total, bytes);
    }
    return total;
}

}  // namespace nybble
